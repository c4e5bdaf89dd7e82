"""A drawn set of pictures with objects: discs, squares and triangles, small and very large."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from visionmamba.data.coco import DetectionSplits, Objects
from visionmamba.data.loading import derive_seed
from visionmamba.data.object_masks import encode_mask, mask_area, mask_box
from visionmamba.data.sets import OnUnreadable

CLASS_NAMES = ("disc", "square", "triangle")

_COLOURS = ((205, 90, 70), (85, 175, 95), (80, 115, 215))  # around which objects vary, by class
_COLOUR_SPREAD = 25.0
_RADII = (0.08, 0.22)  # of the side of the picture
_LARGE_RADII = (0.4, 0.56)
_LARGE_SHARE = 0.5  # of the picture's area that the box of a large object is beyond
_MIN_SEEN = 0.4  # of an object's area; what others cover more of is not drawn
_MIN_AREA_PX = 9
_NOISE = 14.0
_TRAIN, _VAL = 0, 1  # so that the seeds of both splits never meet


@dataclass(frozen=True, kw_only=True)
class DrawnObjects:
    """Drawn pictures of discs, squares and triangles with boxes and masks: no download.

    Each kind has a colour that varies around one of its own, any size and rotation; nearer ones
    cover others, whose masks and boxes end there; the ground is gray, sloping and noisy. A share of
    the pictures shows one object whose box is larger than half of the picture, behind the others.
    A small detector learns it in minutes on a CPU.
    """

    num_train: int = 256
    """Pictures to learn from."""
    num_val: int = 64
    """Pictures to judge on."""
    image_size: int = 64
    """Side in pixels."""
    max_objects: int = 3
    """Most objects of a picture that are not large."""
    large_share: float = 0.25
    """Share of the pictures with a large object, spread evenly."""
    empty_share: float = 0.0
    """Share of the pictures with no object at all, spread evenly."""
    seed: int = 0
    """Of everything that is drawn."""
    shuffled: bool = False
    """Whether training pictures get the objects of others, so that there is nothing to learn: what
    a model reaches then comes from elsewhere than the pictures."""

    def __post_init__(self) -> None:
        for name, least in (
            ("num_train", 2), ("num_val", 1), ("image_size", 32), ("max_objects", 1), ("seed", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("large_share", "empty_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name):g}")

    def build(self) -> DetectionSplits:
        """Returns the pictures of both splits, drawn from the seed alone."""
        return DetectionSplits(self.open("train"), self.open("val"))

    def open(self, split: str) -> "ArrayObjects":
        """Returns the pictures of "train" or "val"; ValueError for another split."""
        if split not in ("train", "val"):
            raise ValueError(f"the drawn objects have the splits train and val, got {split}")
        is_train = split == "train"
        count = self.num_train if is_train else self.num_val
        drawn = [
            self._draw(derive_seed(self.seed, _TRAIN if is_train else _VAL, number), number)
            for number in range(count)
        ]
        objects = [found for _, found in drawn]
        if is_train and self.shuffled:
            objects = objects[-1:] + objects[:-1]
        return ArrayObjects(
            pixels=np.stack([pixels for pixels, _ in drawn]),
            found=tuple(objects),
            class_names=CLASS_NAMES,
        )

    def _draw(self, seed: int, number: int) -> tuple[NDArray[np.uint8], Objects]:
        generator = np.random.default_rng(seed)
        side = self.image_size
        rows, columns = np.mgrid[:side, :side] + 0.5
        canvas = _Canvas(generator, rows, columns)
        if not _is_next(number + 1, self.empty_share):
            if _is_next(number, self.large_share):
                canvas.add_large()
            for _ in range(generator.integers(1, self.max_objects + 1)):
                canvas.add(generator.uniform(*_RADII))
        return canvas.pixels(), canvas.objects(number)


@dataclass(frozen=True, kw_only=True)
class ArrayObjects:
    """Pictures with objects in memory, all of one size."""

    pixels: NDArray[np.uint8]
    """(num_images, height, width, 3), RGB."""
    found: tuple[Objects, ...]
    """One a picture; all with masks or none."""
    class_names: tuple[str, ...]
    unreadable: tuple[str, ...] = ()
    on_unreadable: OnUnreadable = "fail"

    def __post_init__(self) -> None:
        sizes = {(one.height, one.width) for one in self.found}
        if len(self.pixels) != len(self.found) or sizes != {self.pixels.shape[1:3]}:
            raise ValueError(
                f"pixels must be (N, H, W, 3) with objects of N pictures of that size, got "
                f"{self.pixels.shape} and {len(self.found)} of {sorted(sizes)}"
            )

    def __len__(self) -> int:
        return len(self.found)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """1, 2, ...: as the labels."""
        return tuple(range(1, len(self.class_names) + 1))

    @property
    def has_masks(self) -> bool:
        """Whether objects have masks."""
        return self.found[0].masks is not None

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of every picture."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def image(self, index: int) -> Image.Image:
        """Picture `index`, "RGB"."""
        return Image.fromarray(self.pixels[index])

    def objects(self, index: int) -> Objects:
        """What is in picture `index`."""
        return self.found[index]

    def file(self, index: int) -> Path | None:
        """None: these pictures come from no files."""
        return None

    def order(self, generator: torch.Generator) -> Tensor:
        """Returns (num_images,) int64: any order, all equally probable."""
        return torch.randperm(len(self), generator=generator)


class _Canvas:
    """A picture on which each object covers those before."""

    def __init__(
        self,
        generator: np.random.Generator,
        rows: NDArray[np.float64],
        columns: NDArray[np.float64],
    ) -> None:
        self._generator = generator
        self._rows, self._columns = rows, columns
        self._side = len(rows)
        slope = generator.uniform(-40, 40, 2) / self._side
        gray = generator.uniform(90, 170) + slope[0] * (rows - self._side / 2)
        gray += slope[1] * (columns - self._side / 2)
        self._colours = np.repeat(gray[..., None], 3, axis=2)
        self._owner = np.zeros(rows.shape, dtype=np.int64)  # 0 is the ground
        self._kinds: list[int] = []
        self._whole_areas: list[int] = []
        self._has_large = False

    def add_large(self) -> None:
        """Draws an object whose box is larger than half of the picture."""
        while True:
            kind, inside, along = self._shape(self._generator.uniform(*_LARGE_RADII), spread=0.1)
            if _is_large(inside):
                self._paint(kind, inside, along)
                self._has_large = True
                return

    def add(self, radius: float) -> None:
        """Draws an object of a radius in sides of the picture, unless it covers another.

        Nor does it leave less of a large one than a box larger than half of the picture.
        """
        kind, inside, along = self._shape(radius, spread=0.4)
        left = np.bincount(self._owner[~inside], minlength=len(self._kinds) + 1)[1:]
        if inside.sum() < _MIN_AREA_PX or any(
            seen < _MIN_SEEN * whole for seen, whole in zip(left, self._whole_areas, strict=True)
        ):
            return
        if self._has_large and not _is_large((self._owner == 1) & ~inside):
            return
        self._paint(kind, inside, along)

    def pixels(self) -> NDArray[np.uint8]:
        """Returns (side, side, 3)."""
        noisy = self._colours + self._generator.normal(0, _NOISE, self._colours.shape)
        return np.clip(noisy, 0, 255).round().astype(np.uint8)

    def objects(self, image_id: int) -> Objects:
        """Returns what is seen of each object."""
        masks = tuple(encode_mask(self._owner == owner + 1) for owner in range(len(self._kinds)))
        boxes = [mask_box(counts, self._side) for counts in masks]
        return Objects(
            image_id=image_id,
            height=self._side,
            width=self._side,
            boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
            labels=np.array(self._kinds, dtype=np.int64) + 1,
            is_crowd=np.zeros(len(masks), dtype=np.bool_),
            areas=np.array([mask_area(counts) for counts in masks], dtype=np.float64),
            masks=masks,
        )

    def _shape(
        self, radius: float, *, spread: float
    ) -> tuple[int, NDArray[np.bool_], NDArray[np.float64]]:
        """Returns kind, pixels inside, and a coordinate along which the colour varies."""
        kind = int(self._generator.integers(len(_INSIDE)))
        row, column = self._side * self._generator.uniform(0.5 - spread, 0.5 + spread, 2)
        angle = self._generator.uniform(0, 2 * np.pi)
        down = (self._rows - row) / (radius * self._side)
        right = (self._columns - column) / (radius * self._side)
        along = np.cos(angle) * right + np.sin(angle) * down
        across = np.cos(angle) * down - np.sin(angle) * right
        return kind, _INSIDE[kind](along, across), along

    def _paint(self, kind: int, inside: NDArray[np.bool_], along: NDArray[np.float64]) -> None:
        spread = self._generator.uniform(-_COLOUR_SPREAD, _COLOUR_SPREAD, 3)
        self._colours[inside] = (spread + _COLOURS[kind]) * (1 + 0.15 * along[inside, None])
        self._kinds.append(kind)
        self._whole_areas.append(int(inside.sum()))
        self._owner[inside] = len(self._kinds)


def _is_large(seen: NDArray[np.bool_]) -> bool:
    """Whether the box of what is seen is larger than half of the picture."""
    height = np.ptp(np.flatnonzero(seen.any(axis=1))) + 1
    width = np.ptp(np.flatnonzero(seen.any(axis=0))) + 1
    return bool(height * width > _LARGE_SHARE * seen.size)


def _is_next(number: int, share: float) -> bool:
    """Whether the number is one of those that spread a share evenly."""
    return int((number + 1) * share) > int(number * share)


_INSIDE: tuple[Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]], ...] = (
    lambda along, across: along**2 + across**2 < 1,
    lambda along, across: np.maximum(abs(along), abs(across)) < 0.85,
    lambda along, across: (along > -0.6) & (along + 1.732 * abs(across) < 1.2),
)
"""Of each kind of object whether points are inside, in coordinates turned with it, radius 1."""
