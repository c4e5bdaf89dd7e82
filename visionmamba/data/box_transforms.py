"""From a picture and its objects to the tensors a detector learns from and is judged on."""

import operator
from collections.abc import Mapping
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
from visionmamba.data.object_masks import Counts, decode_mask, mask_box
from visionmamba.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RESAMPLING,
    Interpolation,
    check_pixels,
    check_range,
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
        if (objects.height, objects.width) != (image.height, image.width):
            raise ValueError(
                f"the objects belong to a picture of {objects.width}x{objects.height} px and the "
                f"image has {image.width}x{image.height}; give both of one picture"
            )
        image = image.convert("RGB")
        if self.augmentation is None:
            return self.pixels(image), _own_target(objects)
        window = self._draw(image, self.augmentation)
        pixels = self._pixels(image, window)
        height, width = self.preprocessing.size
        missing = [0, 0, width - window.width, height - window.height]  # left, top, right, bottom
        padded: Tensor = v2.functional.pad(pixels, missing, fill=0.0)
        return padded, _cut_target(objects, window, self.preprocessing.size)

    def pixels(self, image: Image.Image) -> Tensor:
        """Returns a picture, "RGB", as evaluation gives it to the model."""
        resized = self.preprocessing.resized(image.height, image.width)
        window = _Window(resized, 0, 0, *resized, is_mirrored=False, is_upside_down=False)
        return self._pixels(image, window)

    def _draw(self, image: Image.Image, augmentation: DetectionAugmentation) -> "_Window":
        scale = _uniform(augmentation.min_scale, augmentation.max_scale)
        resized = self.preprocessing.resized(image.height, image.width, scale)
        height, width = (min(pair) for pair in zip(resized, self.preprocessing.size, strict=True))
        return _Window(
            resized,
            top=int(torch.randint(resized[0] - height + 1, ())),
            left=int(torch.randint(resized[1] - width + 1, ())),
            height=height,
            width=width,
            is_mirrored=_uniform(0, 1) < augmentation.horizontal_flip,
            is_upside_down=_uniform(0, 1) < augmentation.vertical_flip,
        )

    def _pixels(self, image: Image.Image, window: "_Window") -> Tensor:
        """Returns (3, height, width) of the window, normalised."""
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
        pixels = v2.functional.pil_to_tensor(image)  # (3, h, w) uint8
        scaled = v2.functional.to_dtype(pixels, torch.float32, scale=True)
        mean, std = list(self.preprocessing.mean), list(self.preprocessing.std)
        normalized: Tensor = v2.functional.normalize(scaled, mean, std, inplace=True)
        return normalized


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


def _own_target(objects: Objects) -> DetectionTarget:
    target = _target(objects, slice(None), objects.boxes, objects.areas)
    if objects.masks is not None:
        target["run_lengths"] = objects.masks
    return target


def _cut_target(objects: Objects, window: _Window, size: tuple[int, int]) -> DetectionTarget:
    """Returns what the window leaves of the objects, padded to a size."""
    learnable = np.flatnonzero(~objects.is_crowd)
    if objects.masks is None:
        boxes = _cut_boxes(objects, window)[learnable]
        is_left = np.minimum(*_sides(boxes)) >= _MIN_SIDE_PX
        target = _target(objects, learnable[is_left], boxes[is_left], box_areas(boxes[is_left]))
        target["size"] = size
        return target
    rows, columns = _sources(objects, window)
    patches = [_cut_mask(objects.masks[index], objects, rows, columns) for index in learnable]
    left = [(index, one) for index, one in zip(learnable, patches, strict=True) if one is not None]
    if len(left) * size[0] * size[1] > _MAX_MASK_BYTES:
        raise UnreadableImageError(
            f"image {objects.image_id} shows {len(left)} objects, whose masks of {size[1]}x"
            f"{size[0]} px are more than can be prepared at once; cut it into smaller pictures"
        )
    masks = np.zeros((len(left), *size), dtype=np.uint8)
    boxes = np.zeros((len(left), 4))
    for mask, box, (_, patch) in zip(masks, boxes, left, strict=True):
        height, width = patch.pixels.shape
        mask[patch.top : patch.top + height, patch.left : patch.left + width] = patch.pixels
        box[:] = patch.left, patch.top, patch.left + width, patch.top + height
    kept = np.array([index for index, _ in left], dtype=np.int64)
    areas = np.array([patch.pixels.sum(dtype=np.float64) for _, patch in left])
    target = _target(objects, kept, boxes, areas)
    target["size"] = size
    target["masks"] = torch.from_numpy(masks)
    return target


def _target(
    objects: Objects,
    kept: NDArray[np.int64] | slice,
    boxes: NDArray[np.float64],
    areas: NDArray[np.float64],
) -> DetectionTarget:
    return {
        "boxes": torch.from_numpy(boxes.astype(np.float32)),
        "labels": torch.from_numpy(objects.labels[kept].astype(np.int64)),
        "area": torch.from_numpy(areas.astype(np.float32)),
        "iscrowd": torch.from_numpy(objects.is_crowd[kept].astype(np.int64)),
        "image_id": objects.image_id,
        "size": (objects.height, objects.width),
    }


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


def _sources(objects: Objects, window: _Window) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Returns which row and column of the picture each row and column of the window shows."""
    down, right = objects.height / window.resized[0], objects.width / window.resized[1]
    rows = ((np.arange(window.top, window.top + window.height) + 0.5) * down).astype(np.intp)
    columns = ((np.arange(window.left, window.left + window.width) + 0.5) * right).astype(np.intp)
    return (
        rows[::-1] if window.is_upside_down else rows,
        columns[::-1] if window.is_mirrored else columns,
    )


class _Patch(NamedTuple):
    """What is seen of a mask, without empty rows and columns around it."""

    pixels: NDArray[np.uint8]
    top: int
    left: int


def _cut_mask(
    counts: Counts, objects: Objects, rows: NDArray[np.intp], columns: NDArray[np.intp]
) -> _Patch | None:
    """Returns the pixels of a mask that the rows and columns show, None for none."""
    box = mask_box(counts, objects.height)
    if box is None:
        return None
    left, top, right, bottom = box
    seen_rows = np.flatnonzero((rows >= top) & (rows < bottom))
    seen_columns = np.flatnonzero((columns >= left) & (columns < right))
    mask = decode_mask(counts, objects.height, objects.width)
    pixels = mask[rows[seen_rows]][:, columns[seen_columns]]
    is_row, is_column = pixels.any(axis=1), pixels.any(axis=0)
    if not is_row.any():
        return None
    held_rows, held_columns = np.flatnonzero(is_row), np.flatnonzero(is_column)
    pixels = pixels[held_rows[0] : held_rows[-1] + 1, held_columns[0] : held_columns[-1] + 1]
    return _Patch(pixels, int(seen_rows[held_rows[0]]), int(seen_columns[held_columns[0]]))


def _uniform(low: float, high: float) -> float:
    return float(torch.empty((), dtype=torch.float64).uniform_(low, high))
