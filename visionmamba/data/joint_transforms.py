"""From a picture and its mask to the tensors a segmentation model learns from and is judged on."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from visionmamba.data.image_files import MAX_PIXELS, UnreadableImageError
from visionmamba.data.masks import IGNORE
from visionmamba.data.photometric import UNCHANGED, change_colours, draw_colours, uniform
from visionmamba.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RESAMPLING,
    Interpolation,
    check_pixels,
    check_range,
    normalized,
)

_CROP_TRIES = 10  # as in mmsegmentation, whose last try counts whatever it shows


@dataclass(frozen=True, kw_only=True)
class SegmentationAugmentation:
    """Random changes of training; the defaults are those of the published ADE20K training."""

    min_scale: float = 0.5
    """Smallest factor of the resize."""
    max_scale: float = 2.0
    """Largest factor of the resize."""
    max_category_share: float = 0.75
    """A crop is drawn again, up to ten times, when one class has more than this share of its
    pixels that are not ignored; 1 takes the first."""
    flip: float = 0.5
    """Probability of mirroring left and right."""
    photometric: bool = True
    """Whether to change brightness, contrast, saturation and hue, each with probability 1/2 (SSD,
    arXiv 1512.02325)."""

    def __post_init__(self) -> None:
        check_range("min_scale", self.min_scale, 0.01, 100.0)
        check_range("max_scale", self.max_scale, self.min_scale, 100.0)
        check_range("max_category_share", self.max_category_share, 0.01, 1.0)
        check_range("flip", self.flip, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class SegmentationPreprocessing:
    """How a picture becomes a model's input; written into the header of every weights file."""

    crop_size: int | tuple[int, int]
    """Side, or (height, width), in pixels of what training cuts out."""
    short_side: int | None = None
    """Pixels that the shorter side is resized to, in training times the random factor; None leaves
    pictures as large as they are."""
    max_long_side: int | None = None
    """Pixels that the longer side may have then, in training times the random factor; it wins over
    short_side."""
    interpolation: Interpolation = "bilinear"
    """Filter of the resize; masks take the nearest pixel."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted, one a channel, after scaling to 0..1."""
    std: tuple[float, ...] = IMAGENET_STD
    """Divided by, one a channel."""

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"crop_size must be positive, got {self.crop_size}")
        for name in ("short_side", "max_long_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
            if value is not None and value > MAX_PIXELS:
                raise ValueError(f"{name} must be at most {MAX_PIXELS} or None, got more")
        check_pixels(self.interpolation, self.mean, self.std)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of what training cuts out."""
        if isinstance(self.crop_size, int):
            return self.crop_size, self.crop_size
        return self.crop_size

    def evaluation_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns (height, width) that evaluation resizes a picture of that size to.

        Raises:
            UnreadableImageError: it is more than `MAX_PIXELS`, as for a long strip whose short side
                grows.
        """
        resized = self.resized(height, width)
        if resized[0] * resized[1] > max(MAX_PIXELS, height * width):
            raise UnreadableImageError(
                f"a picture of {width}x{height} px would be resized to {resized[1]}x{resized[0]}, "
                f"more than {MAX_PIXELS} pixels; cut it into shorter pieces, or train with "
                "max_long_side"
            )
        return resized

    def resized(self, height: int, width: int, factor: float = 1.0) -> tuple[int, int]:
        """Returns (height, width) of a picture of that size after the resize times a factor."""
        scale = factor
        if self.short_side is not None:
            scale = factor * self.short_side / min(height, width)
        if self.max_long_side is not None:
            scale = min(scale, factor * self.max_long_side / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def build(self, augmentation: SegmentationAugmentation | None = None) -> "JointTransform":
        """Returns the transform of evaluation, or of training when an augmentation is given."""
        return JointTransform(preprocessing=self, augmentation=augmentation)

    def finish(self, pixels: Tensor, sizes: Tensor, colours: Tensor) -> Tensor:
        """Returns a model's input (B, 3, h, w), float32: colours changed, normalised, 0 outside.

        Args:
            pixels: (B, h, w, 3) uint8, on any device.
            sizes: (B, 2) on the CPU: height and width of the picture in the top left corner.
            colours: (B, 5) on the CPU: changes, as in `photometric.UNCHANGED`.
        """
        if pixels.device.type == "cpu" and len(pixels) > 1:  # one by one they stay in its caches
            one_by_one = (slice(i, i + 1) for i in range(len(pixels)))
            return torch.cat([self.finish(pixels[i], sizes[i], colours[i]) for i in one_by_one])
        if bool((colours != torch.tensor(UNCHANGED)).any()):
            images = pixels.permute(0, 3, 1, 2).float().contiguous()
            pixels = change_colours(images, colours.to(pixels.device, non_blocking=True)).permute(
                0, 2, 3, 1
            )
        return normalized(pixels, mean=self.mean, std=self.std, sizes=sizes)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for the header of a weights file."""
        return {
            "crop_size": list(self.size),
            "short_side": self.short_side,
            "max_long_side": self.max_long_side,
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SegmentationPreprocessing":
        """Returns what `to_dict` described.

        Raises:
            ValueError: a key is missing or unknown, or a value is of another type or out of range.
        """
        wanted = {"crop_size", "short_side", "max_long_side", "interpolation", "mean", "std"}
        if set(values) != wanted:
            raise ValueError(
                f"preprocessing of masks needs the keys {', '.join(sorted(wanted))}, got "
                f"{', '.join(sorted(values)) or 'none'}"
            )
        sides = {name: values[name] for name in ("short_side", "max_long_side")}
        try:
            height, width = map(operator.index, values["crop_size"])
            return cls(
                crop_size=(height, width),
                **{k: None if side is None else operator.index(side) for k, side in sides.items()},
                interpolation=values["interpolation"],
                mean=tuple(float(value) for value in values["mean"]),
                std=tuple(float(value) for value in values["std"]),
            )
        except (TypeError, OverflowError) as error:
            raise ValueError(f"preprocessing holds a value of the wrong type: {error}") from None


class Cut(NamedTuple):
    """What training cuts out of a picture, as bytes; `finish` makes a model's input of several."""

    pixels: NDArray[np.uint8]
    """(h, w, 3), 0 at the right and the bottom where the picture is smaller."""
    mask: NDArray[np.uint8]
    """(h, w), there `IGNORE`."""
    size: tuple[int, int]
    """Height and width without that."""
    colours: tuple[float, ...]
    """How they will be changed, as in `photometric.UNCHANGED`."""


class JointTransform:
    """Callable: PIL image and (H, W) mask to float32 (3, h, w) and int64 (h, w).

    In evaluation the image is resized and the mask stays as large as the picture was. In training
    both have crop_size: they are resized by a random factor, cut out, mirrored, changed in colour,
    normalised, and padded at the right and the bottom where they are smaller, the image with 0 and
    the mask with `IGNORE` (published training: mmsegmentation's pipeline for ADE20K). Only the
    pixels that are cut out are ever computed. Random only through torch's global generator.
    """

    def __init__(
        self,
        *,
        preprocessing: SegmentationPreprocessing,
        augmentation: SegmentationAugmentation | None,
    ) -> None:
        self.preprocessing = preprocessing
        self.augmentation = augmentation

    def __call__(
        self, image: Image.Image, mask: NDArray[np.uint8] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the tensors; the second is None where no mask is given.

        Raises:
            ValueError: the mask is not as large as the image, or the image would become too large.
        """
        if self.augmentation is not None:
            cut = self.cut(image, mask)
            pixels = torch.from_numpy(cut.pixels)[None]
            sizes, colours = torch.tensor([cut.size]), torch.tensor([cut.colours])
            changed = self.preprocessing.finish(pixels, sizes, colours)[0]
            return changed, None if mask is None else _as_tensor(cut.mask)
        _check_sizes(image, mask)
        image = image.convert("RGB")
        height, width = self.preprocessing.evaluation_size(image.height, image.width)
        resized = self._resize(image, _Window(height, width, 0, 0, height, width))
        return self._to_tensor(resized), None if mask is None else _as_tensor(mask)

    def cut(self, image: Image.Image, mask: NDArray[np.uint8] | None = None) -> Cut:
        """Returns the picture resized, cut out and mirrored, as bytes; `finish` does the rest.

        Args:
            image: of any mode.
            mask: (H, W); None stands for one of `IGNORE` alone.

        Raises:
            ValueError: the mask is not as large as the image, or this is a transform of evaluation.
        """
        augmentation = self.augmentation
        if augmentation is None:
            raise ValueError("evaluation cuts nothing out; build() with an augmentation")
        _check_sizes(image, mask)
        image = image.convert("RGB")
        factor = uniform(augmentation.min_scale, augmentation.max_scale)
        resized = self.preprocessing.resized(image.height, image.width, factor)
        for _ in range(_CROP_TRIES):
            window = _draw_window(resized, self.preprocessing.size)
            labels = None if mask is None else _cut_mask(mask, window)
            if labels is None or _largest_share(labels) <= augmentation.max_category_share:
                break
        picture = self._resize(image, window)
        if uniform(0, 1) < augmentation.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            labels = None if labels is None else labels[:, ::-1]
        inside = slice(window.height), slice(window.width)
        pixels = np.zeros((*self.preprocessing.size, 3), dtype=np.uint8)
        pixels[inside] = np.asarray(picture)
        padded = np.full(self.preprocessing.size, IGNORE, dtype=np.uint8)
        if labels is not None:
            padded[inside] = labels
        colours = draw_colours() if augmentation.photometric else UNCHANGED
        return Cut(pixels, padded, (window.height, window.width), colours)

    def _resize(self, image: Image.Image, window: "_Window") -> Image.Image:
        down, right = image.height / window.resized_height, image.width / window.resized_width
        box = (
            window.left * right,
            window.top * down,
            min((window.left + window.width) * right, image.width),
            min((window.top + window.height) * down, image.height),
        )
        size = (window.width, window.height)
        if image.size == size and box == (0, 0, *image.size):
            return image
        return image.resize(size, RESAMPLING[self.preprocessing.interpolation], box=box)

    def _to_tensor(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image))[None]
        return normalized(pixels, mean=self.preprocessing.mean, std=self.preprocessing.std)[0]


class _Window(NamedTuple):
    """A rectangle in a picture that was resized."""

    resized_height: int
    resized_width: int
    top: int
    left: int
    height: int
    width: int


def _draw_window(resized: tuple[int, int], crop: tuple[int, int]) -> _Window:
    height, width = min(resized[0], crop[0]), min(resized[1], crop[1])
    top = int(torch.randint(resized[0] - height + 1, ()))
    left = int(torch.randint(resized[1] - width + 1, ()))
    return _Window(*resized, top, left, height, width)


def _cut_mask(mask: NDArray[np.uint8], window: _Window) -> NDArray[np.uint8]:
    """Returns the window of the resized mask: of each pixel the one under its centre."""
    rows = _nearest(mask.shape[0], window.resized_height, window.top, window.height)
    columns = _nearest(mask.shape[1], window.resized_width, window.left, window.width)
    cut: NDArray[np.uint8] = mask[rows][:, columns]
    return cut


def _nearest(length: int, resized: int, start: int, count: int) -> NDArray[np.intp]:
    """Returns (count,): the places in a line under the centres of those in the resized line."""
    places = (2 * np.arange(start, start + count) + 1) * length // (2 * resized)
    return places.astype(np.intp)


def _largest_share(mask: NDArray[np.uint8]) -> float:
    """Returns the share of the commonest class among the pixels that count, 1 where none does."""
    counts = np.bincount(mask.ravel(), minlength=IGNORE + 1)[:IGNORE]
    total = counts.sum()
    return float(counts.max() / total) if total else 1.0


def _check_sizes(image: Image.Image, mask: NDArray[np.uint8] | None) -> None:
    if mask is not None and mask.shape != (image.height, image.width):
        raise ValueError(
            f"the mask is {mask.shape[1]}x{mask.shape[0]} px and the image "
            f"{image.width}x{image.height}; make both the same size"
        )


def _as_tensor(mask: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(mask.astype(np.int64))
