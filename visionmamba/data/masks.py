"""Sets of pictures with masks: what they offer, and reading them from files and from memory.

A mask gives each pixel the index of its class, or `IGNORE`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from visionmamba.data.image_files import (
    MAX_PIXELS,
    UnreadableImageError,
    image_size,
    open_image,
    opened_image,
)
from visionmamba.data.sets import OnUnreadable

IGNORE = 255
"""Value of the pixels that belong to no class: neither trained on nor judged."""

MAX_CLASSES = IGNORE
"""Most classes that a mask of 8 bits can tell apart beside `IGNORE`."""

ProblemKind = Literal[
    "missing mask", "missing image", "wrong size", "class index", "unreadable", "outside"
]

_INDEX_MODES = ("P", "L", "1", "I", "I;16", "I;16L", "I;16B", "I;16N")
_NARROW_GRAY = {"L;2": 85, "L;4": 17}  # what Pillow multiplies gray of 2 and 4 bits by
_UNKNOWN = -1
_NUM_NUMBERS = 256  # that a mask's table of meanings can have


class MaskError(UnreadableImageError):
    """A mask that cannot be used; the message names the file, what is wrong and what to do."""

    def __init__(self, message: str, kind: ProblemKind = "unreadable") -> None:
        super().__init__(message)
        self.kind = kind


class MaskProblem(NamedTuple):
    """What is wrong with one file."""

    kind: ProblemKind
    """In what respect."""
    file: Path
    """Which one."""
    message: str
    """One sentence that names the file and says what to do."""


class SegmentationSet(Protocol):
    """Pictures with masks that can be asked for one at a time, from any process."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; the value of a pixel is an index into them."""

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...] | None:
        """Colours of the classes, 0 to 255, as the set's authors draw them."""

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Files that were left out of the set from the start, each with the reason."""

    @property
    def on_unreadable(self) -> OnUnreadable:
        """Whether batches stop at a picture or mask that cannot be used, or do without it."""

    def __len__(self) -> int: ...

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of picture `index`, without decoding it."""

    def image(self, index: int) -> Image.Image:
        """Picture `index`, upright, "RGB"."""

    def mask(self, index: int) -> NDArray[np.uint8]:
        """(height, width) of picture `index`: class indices and `IGNORE`, nothing else."""

    def file(self, index: int) -> Path | None:
        """File of picture `index`; None for pictures that come from no file."""

    def order(self, generator: torch.Generator) -> Tensor:
        """Returns (num_images,) int64: the order of a pass of training."""


class SegmentationSplits(NamedTuple):
    """The two halves of a data set, over the same classes."""

    train: SegmentationSet
    val: SegmentationSet


@dataclass(frozen=True, kw_only=True)
class FileMasks:
    """Pictures and masks in files of their own."""

    image_files: tuple[Path, ...]
    mask_files: tuple[Path, ...]
    """One a picture: PNG of class numbers, palette or gray."""
    class_names: tuple[str, ...]
    class_of: tuple[int, ...]
    """Index of the class that each number in a mask means, `IGNORE`, or -1 where it means none; at
    most 256, and larger numbers mean none."""
    palette: tuple[tuple[int, int, int], ...] | None = None
    """Colours of the classes."""
    problems: tuple[MaskProblem, ...] = ()
    """What was wrong when the files were listed."""
    on_unreadable: OnUnreadable = "fail"
    """Whether batches stop at a picture or mask that cannot be used, or do without it."""
    max_pixels: int = MAX_PIXELS
    """Largest picture, width times height; a larger one counts as unreadable."""

    def __len__(self) -> int:
        return len(self.image_files)

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Pictures that were left out of the set from the start, each with the reason."""
        return tuple(one.message for one in self.problems if one.kind != "missing image")

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of picture `index`, from the header of its file."""
        return image_size(self.image_files[index], max_pixels=self.max_pixels)

    def image(self, index: int) -> Image.Image:
        """Opens picture `index`; `UnreadableImageError` or `FileNotFoundError` name a bad file."""
        return open_image(self.image_files[index], max_pixels=self.max_pixels).convert("RGB")

    def mask(self, index: int) -> NDArray[np.uint8]:
        """Opens mask `index`.

        Raises:
            FileNotFoundError: there is no such file.
            MaskError: it is no image of class numbers, of another size than its picture, or holds
                a number that means no class.
        """
        file = self.mask_files[index]
        numbers = read_numbers(file, max_pixels=self.max_pixels)
        height, width = self.size(index)
        if numbers.shape != (height, width):
            raise MaskError(
                f"{file} is {numbers.shape[1]}x{numbers.shape[0]} px, its picture "
                f"{self.image_files[index]} {width}x{height}; make both the same size",
                "wrong size",
            )
        return self._classes(numbers, file)

    def file(self, index: int) -> Path | None:
        """File of picture `index`."""
        return self.image_files[index]

    def order(self, generator: torch.Generator) -> Tensor:
        """Returns (num_images,) int64: any order, all equally probable."""
        return torch.randperm(len(self), generator=generator)

    def _classes(self, stored: NDArray[np.integer], file: Path) -> NDArray[np.uint8]:
        table = np.full(_NUM_NUMBERS + 1, _UNKNOWN, dtype=np.int16)
        table[: len(self.class_of)] = self.class_of
        numbers = stored
        if stored.dtype != np.uint8:
            is_small = (stored >= 0) & (stored < _NUM_NUMBERS)
            numbers = np.where(is_small, stored, _NUM_NUMBERS)
        classes = table[numbers]
        unknown = classes == _UNKNOWN
        if unknown.any():
            row, column = (int(place) for place in np.argwhere(unknown)[0])
            known = [number for number, index in enumerate(self.class_of) if index != _UNKNOWN]
            raise MaskError(
                f"{file} holds the number {stored[row, column]} at row {row}, column {column} "
                f"({unknown.sum()} such pixels), which means none of the {len(self.class_names)} "
                f"classes; the numbers with a meaning are {_ranges(known)}: correct the mask or "
                "the list of classes",
                "class index",
            )
        mask: NDArray[np.uint8] = classes.astype(np.uint8)
        return mask


