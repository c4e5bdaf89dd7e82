"""From a picture and its objects to the tensors a detector learns from and is judged on."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from visionmamba.data.coco import Objects, box_areas
from visionmamba.data.image_files import UnreadableImageError
from visionmamba.data.object_masks import Counts, column_runs, draw_runs
from visionmamba.data.photometric import uniform
from visionmamba.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RESAMPLING,
    Interpolation,
    check_pixels,
    check_range,
    normalized,
)

_MAX_MASK_BYTES = 4 * 1024**3  # of what one prepared picture shows
_MIN_SIDE_PX = 1.0  # of a box that is still learned after the cut


class DetectionTarget(TypedDict):
    """What is in one picture, as torchvision's detectors take it."""

    boxes: Tensor
    """(n, 4) float32: left, top, right, bottom in pixels."""
    labels: Tensor
    """(n,) int64, from 1."""
    area: Tensor
    """(n,) float32: pixels of each object."""
    iscrowd: Tensor
    """(n,) int64, 0 or 1; 0 throughout in training."""
    image_id: int
    """Number of the picture, as its annotation file counts."""
    size: tuple[int, int]
    """(height, width) of the picture that boxes and masks belong to: in training the cut, in
    evaluation the picture in its file, however large the tensor is."""
    masks: NotRequired[Tensor]
    """(n, height, width) uint8; in training, where the set has masks."""
    run_lengths: NotRequired[tuple[Counts, ...]]
    """The masks as run lengths; in evaluation, where the set has masks."""


