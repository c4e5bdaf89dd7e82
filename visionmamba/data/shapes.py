"""A drawn set of pictures with masks: discs, squares and triangles on a noisy ground."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visionmamba.data.loading import derive_seed
from visionmamba.data.masks import ArrayMasks, SegmentationSplits

CLASS_NAMES = ("ground", "disc", "square", "triangle")

_PALETTE = ((60, 60, 60), (220, 80, 60), (70, 170, 80), (70, 110, 220))
_COLOURS = ((205, 90, 70), (85, 175, 95), (80, 115, 215))  # around which shapes vary, by class
_COLOUR_SPREAD = 25
_MIN_RADIUS, _MAX_RADIUS = 0.17, 0.3  # of the side of the picture
_MAX_SHAPES = 3
_NOISE = 18.0
_TRAIN, _VAL = 0, 1  # so that the seeds of both splits never meet


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Drawn pictures of one to three discs, squares and triangles: no download.

    Each kind of shape has a colour that varies around one of its own, any size and rotation; later
    ones cover earlier ones; the ground is gray, wavy and noisy. A small model learns it in a minute
    on a CPU; it is there for tests and first steps, not to compare models.
    """

    num_train: int = 512
    """Pictures to learn from."""
    num_val: int = 128
    """Pictures to judge on."""
    image_size: int = 64
    """Side in pixels."""
    seed: int = 0
    """Of everything that is drawn."""
    shuffled: bool = False
    """Whether training pictures get the masks of others, so that there is nothing to learn: what a
    model reaches then comes from elsewhere than the pictures."""

    def __post_init__(self) -> None:
        for name, least in (("num_train", 2), ("num_val", 1), ("image_size", 16), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def build(self) -> SegmentationSplits:
        """Returns the pictures of both splits, drawn from the seed alone."""
        return SegmentationSplits(self.open("train"), self.open("val"))

    def open(self, split: str) -> ArrayMasks:
        """Returns the pictures of "train" or "val"; ValueError for another split."""
        if split not in ("train", "val"):
            raise ValueError(f"the drawn shapes have the splits train and val, got {split}")
        is_train = split == "train"
        count = self.num_train if is_train else self.num_val
        seeds = [derive_seed(self.seed, _TRAIN if is_train else _VAL, n) for n in range(count)]
        drawn = [_draw(np.random.default_rng(seed), self.image_size) for seed in seeds]
        masks = np.stack([mask for _, mask in drawn])
        if is_train and self.shuffled:
            masks = np.roll(masks, 1, axis=0)
        return ArrayMasks(
            pixels=np.stack([pixels for pixels, _ in drawn]),
            masks=masks,
            class_names=CLASS_NAMES,
            palette=_PALETTE,
        )


def _draw(generator: np.random.Generator, side: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Returns a picture (side, side, 3) and its mask (side, side)."""
    rows, columns = np.mgrid[:side, :side] + 0.5
    pixels = np.repeat(_ground(generator, rows, columns)[..., None], 3, axis=2)
    mask = np.zeros((side, side), dtype=np.uint8)
    for _ in range(generator.integers(1, _MAX_SHAPES + 1)):
        kind = int(generator.integers(len(_INSIDE)))
        row, column = generator.uniform(0.15 * side, 0.85 * side, 2)
        radius = generator.uniform(_MIN_RADIUS, _MAX_RADIUS) * side
        angle = generator.uniform(0, 2 * np.pi)
        down, right = (rows - row) / radius, (columns - column) / radius
        along = np.cos(angle) * right + np.sin(angle) * down
        across = np.cos(angle) * down - np.sin(angle) * right
        inside = _INSIDE[kind](along, across)
        colour = generator.uniform(-_COLOUR_SPREAD, _COLOUR_SPREAD, 3) + _COLOURS[kind]
        pixels[inside] = colour * (1 + 0.15 * along[inside, None])
        mask[inside] = kind + 1
    pixels += generator.normal(0, _NOISE, pixels.shape)
    return np.clip(pixels, 0, 255).round().astype(np.uint8), mask


def _ground(
    generator: np.random.Generator, rows: NDArray[np.float64], columns: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Returns (side, side): gray of a random level, with waves of random directions."""
    gray = np.full(rows.shape, generator.uniform(70, 190))
    for _ in range(3):
        direction, phase = generator.uniform(0, 2 * np.pi, 2)
        length = generator.uniform(5, 20)
        wave = np.cos(direction) * columns + np.sin(direction) * rows
        gray += generator.uniform(5, 20) * np.sin(2 * np.pi * wave / length + phase)
    return gray


_INSIDE: tuple[Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]], ...] = (
    lambda along, across: along**2 + across**2 < 1,
    lambda along, across: np.maximum(abs(along), abs(across)) < 0.8,
    lambda along, across: (along > -0.6) & (along + 1.732 * abs(across) < 1.2),
)
"""Of each kind of shape whether points are inside, in coordinates turned with it, radius 1."""
