"""Sets of labelled images: scikit-learn's handwritten digits, and any folder of pictures."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from visionmamba.data.image_files import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    UnreadableImageError,
    open_image,
)

Split = Literal["train", "val"]
OnUnreadable = Literal["fail", "skip"]

_DIGITS_VAL_SHARE = 0.2
_DIGITS_SPLIT_SEED = 0
_NUM_NAMED_FILES = 5


class ImageSet(Protocol):
    """Labelled pictures that can be asked for one at a time, from any process."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; a label is an index into them."""

    @property
    def labels(self) -> tuple[int, ...]:
        """One label a picture."""

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Files that were left out of the set from the start, each with the reason."""

    @property
    def on_unreadable(self) -> OnUnreadable:
        """Whether batches stop at a picture that cannot be opened, or do without it."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """Picture `index`, upright, "RGB" or "L"."""

    def file(self, index: int) -> Path | None:
        """File of picture `index`; None for pictures that come from no file."""

    def order(self, generator: torch.Generator) -> Tensor:
        """Returns (num_images,) int64: the order of an epoch of training."""


class ImageSplits(NamedTuple):
    """The two halves of a data set, over the same classes."""

    train: ImageSet
    val: ImageSet


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Real handwritten digits, 8x8 gray, 10 classes, from scikit-learn: no download.

    1,437 pictures to train on and 360 to test on ("val"), split at random once and for all, in
    equal shares of each class.
    """

    def build(self) -> ImageSplits:
        """Returns the pictures of both splits.

        Raises:
            ImportError: scikit-learn is not installed.
        """
        return ImageSplits(_digits("train"), _digits("val"))


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Any folder `root/{train,val}/class/*.jpg` (or png, webp, ...); classes are folder names."""

    root: Path = Path("data")
    """Folder that holds train/ and val/."""
    on_unreadable: OnUnreadable = "fail"
    """"fail" stops at the first file that cannot be opened and names it; "skip" goes on without it:
    training takes the next readable file of the set, evaluation leaves it out; both list it."""
    max_pixels: int = MAX_PIXELS
    """Largest picture, width times height; a larger one counts as unreadable."""

    def build(self) -> ImageSplits:
        """Returns the pictures of both splits.

        Raises:
            FileNotFoundError: the root, train/ or val/ is missing.
            ValueError: the classes of both disagree, a class is empty, or there are fewer than two.
        """
        train, val = self.open("train"), self.open("val")
        check_classes(self.root, train.class_names, val.class_names)
        return ImageSplits(train, val)

    def open(self, split: Split) -> "FileImages":
        """Returns the pictures of one split.

        Raises:
            FileNotFoundError: the folder is missing.
            ValueError: it holds no class folder, or an empty one.
        """
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"there is no folder {self.root}; wanted one that holds train/CLASS/*.jpg and "
                "val/CLASS/*.jpg"
            )
        folder = self.root / split
        if not folder.is_dir():
            raise FileNotFoundError(
                f"there is no folder {folder}; wanted {folder}/CLASS/*.jpg, one folder a class"
            )
        return open_class_folders(
            folder, on_unreadable=self.on_unreadable, max_pixels=self.max_pixels
        )


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """What sets of images have in common; each adds `image`."""

    labels: tuple[int, ...]
    """One a picture."""
    class_names: tuple[str, ...]
    """Labels are indices into them."""
    unreadable: tuple[str, ...] = ()
    """What was left out of the set from the start, each with the reason."""
    on_unreadable: OnUnreadable = "fail"
    """Whether batches stop at a picture that cannot be opened, or do without it."""

    def __len__(self) -> int:
        return len(self.labels)

    def file(self, index: int) -> Path | None:
        """None: these pictures have no files of their own."""
        return None

    def order(self, generator: torch.Generator) -> Tensor:
        """Returns (num_images,) int64: any order, all equally probable."""
        return torch.randperm(len(self), generator=generator)


@dataclass(frozen=True, kw_only=True)
class FileImages(LabelledImages):
    """Pictures in files."""

    files: tuple[Path, ...]
    max_pixels: int = MAX_PIXELS

    def image(self, index: int) -> Image.Image:
        """Opens picture `index`; `UnreadableImageError` or `FileNotFoundError` name a bad file."""
        return open_image(self.files[index], max_pixels=self.max_pixels)

    def file(self, index: int) -> Path | None:
        """File of picture `index`."""
        return self.files[index]


@dataclass(frozen=True, kw_only=True)
class ArrayImages(LabelledImages):
    """Gray pictures in memory."""

    pixels: NDArray[np.uint8]
    """(num_images, height, width)."""

    def image(self, index: int) -> Image.Image:
        """Picture `index` as "L"."""
        return Image.fromarray(self.pixels[index])


def open_class_folders(
    folder: Path, *, on_unreadable: OnUnreadable = "fail", max_pixels: int = MAX_PIXELS
) -> FileImages:
    """Returns the pictures in `folder/CLASS/*`, classes and files in the order of their names.

    Raises:
        ValueError: there is no class folder, or one without an image.
    """
    class_folders = sorted(
        (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")),
        key=lambda path: path.name,
    )
    if not class_folders:
        raise ValueError(f"{folder} holds no class folders; wanted {folder}/CLASS/*.jpg")
    files: list[Path] = []
    labels: list[int] = []
    for label, class_folder in enumerate(class_folders):
        found = sorted(image_files_in(class_folder), key=lambda path: path.name)
        if not found:
            raise ValueError(
                f"class folder {class_folder} holds no images; add some "
                f"({', '.join(IMAGE_SUFFIXES)}) or remove it"
            )
        files += found
        labels += [label] * len(found)
    return FileImages(
        files=tuple(files),
        labels=tuple(labels),
        class_names=tuple(path.name for path in class_folders),
        on_unreadable=on_unreadable,
        max_pixels=max_pixels,
    )


def open_images(
    data: str | Path,
    *,
    split: Split = "val",
    on_unreadable: OnUnreadable = "fail",
    max_pixels: int = MAX_PIXELS,
) -> ImageSet:
    """Returns the pictures of one split of "digits" or of a folder.

    Args:
        data: "digits"; a folder that holds train/ and val/; or a folder of class folders.
        split: which half is wanted.
        on_unreadable: see `ImageFolder`.
        max_pixels: see `ImageFolder`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no classes, or an empty one.
    """
    if str(data) == "digits":
        return _digits(split)
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; wanted a folder of images, or digits")
    if (root / split).is_dir():
        folder = ImageFolder(root=root, on_unreadable=on_unreadable, max_pixels=max_pixels)
        return folder.open(split)
    return open_class_folders(root, on_unreadable=on_unreadable, max_pixels=max_pixels)


def image_files_in(folder: Path) -> list[Path]:
    """Returns the files in a folder that are named like images, hidden ones left out."""
    return [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and path.is_file()
    ]


def split_readable(
    files: Sequence[Path], *, max_pixels: int = MAX_PIXELS
) -> tuple[list[Path], list[str]]:
    """Returns the files that can be opened and why the others cannot; decodes them all."""

    def reason(path: Path) -> str | None:
        try:
            open_image(path, max_pixels=max_pixels)
        except UnreadableImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as threads:
        reasons = list(threads.map(reason, files))
    readable = [path for path, why in zip(files, reasons, strict=True) if why is None]
    return readable, [why for why in reasons if why is not None]


def check_classes(source: str | Path, train: tuple[str, ...], val: tuple[str, ...]) -> None:
    """Raises ValueError unless both splits have the same classes, at least two."""
    if train != val:
        only_train = _some(sorted(set(train) - set(val)))
        only_val = _some(sorted(set(val) - set(train)))
        differences = [
            f"only in {split}: {names}"
            for split, names in (("train", only_train), ("val", only_val))
            if names
        ] or ["their order differs"]
        raise ValueError(
            f"{source} has {len(train)} classes in train and {len(val)} in val, which must be the "
            f"same ({'; '.join(differences)}); add or remove classes"
        )
    if len(train) < 2:
        raise ValueError(f"{source} holds one class, {train[0]}; wanted at least two")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NUM_NAMED_FILES])
    hidden = len(names) - _NUM_NAMED_FILES
    return f"{shown} and {hidden} more" if hidden > 0 else shown


def _digits(split: Split) -> ArrayImages:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "the handwritten digits need scikit-learn; install it with: pip install "
            "'visionmamba[train]'"
        ) from error
    bunch = load_digits()
    train, val = train_test_split(
        np.arange(len(bunch.target)),
        test_size=_DIGITS_VAL_SHARE,
        stratify=bunch.target,
        random_state=_DIGITS_SPLIT_SEED,
    )
    indices = train if split == "train" else val
    pixels = np.round(bunch.images[indices] * (255 / 16)).astype(np.uint8)  # grey levels 0 to 16
    return ArrayImages(
        pixels=pixels,
        labels=tuple(int(label) for label in bunch.target[indices]),
        class_names=tuple(str(name) for name in bunch.target_names),
    )
