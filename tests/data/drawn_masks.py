"""Small folders of pictures with masks, drawn in each of the known layouts."""

import json
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASS_NAMES = ("sky", "road", "car")


def pixels(height: int, width: int) -> Image.Image:
    """A colourful picture."""
    rows, columns = np.mgrid[:height, :width]
    colours = np.stack([5 * rows, 3 * columns, rows + columns], axis=-1) % 256
    return Image.fromarray(colours.astype(np.uint8))


def bands(height: int, width: int, numbers: tuple[int, ...] = (0, 1, 2, 255)) -> NDArray[np.uint8]:
    """A mask of upright bands of equal width."""
    row = np.array(numbers)[np.arange(width) * len(numbers) // width]
    return np.tile(row, (height, 1)).astype(np.uint8)


def save_mask(path: Path, mask: NDArray[np.uint8], *, palette: bool = False) -> None:
    image = Image.fromarray(mask)
    if palette:
        image.putpalette([value for colour in range(256) for value in (colour, 0, 255 - colour)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def save_image(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def mask_folder(root: Path, *, sizes: tuple[tuple[int, int], ...] = ((12, 16), (13, 9))) -> Path:
    """A MaskFolder: in each of train and val one picture of every size, palette and gray masks."""
    classes = {"classes": list(CLASS_NAMES), "palette": [[0, 0, 255], [90, 90, 90], [255, 0, 0]]}
    for split in ("train", "val"):
        for number, size in enumerate(sizes):
            save_image(root / split / "images" / f"{number}.png", pixels(*size))
            mask = root / split / "masks" / f"{number}.png"
            save_mask(mask, bands(*size), palette=number % 2 == 0)
    (root / "classes.json").write_text(json.dumps(classes))
    return root


def ade20k(root: Path) -> Path:
    """An ADEChallengeData2016 of two pictures, without objectInfo150.txt."""
    for split, short in (("training", "train"), ("validation", "val")):
        name = f"ADE_{short}_00000001"
        save_image(root / "images" / split / f"{name}.jpg", pixels(10, 12))
        save_mask(root / "annotations" / split / f"{name}.png", bands(10, 12, (0, 1, 13, 150)))
    return root


def cityscapes(root: Path) -> Path:
    """A Cityscapes of two pictures, with labelIds alone."""
    for split in ("train", "val"):
        name = "ulm_000000_000019"
        image = root / "leftImg8bit" / split / "ulm" / f"{name}_leftImg8bit.png"
        save_image(image, pixels(10, 12))
        mask = root / "gtFine" / split / "ulm" / f"{name}_gtFine_labelIds.png"
        save_mask(mask, bands(10, 12, (0, 7, 26, 33)))
        save_mask(mask.with_name(f"{name}_gtFine_instanceIds.png"), bands(10, 12))
    return root


def exif_behind_the_pixels(path: Path) -> None:
    """Says in a PNG that it is to be turned by a quarter, where its header does not show it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes().removeprefix(b"Exif\x00\x00")
    chunk = b"eXIf" + body
    content = path.read_bytes()
    end = content.rindex(b"IEND") - 4
    check = zlib.crc32(chunk).to_bytes(4, "big")
    path.write_bytes(content[:end] + len(body).to_bytes(4, "big") + chunk + check + content[end:])
