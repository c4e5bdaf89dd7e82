"""Batches of pictures with objects, for one process or for one of several."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from visionmamba.data.box_transforms import (
    BoxTransform,
    CutObjects,
    DetectionPreprocessing,
    DetectionTarget,
    ObjectCut,
    learned_target,
)
from visionmamba.data.coco import DetectionSet
from visionmamba.data.loading import (
    PADDING,
    OrderedBatches,
    Place,
    ShuffledBatches,
    Unstacked,
    check_numbers,
)
from visionmamba.data.object_masks import draw_runs
from visionmamba.data.sets import OnUnreadable

_SMALL: tuple[Literal["boxes", "labels", "area", "iscrowd"], ...] = (
    "boxes", "labels", "area", "iscrowd",
)  # fmt: skip


class DetectionBatch(NamedTuple):
    """What a detector trains on or is evaluated on."""

    images: Sequence[Tensor]
    """B of (3, H, W) float32; in training all as large as a cut, in evaluation each its own."""
    targets: Sequence[DetectionTarget]
    """B of them."""
    indices: Tensor
    """(B,) int64: which pictures of the set these are; `PADDING` where there is none."""


class DetectionCuts(NamedTuple):
    """A batch of training as bytes and runs; `to` makes a `DetectionBatch` of it.

    n is the number of objects of all pictures, one picture after another.
    """

    pixels: Tensor
    """(B, H, W, 3) uint8."""
    sizes: Tensor
    """(B, 2) int64: height and width of the picture in each, at the top left."""
    boxes: Tensor
    """(n, 4) float32: left, top, right, bottom in pixels."""
    labels: Tensor
    """(n,) int64, from 1."""
    areas: Tensor
    """(n,) float32: pixels of each object."""
    runs: Tensor | None
    """(2, r) int64: the n masks as `draw_runs` takes them; None where the set has boxes only."""
    indices: Tensor
    """(B,) int64: which pictures of the set these are."""
    num_objects: list[int]
    """Of each picture."""
    image_ids: tuple[int, ...]
    """Numbers of the pictures, as their annotation file counts."""
    preprocessing: DetectionPreprocessing

    def to(self, device: torch.device | str, **_: Any) -> DetectionBatch:
        """Returns the batch on a device; training loops call this as they would for a tensor."""
        device, size = torch.device(device), (self.pixels.shape[1], self.pixels.shape[2])
        pixels, boxes, labels, areas, indices = (
            one.to(device, non_blocking=True)
            for one in (self.pixels, self.boxes, self.labels, self.areas, self.indices)
        )
        objects = [torch.split(one, self.num_objects) for one in (boxes, labels, areas)]
        masks: Sequence[Tensor | None] = [None] * len(self.image_ids)
        if self.runs is not None:
            drawn = draw_runs(self.runs, len(labels), size, device)
            masks = torch.split(drawn, self.num_objects)
        return DetectionBatch(
            self.preprocessing.finish(pixels, self.sizes).unbind(),
            [
                learned_target(*own, image_id=image_id, size=size)
                for *own, image_id in zip(*objects, masks, self.image_ids, strict=True)
            ],
            indices,
        )


class DetectionTrainBatches(ShuffledBatches[DetectionCuts]):
    """Shuffled batches of one epoch after another, resumable after any batch.

    A batch is bytes and runs until it is moved: `batch.to(device)` is the `DetectionBatch`.

    Each pass yields what is left of an epoch and goes on to the next one. The last, incomplete step
    of an epoch is left out. Of the samples of a step every rank takes every num_ranks-th, so that
    together they train on the same pictures, however many they are.
    """

    def __init__(
        self,
        images: DetectionSet,
        transform: BoxTransform,
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


class DetectionEvalBatches(OrderedBatches[DetectionBatch]):
    """Batches of a whole set in its own order, without random changes.

    Each picture goes to exactly one rank; all ranks have equally many rows. Where that leaves a row
    over, and where a picture is unreadable and its set's on_unreadable is "skip", the row has the
    index `PADDING`, an image of zeros and no objects, and does not count.
    """

    def __init__(
        self,
        images: DetectionSet,
        transform: BoxTransform,
        *,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """Raises ValueError for a batch size below 1, a rank that there is not, and a transform of
        training."""
        if transform.augmentation is not None:
            raise ValueError("evaluation changes nothing at random; build() without augmentation")
        check_numbers(batch_size, num_workers, rank, num_ranks)
        places = [Place(sample) for sample in range(rank, len(images), num_ranks)]
        num_rows = -(-len(images) // num_ranks)
        places += [Place(PADDING)] * (num_rows - len(places))
        super().__init__(
            _ObjectExamples(images, transform),
            Unstacked(_make_batch),
            [places[start : start + batch_size] for start in range(0, num_rows, batch_size)],
            num_workers=num_workers,
        )


def _make_batch(
    images: Sequence[Tensor], targets: Sequence[DetectionTarget], indices: Tensor
) -> DetectionBatch:
    """Returns a batch whose small tensors share memory: each of its own would cost a worker, which
    passes them on, and this process one open file."""
    counts = [len(target["labels"]) for target in targets]
    joined = [target.copy() for target in targets]
    for name in _SMALL:
        parts = torch.split(torch.cat([target[name] for target in targets]), counts)
        for target, part in zip(joined, parts, strict=True):
            target[name] = part
    if len({image.shape for image in images}) == 1:
        images = torch.stack(list(images)).unbind()
    return DetectionBatch(images, joined, indices)


def _make_cuts(
    preprocessing: DetectionPreprocessing,
    pixels: Sequence[Tensor],
    cuts: Sequence[ObjectCut],
    indices: Tensor,
) -> DetectionCuts:
    found = [cut.objects for cut in cuts]
    num_objects = [len(one.labels) for one in found]
    boxes, labels, areas = (
        torch.from_numpy(np.concatenate(parts))
        for parts in zip(*((one.boxes, one.labels, one.areas) for one in found), strict=True)
    )
    return DetectionCuts(
        pixels=default_collate(list(pixels)),  # in a worker at once in memory that is shared
        sizes=torch.tensor([cut.size for cut in cuts]),
        boxes=boxes,
        labels=labels,
        areas=areas,
        runs=_join_runs(found, num_objects, preprocessing.size),
        indices=indices,
        num_objects=num_objects,
        image_ids=tuple(one.image_id for one in found),
        preprocessing=preprocessing,
    )


def _join_runs(
    found: Sequence[CutObjects], num_objects: Sequence[int], size: tuple[int, int]
) -> Tensor | None:
    """Returns the runs of the masks of all pictures as one."""
    runs = [one.runs for one in found if one.runs is not None]
    if not runs:
        return None
    firsts = (np.cumsum(num_objects) - num_objects) * (size[0] * size[1])
    joined = torch.from_numpy(np.concatenate(runs, axis=1))
    joined[0] += torch.from_numpy(np.repeat(firsts, [one.shape[1] for one in runs]))
    return joined


class _ObjectExamples:
    """Pictures and objects, transformed together."""

    draws_beyond_torch = False

    def __init__(self, images: DetectionSet, transform: BoxTransform) -> None:
        self._images = images
        self._transform = transform
        self.unreadable = images.unreadable
        self.on_unreadable: OnUnreadable = images.on_unreadable

    def __len__(self) -> int:
        return len(self._images)

    def example(self, index: int) -> tuple[Tensor, Any]:
        return self._transform(self._images.image(index), self._images.objects(index))

    def padding(self, stand_in: int) -> tuple[Tensor, DetectionTarget]:
        size = self._images.size(stand_in)
        target: DetectionTarget = {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "area": torch.zeros(0),
            "iscrowd": torch.zeros(0, dtype=torch.int64),
            "image_id": PADDING,
            "size": size,
        }
        if self._images.has_masks:
            target["run_lengths"] = ()
        return torch.zeros(3, *self._transform.preprocessing.resized(*size)), target

    def order(self, generator: torch.Generator) -> Tensor:
        return self._images.order(generator)


class _Cuts(_ObjectExamples):
    """What training cuts out of them, as bytes and runs."""

    def example(self, index: int) -> tuple[Tensor, Any]:
        cut = self._transform.cut(self._images.image(index), self._images.objects(index))
        return torch.from_numpy(cut.pixels), cut
