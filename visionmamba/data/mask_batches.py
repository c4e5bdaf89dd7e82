"""Batches of pictures with masks, for one process or for one of several."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from visionmamba.data.image_files import UnreadableImageError
from visionmamba.data.joint_transforms import Cut, JointTransform, SegmentationPreprocessing
from visionmamba.data.loading import (
    PADDING,
    OrderedBatches,
    Place,
    ShuffledBatches,
    Unstacked,
    check_numbers,
    left_out_hint,
)
from visionmamba.data.masks import IGNORE, SegmentationSet, check_decoded
from visionmamba.data.sets import OnUnreadable


class SegmentationBatch(NamedTuple):
    """What a segmentation model trains on or is evaluated on."""

    images: Tensor
    """(B, 3, H, W) float32."""
    masks: Tensor
    """(B, h, w) int64, class indices and `IGNORE`; in training h, w = H, W, in evaluation the size
    that the pictures have in their files."""
    indices: Tensor
    """(B,) int64: which pictures of the set these are; `PADDING` where there is none."""


class SegmentationCuts(NamedTuple):
    """A batch of training as bytes, a sixth of the size; `to` makes a `SegmentationBatch` of it."""

    pixels: Tensor
    """(B, H, W, 3) uint8."""
    masks: Tensor
    """(B, H, W) uint8, class indices and `IGNORE`."""
    sizes: Tensor
    """(B, 2) int64: height and width of the picture in each, at the top left."""
    colours: Tensor
    """(B, 5) float32: how its colours are to change."""
    indices: Tensor
    """(B,) int64: which pictures of the set these are."""
    preprocessing: SegmentationPreprocessing

    def to(self, device: torch.device | str, **_: Any) -> SegmentationBatch:
        """Returns the batch on a device; training loops call this as they would for a tensor."""
        pixels, masks, indices = (
            one.to(device, non_blocking=True) for one in (self.pixels, self.masks, self.indices)
        )
        images = self.preprocessing.finish(pixels, self.sizes, self.colours)
        return SegmentationBatch(images, masks.long(), indices)


class SegmentationTrainBatches(ShuffledBatches[SegmentationCuts]):
    """Shuffled batches of one epoch after another, resumable after any batch.

    A batch is bytes until it is moved: `batch.to(device)` is the `SegmentationBatch`.

    Each pass yields what is left of an epoch and goes on to the next one. The last, incomplete step
    of an epoch is left out. Of the samples of a step every rank takes every num_ranks-th, so that
    together they train on the same pictures, however many they are.
    """

    def __init__(
        self,
        images: SegmentationSet,
        transform: JointTransform,
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        batches_per_step: int = 1,
        epoch_steps: int | None = None,
    ) -> None:
        """Takes the set, a transform of training, and as `ShuffledBatches` the rest.

        Raises:
            ValueError: the transform is one of evaluation, a number is out of range, or the set is
                smaller than one step.
        """
        if transform.augmentation is None:
            raise ValueError("training needs pictures of one size; build() with an augmentation")
        super().__init__(
            _Cuts(images, transform),
            Unstacked(partial(_make_cuts, transform.preprocessing)),
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            rank=rank,
            num_ranks=num_ranks,
            batches_per_step=batches_per_step,
            epoch_steps=epoch_steps,
        )


class SegmentationEvalBatches(OrderedBatches[SegmentationBatch]):
    """Batches of a whole set without random changes, each of pictures of one size.

    Sizes come in the order in which the set first shows them, and pictures of a size in the set's
    order, up to batch_size at once. Each picture goes to exactly one rank; all ranks have equally
    many batches. Where that leaves a batch over, and where a picture is unreadable and its set's
    on_unreadable is "skip", rows have the index `PADDING`, an image of zeros and a mask of
    `IGNORE`, and do not count.
    """

    def __init__(
        self,
        images: SegmentationSet,
        transform: JointTransform,
        *,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """Reads the size of every picture.

        Raises:
            UnreadableImageError: a picture cannot be opened, or becomes too large when it is
                resized, and the set's on_unreadable is "fail".
            ValueError: the transform is one of training, batch_size is below 1, there is no such
                rank, or no picture is left.
        """
        if transform.augmentation is not None:
            raise ValueError("evaluation changes nothing at random; build() without augmentation")
        check_numbers(batch_size, num_workers, rank, num_ranks)
        groups, unreadable = _by_size(images, transform)
        batches = [
            [Place(sample) for sample in group[start : start + batch_size]]
            for group in groups
            for start in range(0, len(group), batch_size)
        ]
        if not batches:
            reason = f"; the first: {unreadable[0]}" if unreadable else ""
            raise ValueError(f"the set holds no pictures to evaluate{reason}")
        stand_in = batches[-1][0].sample
        batches += [[Place(PADDING, stand_in=stand_in)]] * (-len(batches) % num_ranks)
        super().__init__(
            _MaskedExamples(images, transform),
            SegmentationBatch,
            batches[rank::num_ranks],
            num_workers=num_workers,
            unreadable=unreadable,
        )


class _MaskedExamples:
    """Pictures and masks, transformed together."""

    draws_beyond_torch = False

    def __init__(self, images: SegmentationSet, transform: JointTransform) -> None:
        self._images = images
        self._transform = transform
        self.unreadable = images.unreadable
        self.on_unreadable: OnUnreadable = images.on_unreadable

    def __len__(self) -> int:
        return len(self._images)

    def example(self, index: int) -> tuple[Tensor, Any]:
        image, mask = self._transform(*self._pair(index))
        assert mask is not None
        return image, mask

    def _pair(self, index: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        picture, numbers = self._images.image(index), self._images.mask(index)
        check_decoded(picture, numbers, self._images.file(index) or f"picture {index}")
        return picture, numbers

    def padding(self, stand_in: int) -> tuple[Tensor, Tensor]:
        height, width = self._images.size(stand_in)
        resized = self._transform.preprocessing.evaluation_size(height, width)
        return torch.zeros(3, *resized), torch.full((height, width), IGNORE)

    def order(self, generator: torch.Generator) -> Tensor:
        return self._images.order(generator)


class _Cuts(_MaskedExamples):
    """What training cuts out of them, as bytes."""

    def example(self, index: int) -> tuple[Tensor, Any]:
        cut = self._transform.cut(*self._pair(index))
        return torch.from_numpy(cut.pixels), cut


def _make_cuts(
    preprocessing: SegmentationPreprocessing,
    pixels: Sequence[Tensor],
    cuts: Sequence[Cut],
    indices: Tensor,
) -> SegmentationCuts:
    return SegmentationCuts(
        pixels=default_collate(list(pixels)),  # in a worker at once in memory that is shared
        masks=torch.from_numpy(np.stack([cut.mask for cut in cuts])),
        sizes=torch.tensor([cut.size for cut in cuts]),
        colours=torch.tensor([cut.colours for cut in cuts]),
        indices=indices,
        preprocessing=preprocessing,
    )


def _by_size(
    images: SegmentationSet, transform: JointTransform
) -> tuple[Sequence[list[int]], list[str]]:
    """Returns the indices of the pictures of each size, and why others cannot be used."""
    groups: dict[tuple[int, int], list[int]] = {}
    unreadable: list[str] = []
    for index in range(len(images)):
        try:
            size = images.size(index)
            _check_resized(images, transform, index, size)
        except (UnreadableImageError, FileNotFoundError) as error:
            if images.on_unreadable == "fail":
                raise UnreadableImageError(left_out_hint(error)) from error
            unreadable.append(str(error))
            continue
        groups.setdefault(size, []).append(index)
    return list(groups.values()), unreadable


def _check_resized(
    images: SegmentationSet, transform: JointTransform, index: int, size: tuple[int, int]
) -> None:
    try:
        transform.preprocessing.evaluation_size(*size)
    except UnreadableImageError as error:
        name = images.file(index) or f"picture {index}"
        raise UnreadableImageError(f"{name} is too long: {error}") from error