@dataclass(frozen=True, kw_only=True)
class DetectionAugmentation:
    """Random changes of training; the defaults are large-scale jitter as published (ViTDet)."""

    min_scale: float = 0.1
    """Smallest size of the picture, relative to what just fits into image_size."""
    max_scale: float = 2.0
    """Largest size of the picture, relative to what just fits."""
    horizontal_flip: float = 0.5
    """Probability of mirroring left and right."""
    vertical_flip: float = 0.0
    """Probability of mirroring top and bottom, for pictures that have none."""

    def __post_init__(self) -> None:
        check_range("min_scale", self.min_scale, 0.01, 100.0)
        check_range("max_scale", self.max_scale, self.min_scale, 100.0)
        check_range("horizontal_flip", self.horizontal_flip, 0.0, 1.0)
        check_range("vertical_flip", self.vertical_flip, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class DetectionPreprocessing:
    """How a picture becomes a model's input; written into the header of every weights file."""

    image_size: int | tuple[int, int] = 1024
    """Side, or (height, width), in pixels of what training cuts out; in evaluation pictures are
    resized to just fit into it."""
    interpolation: Interpolation = "bilinear"
    """Filter of the resize; masks take the nearest pixel."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted, one a channel, after scaling to 0..1."""
    std: tuple[float, ...] = IMAGENET_STD
    """Divided by, one a channel."""

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"image_size must be positive, got {self.image_size}")
        check_pixels(self.interpolation, self.mean, self.std)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels that pictures are fitted into."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size

    def resized(self, height: int, width: int, scale: float = 1.0) -> tuple[int, int]:
        """Returns (height, width) of a picture of that size when it just fits, times a scale."""
        factor = scale * min(self.size[0] / height, self.size[1] / width)
        return max(1, round(height * factor)), max(1, round(width * factor))

    def build(self, augmentation: DetectionAugmentation | None = None) -> "BoxTransform":
        """Returns the transform of evaluation, or of training when an augmentation is given."""
        return BoxTransform(preprocessing=self, augmentation=augmentation)

    def finish(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Returns a model's input (B, 3, h, w), float32: normalised, 0 outside of the pictures.

        Args:
            pixels: (B, h, w, 3) uint8, on any device.
            sizes: (B, 2) on any device: height and width of the picture in the top left corner.
        """
        return normalized(pixels, mean=self.mean, std=self.std, sizes=sizes)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for the header of a weights file."""
        return {
            "image_size": list(self.size),
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DetectionPreprocessing":
        """Returns what `to_dict` described.

        Raises:
            ValueError: a key is missing or unknown, or a value is of another type or out of range.
        """
        wanted = {"image_size", "interpolation", "mean", "std"}
        if set(values) != wanted:
            raise ValueError(
                f"preprocessing of detection needs the keys {', '.join(sorted(wanted))}, got "
                f"{', '.join(sorted(values)) or 'none'}"
            )
        try:
            height, width = map(operator.index, values["image_size"])
            return cls(
                image_size=(height, width),
                interpolation=values["interpolation"],
                mean=tuple(float(value) for value in values["mean"]),
                std=tuple(float(value) for value in values["std"]),
            )
        except (TypeError, OverflowError) as error:
            raise ValueError(f"preprocessing holds a value of the wrong type: {error}") from None


class CutObjects(NamedTuple):
    """Objects as far as a cut shows them; crowds, and those of which nothing is left, are not."""

    boxes: NDArray[np.float32]
    """(n, 4): left, top, right, bottom in pixels of the cut."""
    labels: NDArray[np.int64]
    """(n,), from 1."""
    areas: NDArray[np.float32]
    """(n,): pixels of each object."""
    runs: NDArray[np.int64] | None
    """Their masks as `draw_runs` takes them; None where the set has boxes only."""
    image_id: int
    """Number of the picture, as its annotation file counts."""


class ObjectCut(NamedTuple):
    """What training cuts out of a picture, as bytes and runs."""

    pixels: NDArray[np.uint8]
    """(h, w, 3), 0 at the right and the bottom where the picture is smaller."""
    size: tuple[int, int]
    """Height and width without that."""
    objects: CutObjects


class BoxTransform:
    """Callable: PIL image and its objects to float32 (3, h, w) and `DetectionTarget`.

    In evaluation the image is resized to fit, and the target keeps the picture's own pixels. In
    training both are resized by a random factor, cut to image_size at a random place, mirrored, and
    the image is normalised and padded with 0 at the right and the bottom where it is smaller
    (large-scale jitter, arXiv 2012.07177). Boxes are drawn anew around what the cut left of the
    masks; objects of which nothing is left, and crowds, are left out. Only what is cut out is ever
    computed. Random only through torch's global generator.
    """

    def __init__(
        self,
        *,
        preprocessing: DetectionPreprocessing,
        augmentation: DetectionAugmentation | None,
    ) -> None:
        self.preprocessing = preprocessing
        self.augmentation = augmentation

    def __call__(self, image: Image.Image, objects: Objects) -> tuple[Tensor, DetectionTarget]:
        """Returns the tensors.

        Raises:
            ValueError: the objects belong to a picture of another size.
        """
        if self.augmentation is None:
            _check_size(image, objects)
            return self.pixels(_as_rgb(image)), _own_target(objects)
        cut = self.cut(image, objects)
        found, size = cut.objects, self.preprocessing.size
        boxes, labels, areas = map(torch.from_numpy, (found.boxes, found.labels, found.areas))
        masks = None
        if found.runs is not None:
            masks = draw_runs(torch.from_numpy(found.runs), len(labels), size)
        pixels = torch.from_numpy(cut.pixels)[None]
        return (
            self.preprocessing.finish(pixels, torch.tensor([cut.size]))[0],
            learned_target(boxes, labels, areas, masks, image_id=found.image_id, size=size),
        )

    def cut(self, image: Image.Image, objects: Objects) -> ObjectCut:
        """Returns what `__call__` makes tensors of; for training alone.

        Raises:
            ValueError: the objects belong to a picture of another size, or the transform is one of
                evaluation.
        """
        if self.augmentation is None:
            raise ValueError("evaluation cuts nothing out; build() with an augmentation")
        _check_size(image, objects)
        window = self._draw(image, self.augmentation)
        size = self.preprocessing.size
        resized = self._resized(_as_rgb(image), window)
        pixels = np.zeros((*size, 3), dtype=np.uint8)
        pixels[: window.height, : window.width] = np.asarray(resized)
        return ObjectCut(pixels, (window.height, window.width), _cut_objects(objects, window, size))

    def pixels(self, image: Image.Image) -> Tensor:
        """Returns a picture, "RGB", as evaluation gives it to the model."""
        resized = self.preprocessing.resized(image.height, image.width)
        window = _Window(resized, 0, 0, *resized, is_mirrored=False, is_upside_down=False)
        pixels = v2.functional.pil_to_tensor(self._resized(image, window))  # (3, h, w) uint8
        scaled = v2.functional.to_dtype(pixels, torch.float32, scale=True)
        mean, std = list(self.preprocessing.mean), list(self.preprocessing.std)
        normalized: Tensor = v2.functional.normalize(scaled, mean, std, inplace=True)
        return normalized

    def _draw(self, image: Image.Image, augmentation: DetectionAugmentation) -> "_Window":
        scale = uniform(augmentation.min_scale, augmentation.max_scale)
        resized = self.preprocessing.resized(image.height, image.width, scale)
        height, width = (min(pair) for pair in zip(resized, self.preprocessing.size, strict=True))
        return _Window(
            resized,
            top=int(torch.randint(resized[0] - height + 1, ())),
            left=int(torch.randint(resized[1] - width + 1, ())),
            height=height,
            width=width,
            is_mirrored=uniform(0, 1) < augmentation.horizontal_flip,
            is_upside_down=uniform(0, 1) < augmentation.vertical_flip,
        )

    def _resized(self, image: Image.Image, window: "_Window") -> Image.Image:
        """Returns what the window shows."""
        down, right = image.height / window.resized[0], image.width / window.resized[1]
        box = (
            window.left * right,
            window.top * down,
            min((window.left + window.width) * right, image.width),
            min((window.top + window.height) * down, image.height),
        )
        size = (window.width, window.height)
        if image.size != size or box != (0, 0, *image.size):
            image = image.resize(size, RESAMPLING[self.preprocessing.interpolation], box=box)
        if window.is_mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if window.is_upside_down:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return image


def learned_target(
    boxes: Tensor,
    labels: Tensor,
    areas: Tensor,
    masks: Tensor | None,
    *,
    image_id: int,
    size: tuple[int, int],
) -> DetectionTarget:
    """Returns what training learns of one cut of a size; every tensor on one device."""
    target: DetectionTarget = {
        "boxes": boxes,
        "labels": labels,
        "area": areas,
        "iscrowd": torch.zeros_like(labels),
        "image_id": image_id,
        "size": size,
    }
    if masks is not None:
        target["masks"] = masks
    return target


class _Window(NamedTuple):
    """A rectangle in a picture that was resized, possibly mirrored."""

    resized: tuple[int, int]
    """(height, width) of the whole picture."""
    top: int
    left: int
    height: int
    width: int
    is_mirrored: bool
    is_upside_down: bool


def _check_size(image: Image.Image, objects: Objects) -> None:
    if (objects.height, objects.width) != (image.height, image.width):
        raise ValueError(
            f"the objects belong to a picture of {objects.width}x{objects.height} px and the "
            f"image has {image.width}x{image.height}; give both of one picture"
        )


def _as_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _own_target(objects: Objects) -> DetectionTarget:
    target: DetectionTarget = {
        "boxes": torch.from_numpy(objects.boxes.astype(np.float32)),
        "labels": torch.from_numpy(objects.labels.astype(np.int64)),
        "area": torch.from_numpy(objects.areas.astype(np.float32)),
        "iscrowd": torch.from_numpy(objects.is_crowd.astype(np.int64)),
        "image_id": objects.image_id,
        "size": (objects.height, objects.width),
    }
    if objects.masks is not None:
        target["run_lengths"] = objects.masks
    return target


def _cut_objects(objects: Objects, window: _Window, size: tuple[int, int]) -> CutObjects:
    """Returns what the window leaves of the objects; runs are those of masks of a size."""
    learnable = np.flatnonzero(~objects.is_crowd)
    runs = None
    if objects.masks is None:
        boxes = _cut_boxes(objects, window)[learnable]
        is_left = np.minimum(*_sides(boxes)) >= _MIN_SIDE_PX
        kept, boxes = learnable[is_left], boxes[is_left]
        areas = box_areas(boxes)
    else:
        number, column, top, bottom = _cut_runs(
            [objects.masks[index] for index in learnable], objects, window
        )
        firsts = np.flatnonzero(np.diff(number, prepend=-1))  # run of each object that is left
        if len(firsts) * size[0] * size[1] > _MAX_MASK_BYTES:
            raise UnreadableImageError(
                f"image {objects.image_id} shows {len(firsts)} objects, whose masks of {size[1]}x"
                f"{size[0]} px are more than can be prepared at once; cut it into smaller pictures"
            )
        kept = learnable[number[firsts]]
        sides = np.minimum, np.minimum, np.maximum, np.maximum
        ends = column, top, column + 1, bottom
        edges = [side.reduceat(end, firsts) for side, end in zip(sides, ends, strict=True)]
        boxes = np.stack(edges, axis=1)
        areas = np.add.reduceat(bottom - top, firsts)
        place = np.repeat(np.arange(len(firsts)), np.diff(firsts, append=len(number)))
        runs = np.stack([(place * size[0] + top) * size[1] + column, bottom - top])
    return CutObjects(
        boxes=boxes.astype(np.float32),
        labels=objects.labels[kept].astype(np.int64),
        areas=areas.astype(np.float32),
        runs=runs,
        image_id=objects.image_id,
    )


def _cut_boxes(objects: Objects, window: _Window) -> NDArray[np.float64]:
    """Returns (n, 4): boxes as far as the window shows them, in its pixels."""
    right, down = window.resized[1] / objects.width, window.resized[0] / objects.height
    boxes = objects.boxes * (right, down, right, down)
    boxes = boxes - (window.left, window.top, window.left, window.top)
    boxes = boxes.clip(0, (window.width, window.height, window.width, window.height))
    if window.is_mirrored:
        boxes[:, [0, 2]] = window.width - boxes[:, [2, 0]]
    if window.is_upside_down:
        boxes[:, [1, 3]] = window.height - boxes[:, [3, 1]]
    return boxes


def _sides(boxes: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]


def _cut_runs(
    masks: Sequence[Counts], objects: Objects, window: _Window
) -> tuple[NDArray[np.int64], ...]:
    """Returns which mask, column, top and bottom each run down a column of the window has."""
    number, column, top, bottom = column_runs(masks, objects.height, objects.width)
    # of each row of the picture, and of the one behind: the window's first row that shows it
    first_rows, first_columns = _first_places(objects, window)
    top, bottom = first_rows[top], first_rows[bottom]
    left = first_columns[column]
    nums = np.where(top < bottom, first_columns[column + 1] - left, 0)
    run = np.repeat(np.arange(len(nums)), nums)
    column = left[run] + np.arange(len(run)) - (np.cumsum(nums) - nums)[run]
    number, top, bottom = number[run], top[run], bottom[run]
    if window.is_mirrored:
        column = window.width - 1 - column
    if window.is_upside_down:
        top, bottom = window.height - bottom, window.height - top
    return number, column, top, bottom


def _first_places(objects: Objects, window: _Window) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the window's first row and column that show each of the picture, or a later one."""
    down, right = objects.height / window.resized[0], objects.width / window.resized[1]
    rows = ((np.arange(window.top, window.top + window.height) + 0.5) * down).astype(np.int64)
    columns = ((np.arange(window.left, window.left + window.width) + 0.5) * right).astype(np.int64)
    return (
        np.searchsorted(rows, np.arange(objects.height + 1)),
        np.searchsorted(columns, np.arange(objects.width + 1)),
    )