@dataclass(frozen=True, kw_only=True)
class ArrayMasks:
    """Pictures and masks in memory, all of one size."""

    pixels: NDArray[np.uint8]
    """(num_images, height, width, 3), RGB."""
    masks: NDArray[np.uint8]
    """(num_images, height, width): class indices and `IGNORE`."""
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...] | None = None
    """Colours of the classes."""
    unreadable: tuple[str, ...] = ()
    on_unreadable: OnUnreadable = "fail"

    def __post_init__(self) -> None:
        if self.pixels.shape != (*self.masks.shape, 3):
            raise ValueError(
                f"pixels must be (N, H, W, 3) and masks (N, H, W), got {self.pixels.shape} and "
                f"{self.masks.shape}"
            )
        values = np.unique(self.masks)
        if any(len(self.class_names) <= value != IGNORE for value in values):
            raise ValueError(
                f"masks must hold class indices below {len(self.class_names)} or {IGNORE}, got "
                f"{int(values[values != IGNORE].max())}; name all classes"
            )

    def __len__(self) -> int:
        return len(self.masks)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of every picture."""
        return self.masks.shape[1], self.masks.shape[2]

    def image(self, index: int) -> Image.Image:
        """Picture `index`, "RGB"."""
        return Image.fromarray(self.pixels[index])

    def mask(self, index: int) -> NDArray[np.uint8]:
        """(height, width) of picture `index`."""
        mask: NDArray[np.uint8] = self.masks[index]
        return mask

    def file(self, index: int) -> Path | None:
        """None: these pictures come from no files."""
        return None

    def order(self, generator: torch.Generator) -> Tensor:
        """Returns (num_images,) int64: any order, all equally probable."""
        return torch.randperm(len(self), generator=generator)


def check_decoded(image: Image.Image, mask: NDArray[np.uint8], name: str | Path) -> None:
    """Compares sizes once a picture is decoded, as EXIF behind its pixels may turn it only then.

    Raises:
        MaskError: the mask is not as large as the picture; the message calls that by name.
    """
    if mask.shape != (image.height, image.width):
        raise MaskError(
            f"{name} is {image.width}x{image.height} px when it is opened (EXIF may have turned "
            f"it), its mask {mask.shape[1]}x{mask.shape[0]}; make both the same size",
            "wrong size",
        )


def read_numbers(file: Path, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.integer]:
    """Returns (height, width): the numbers that a palette or gray picture holds as they are stored.

    Raises:
        FileNotFoundError: there is no such file.
        MaskError: it is no image, damaged, too large, or holds colours instead of numbers.
    """
    try:
        with opened_image(file, file, max_pixels=max_pixels) as image:
            if image.mode not in _INDEX_MODES:
                raise MaskError(
                    f"{file} holds colours (Pillow's mode {image.mode}), wanted one class number a "
                    "pixel; save it as a palette or gray PNG"
                )
            tiles: Any = getattr(image, "tile", None)
            stored_as = tiles[0].args if tiles else None
            numbers: NDArray[np.integer] = np.asarray(image)
    except MaskError:
        raise
    except UnreadableImageError as error:
        raise MaskError(str(error)) from error
    if numbers.dtype == np.bool_:
        return numbers.astype(np.uint8)
    factor = _NARROW_GRAY.get(stored_as) if isinstance(stored_as, str) else None
    return numbers // factor if factor else numbers


def _ranges(numbers: list[int]) -> str:
    """Returns [0, 1, 2, 255] as "0 to 2, 255"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(
        str(first) if first == last else f"{first} to {last}"
        for first, last in zip(starts, ends, strict=True)
    )
