"""From a picture to the tensor a model reads: fixed preparation, and training's random changes."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from visionmamba.data.erasing import NOTHING, Rectangle, draw_rectangle, erase
from visionmamba.data.photometric import uniform

Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]
Channels = Literal["RGB", "L"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_RAND_AUGMENT = re.compile(
    r"rand(-(m\d+|n\d+|p\d+(\.\d+)?|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(weights|3aw?)))*"
)
_TRANSLATION_SHARE = 0.45  # of the shorter side, RandAugment's largest shift in timm
RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of the training pictures; the defaults change nothing."""

    min_crop_area: float = 1.0
    """Smallest share of the picture's area that a random crop keeps; 1 crops as in evaluation."""
    horizontal_flip: bool = False
    """Mirror left and right with probability 1/2."""
    rotation_degrees: float = 0.0
    """Largest rotation to either side."""
    translation: float = 0.0
    """Largest shift, as a share of each side."""
    zoom: float = 0.0
    """Largest change of scale: 0.1 draws it from 0.9 to 1.1."""
    auto_augment: str | None = None
    """RandAugment (arXiv 1909.13719) in timm's words: "rand-m9-mstd0.5-inc1" is that of DeiT."""
    color_jitter: float = 0.0
    """Largest change of brightness, contrast and saturation, as a share; as in timm it is ignored
    beside auto_augment."""
    erase_probability: float = 0.0
    """Share of the pictures in which a rectangle becomes noise, after normalisation (random
    erasing, arXiv 1708.04896, "pixel")."""
    repeats: int = 1
    """How often a chosen picture comes up in an epoch, each time changed anew (repeated
    augmentation, arXiv 1901.09335); an epoch has as many samples as without."""

    def __post_init__(self) -> None:
        check_range("min_crop_area", self.min_crop_area, 0.01, 1.0)
        check_range("rotation_degrees", self.rotation_degrees, 0.0, 180.0)
        check_range("translation", self.translation, 0.0, 1.0)
        check_range("zoom", self.zoom, 0.0, 0.9)
        check_range("color_jitter", self.color_jitter, 0.0, 1.0)
        check_range("erase_probability", self.erase_probability, 0.0, 1.0)
        if self.auto_augment is not None and not _RAND_AUGMENT.fullmatch(self.auto_augment):
            raise ValueError(
                "auto_augment must be a RandAugment in timm's words, as rand-m9-mstd0.5-inc1, got "
                f"{self.auto_augment!r}"
            )
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")

    @property
    def moves(self) -> bool:
        """Whether any rotation, shift or change of scale is asked for."""
        return bool(self.rotation_degrees or self.translation or self.zoom)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes a model's input; written into the header of every weights file."""

    image_size: int | tuple[int, int]
    """Side, or (height, width), of the tensor in pixels."""
    crop_fraction: float = 0.875
    """Share of the resized picture that the centred crop keeps along its tighter side."""
    interpolation: Interpolation = "bicubic"
    """Filter of the resize."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted, one a channel, after scaling to 0..1."""
    std: tuple[float, ...] = IMAGENET_STD
    """Divided by, one a channel."""
    channels: Channels = "RGB"
    """"RGB" for three channels, "L" for one gray channel."""

    def __post_init__(self) -> None:
        height, width = self.size
        if height < 1 or width < 1:
            raise ValueError(f"image_size must be positive, got {self.image_size}")
        check_range("crop_fraction", self.crop_fraction, 0.01, 1.0)
        if self.interpolation not in RESAMPLING:
            raise ValueError(
                f"interpolation must be one of {', '.join(RESAMPLING)}, got {self.interpolation!r}"
            )
        if self.channels not in get_args(Channels):
            raise ValueError(f"channels must be RGB or L, got {self.channels!r}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.num_channels:
                raise ValueError(
                    f"{name} needs {self.num_channels} values for channels={self.channels!r}, "
                    f"got {len(values)}"
                )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size

    @property
    def num_channels(self) -> int:
        """Channels of the tensor: 3 for "RGB", 1 for "L"."""
        return 3 if self.channels == "RGB" else 1

    def build(self, augmentation: Augmentation | None = None) -> "ImageTransform":
        """Returns the transform of evaluation, or of training when an augmentation is given."""
        return ImageTransform(preprocessing=self, augmentation=augmentation)

    def finish(
        self, pixels: Tensor, erased: Sequence[Rectangle], noise_seeds: Sequence[int]
    ) -> Tensor:
        """Returns a model's input (B, C, H, W), float32: normalised, then erased.

        Args:
            pixels: (B, H, W, C) uint8, on any device.
            erased, noise_seeds: B of each, as in `Changed`.
        """
        images = normalized(pixels, mean=self.mean, std=self.std)
        return erase(images, erased, noise_seeds)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for the header of a weights file."""
        return {
            "image_size": list(self.size),
            "crop_fraction": self.crop_fraction,
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
            "channels": self.channels,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """Returns what `to_dict` described.

        Raises:
            ValueError: a key is missing or unknown, or a value is of another type or out of range.
        """
        wanted = {"image_size", "crop_fraction", "interpolation", "mean", "std", "channels"}
        if set(values) != wanted:
            raise ValueError(
                f"preprocessing needs the keys {', '.join(sorted(wanted))}, got "
                f"{', '.join(sorted(values)) or 'none'}"
            )
        try:
            height, width = values["image_size"]
            return cls(
                image_size=(int(height), int(width)),
                crop_fraction=float(values["crop_fraction"]),
                interpolation=values["interpolation"],
                mean=tuple(float(value) for value in values["mean"]),
                std=tuple(float(value) for value in values["std"]),
                channels=values["channels"],
            )
        except (TypeError, OverflowError) as error:
            raise ValueError(f"preprocessing holds a value of the wrong type: {error}") from None


class Changed(NamedTuple):
    """A picture of training as bytes; `Preprocessing.finish` makes a model's input of several."""

    pixels: NDArray[np.uint8]
    """(H, W, C), cut out, mirrored, its colours changed."""
    erased: Rectangle
    """What will become noise."""
    noise_seed: int
    """What that follows from."""


class ImageTransform:
    """Callable: PIL image to float32 (C, H, W).

    Random only through the global generators of torch, numpy and Python's random.
    """

    def __init__(self, *, preprocessing: Preprocessing, augmentation: Augmentation | None) -> None:
        self.preprocessing = preprocessing
        self._crop = _random_crop(preprocessing, augmentation)
        self._changes = _random_changes(preprocessing, augmentation)
        self._erase_probability = 0.0 if augmentation is None else augmentation.erase_probability
        self.draws_beyond_torch = augmentation is not None and bool(augmentation.auto_augment)
        """Whether numpy's and Python's generators are drawn from too: timm's changes do."""

    def __call__(self, image: Image.Image) -> Tensor:
        changed = self.change(image)
        pixels = torch.from_numpy(changed.pixels)[None]
        return self.preprocessing.finish(pixels, [changed.erased], [changed.noise_seed])[0]

    def change(self, image: Image.Image) -> Changed:
        """Returns the picture cut out and changed, as bytes; `finish` normalises and erases."""
        if image.mode != self.preprocessing.channels:
            image = image.convert(self.preprocessing.channels)
        image = self._crop(image) if self._crop else _centred_crop(image, self.preprocessing)
        for change in self._changes:
            image = change(image)
        erased, noise_seed = NOTHING, 0
        if self._erase_probability and uniform(0, 1) < self._erase_probability:
            erased = draw_rectangle(self.preprocessing.size)
            noise_seed = int(torch.randint(2**62, ()))
        pixels = np.array(image)  # a copy, as torch wants memory that it may write to
        return Changed(pixels.reshape(*pixels.shape[:2], -1), erased, noise_seed)


def normalized(
    pixels: Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    sizes: Tensor | None = None,
) -> Tensor:
    """Returns a model's input (B, C, H, W), float32, for pixels (B, H, W, C) in 0..255.

    Args:
        pixels: uint8, or float32 that may be written to, on any device.
        mean, std: one a channel, of pixels in 0..1.
        sizes: (B, 2) on any device: height and width of the picture in the top left corner, outside
            of which the input is 0; None where pictures fill theirs.
    """
    device = pixels.device
    shift, scale = (
        torch.tensor(values).view(-1, 1, 1).to(device, non_blocking=True) for values in (mean, std)
    )
    images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    images = images.mul_(1 / 255).sub_(shift).div_(scale)
    if sizes is None:
        return images
    heights, widths = sizes.to(device, non_blocking=True).view(-1, 2, 1, 1).unbind(1)
    rows, columns = (torch.arange(side, device=device) for side in images.shape[2:])
    is_outside = (rows[:, None] >= heights) | (columns >= widths)
    return images.masked_fill_(is_outside[:, None], 0.0)


def restore_image(image: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Image.Image:
    """Returns the picture, "RGB", that became (3, H, W) when mean and std were taken out."""
    channels = torch.tensor(std)[:, None, None], torch.tensor(mean)[:, None, None]
    pixels = (image.detach().float().cpu() * channels[0] + channels[1]).clamp(0, 1).mul(255).round()
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy())


def _random_crop(
    preprocessing: Preprocessing, augmentation: Augmentation | None
) -> v2.RandomResizedCrop | None:
    if augmentation is None or augmentation.min_crop_area == 1.0:
        return None
    return v2.RandomResizedCrop(
        preprocessing.size,
        scale=(augmentation.min_crop_area, 1.0),
        interpolation=InterpolationMode(preprocessing.interpolation),
    )


def _random_changes(
    preprocessing: Preprocessing, augmentation: Augmentation | None
) -> list[Callable[[Image.Image], Image.Image]]:
    if augmentation is None:
        return []
    changes: list[Callable[[Image.Image], Image.Image]] = []
    if augmentation.horizontal_flip:
        changes.append(v2.RandomHorizontalFlip())
    if augmentation.moves:
        changes.append(
            v2.RandomAffine(
                degrees=augmentation.rotation_degrees,
                translate=(augmentation.translation, augmentation.translation),
                scale=(1 - augmentation.zoom, 1 + augmentation.zoom),
                interpolation=InterpolationMode.BILINEAR,
            )
        )
    if augmentation.auto_augment is not None:
        changes.append(_rand_augment(preprocessing, augmentation.auto_augment))
    elif augmentation.color_jitter:
        changes.append(v2.ColorJitter(*[augmentation.color_jitter] * 3))
    return changes


def _rand_augment(preprocessing: Preprocessing, words: str) -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import RandAugment, rand_augment_transform

    fill = tuple(min(255, round(255 * value)) for value in preprocessing.mean)
    change: RandAugment = rand_augment_transform(
        words,
        {
            "translate_const": int(min(preprocessing.size) * _TRANSLATION_SHARE),
            "img_mean": fill if preprocessing.channels == "RGB" else fill[0],
            "interpolation": RESAMPLING[preprocessing.interpolation],
        },
    )
    for operation in change.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return change


def _posterize(image: Image.Image, bits_to_keep: int, **options: object) -> Image.Image:
    """Keeps the highest bits; none left is black, as in the Pillow of the published training."""
    from timm.data.auto_augment import posterize

    if bits_to_keep == 0:  # Pillow 13 refuses it
        return Image.new(image.mode, image.size)
    posterized: Image.Image = posterize(image, bits_to_keep)  # type: ignore[no-untyped-call]
    return posterized


def _centred_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resizes and crops in one pass: a very long picture never becomes a huge intermediate one."""
    height, width = preprocessing.size
    box = centred_box((image.height, image.width), preprocessing)
    if box == (0, 0, image.width, image.height) and image.size == (width, height):
        return image
    return image.resize((width, height), RESAMPLING[preprocessing.interpolation], box=box)


def centred_box(
    size: tuple[int, int], preprocessing: Preprocessing
) -> tuple[float, float, float, float]:
    """Returns (left, top, right, bottom), in pixels of a picture (height, width), of the crop."""
    picture_height, picture_width = size
    height, width = preprocessing.size
    scale = max(height / picture_height, width / picture_width) / preprocessing.crop_fraction
    resized_height = max(height, round(picture_height * scale))
    resized_width = max(width, round(picture_width * scale))
    top, left = round((resized_height - height) / 2), round((resized_width - width) / 2)
    return (
        left * picture_width / resized_width,
        top * picture_height / resized_height,
        (left + width) * picture_width / resized_width,
        (top + height) * picture_height / resized_height,
    )


def check_pixels(interpolation: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises ValueError where colour pictures cannot be resized and normalised so."""
    if interpolation not in RESAMPLING:
        raise ValueError(
            f"interpolation must be one of {', '.join(RESAMPLING)}, got {interpolation!r}"
        )
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name} needs 3 values, got {len(values)}")
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{name} must be finite, got {values}")
    if min(std) <= 0:
        raise ValueError(f"std must be positive, got {std}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must lie between {low:g} and {high:g}, got {value:g}")
