"""An .npz archive of encoded pictures as a folder that `visionmamba train` reads.

Run:     python examples/unpack_npz.py pictures.npz data --val test
         visionmamba train finetune --data.root data --out runs/mine
Archive: `classes` (names); for each split S `S_data` (uint8, all JPEG, PNG or WebP files one after
         another), `S_offsets` (int64, one more than pictures: picture i is
         S_data[S_offsets[i]:S_offsets[i + 1]]) and `S_labels` (int64, numbers of classes).
Writes:  data/train/CLASS/*.jpg and data/val/CLASS/*.jpg, byte for byte as in the archive.
"""

import argparse
import io
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def main(archive: Path, out: Path, *, train: str = "train", val: str = "val") -> None:
    """Writes the pictures of two splits of an archive into a folder, which must not exist yet.

    Raises:
        FileExistsError: the folder exists.
        ValueError: the archive lacks an entry, its entries disagree, or a class name is no name.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; give another folder or remove it")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with np.load(archive, allow_pickle=False) as arrays:
        names = [str(name) for name in entry(arrays, archive, "classes")]
        for name in names:
            check_name(name)
        for split, folder in ((train, "train"), (val, "val")):
            unpack(arrays, archive, split, names, partial / folder)
    os.replace(partial, out)


def unpack(
    arrays: np.lib.npyio.NpzFile, archive: Path, split: str, names: list[str], folder: Path
) -> None:
    """Writes the pictures of one split as folder/CLASS/NUMBER.SUFFIX."""
    data = entry(arrays, archive, f"{split}_data")
    offsets = entry(arrays, archive, f"{split}_offsets")
    labels = entry(arrays, archive, f"{split}_labels")
    if len(offsets) != len(labels) + 1 or offsets[0] != 0 or (np.diff(offsets) <= 0).any():
        raise ValueError(
            f"{archive}: {split}_offsets must ascend from 0 and be one more than the "
            f"{len(labels)} labels, got {len(offsets)}"
        )
    if offsets[-1] > len(data) or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"{archive}: {split} points beyond its data or its {len(names)} classes")
    for name in names:
        (folder / name).mkdir(parents=True)
    for number, label in enumerate(labels):
        content = data[offsets[number] : offsets[number + 1]].tobytes()
        target = folder / names[label] / f"{number:07}.{suffix_of(content)}"
        target.write_bytes(content)


def entry(arrays: np.lib.npyio.NpzFile, archive: Path, name: str) -> np.ndarray:
    """Returns one array of the archive."""
    if name not in arrays:
        raise ValueError(f"{archive} holds no {name}; it holds {', '.join(arrays)}")
    return arrays[name]


def check_name(name: str) -> None:
    """Raises ValueError for a class name that would lead out of its folder."""
    if not name or name.startswith(".") or any(sign in name for sign in "/\\\0"):
        raise ValueError(f"{name!r} cannot be the name of a folder; rename the class")


def suffix_of(content: bytes) -> str:
    """Returns the ending that fits a file; "jpg" also for what is no picture."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return FORMATS.get(image.format or "", "jpg")
    except UnidentifiedImageError:
        return "jpg"  # training names it: that is not for this script to decide


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", default="train", help="split to learn from")
    parser.add_argument("--val", default="val", help="split to judge on")
    given = parser.parse_args()
    main(given.archive, given.out, train=given.train, val=given.val)
