"""Batches of pictures with objects depend on seed, epoch and picture alone."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from visionmamba.data import (
    PADDING,
    ArrayObjects,
    DetectionAugmentation,
    DetectionBatch,
    DetectionEvalBatches,
    DetectionPreprocessing,
    DetectionTrainBatches,
    DrawnObjects,
    UnreadableImageError,
    derive_seed,
)
from visionmamba.data.box_batches import DetectionCuts
from visionmamba.data.loading import CHANGES

pytestmark = pytest.mark.once

PREPROCESSING = DetectionPreprocessing(image_size=32)
DRAWN = DrawnObjects(num_train=12, num_val=5, image_size=32, empty_share=0.25)


class OneUnreadable(ArrayObjects):
    """A set whose picture 2 cannot be opened."""

    def image(self, index: int) -> Image.Image:
        if index == 2:
            raise UnreadableImageError("2.png is damaged")
        return super().image(index)


def one_unreadable(split: str, **changes: Any) -> OneUnreadable:
    drawn = DRAWN.open(split)
    return OneUnreadable(
        pixels=drawn.pixels, found=drawn.found, class_names=drawn.class_names, **changes
    )


def train(**options: Any) -> DetectionTrainBatches:
    options = {"batch_size": 4, "seed": 0} | options
    transform = PREPROCESSING.build(DetectionAugmentation())
    return DetectionTrainBatches(DRAWN.open("train"), transform, **options)


def moved(batches: DetectionTrainBatches) -> list[DetectionBatch]:
    return [batch.to("cpu") for batch in batches]


def pieces(batch: DetectionCuts) -> list[Tensor]:
    return [value for value in batch if isinstance(value, Tensor)]


def assert_equal(first: list[DetectionBatch], second: list[DetectionBatch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert all(map(torch.equal, one.images, other.images))
        for target, same in zip(one.targets, other.targets, strict=True):
            assert target.keys() == same.keys() and target["image_id"] == same["image_id"]
            for key in ("boxes", "labels", "masks", "area", "iscrowd"):
                assert torch.equal(target[key], same[key]), key  # type: ignore[literal-required]


def test_training_batches_hold_cuts_of_one_size() -> None:
    batch = next(iter(train())).to("cpu")
    assert torch.stack(list(batch.images)).shape == (4, 3, 32, 32)
    assert [target["masks"].shape[1:] for target in batch.targets] == [(32, 32)] * 4
    assert [target["image_id"] for target in batch.targets] == batch.indices.tolist()


def test_batches_are_what_the_transform_makes_of_each_picture() -> None:
    images, transform = DRAWN.open("train"), PREPROCESSING.build(DetectionAugmentation())
    for batch in moved(train()):
        expected = []
        for index in batch.indices.tolist():
            torch.manual_seed(derive_seed(0, CHANGES, 0, index))
            expected.append(transform(images.image(index), images.objects(index)))
        pictures, targets = zip(*expected, strict=True)
        assert_equal([batch], [DetectionBatch(pictures, targets, batch.indices)])


def test_training_passes_on_bytes_and_runs() -> None:
    batch = next(iter(train(batch_size=12)))
    assert batch.pixels.dtype == torch.uint8 and batch.runs is not None
    size = sum(one.numel() * one.element_size() for one in pieces(batch) if one is not batch.runs)
    assert size < 12 * (3 * 32 * 32 + 200)
    assert batch.runs[1].sum() == batch.areas.sum()
    assert len(pieces(batch)) == 7  # each costs a worker and this process an open file


def test_pictures_without_objects_share_a_batch_with_others_or_have_their_own() -> None:
    empty = [number for number, one in enumerate(DRAWN.open("train").found) if not len(one)]
    assert len(empty) == 3
    for batch in moved(train()):
        for index, target in zip(batch.indices.tolist(), batch.targets, strict=True):
            assert len(target["masks"]) == len(target["boxes"])
            assert index not in empty or target["masks"].shape == (0, 32, 32)
    alone = moved(train(batch_size=1))
    assert sum(one.targets[0]["boxes"].shape == (0, 4) for one in alone) >= 3


def test_sets_without_masks_give_boxes_alone() -> None:
    drawn = DRAWN.open("train")
    found = tuple(replace(one, masks=None) for one in drawn.found)
    images = ArrayObjects(pixels=drawn.pixels, found=found, class_names=drawn.class_names)
    transform = PREPROCESSING.build(DetectionAugmentation())
    batch = next(iter(DetectionTrainBatches(images, transform, batch_size=12, seed=0)))
    assert batch.runs is None
    assert not any("masks" in target for target in batch.to("cpu").targets)


def test_crowds_are_not_learned() -> None:
    drawn = DRAWN.open("train")
    found = tuple(replace(one, is_crowd=np.ones(len(one), dtype=np.bool_)) for one in drawn.found)
    images = ArrayObjects(pixels=drawn.pixels, found=found, class_names=drawn.class_names)
    transform = PREPROCESSING.build(DetectionAugmentation())
    batch = next(iter(DetectionTrainBatches(images, transform, batch_size=12, seed=0)))
    assert batch.num_objects == [0] * 12
    assert all(target["masks"].shape == (0, 32, 32) for target in batch.to("cpu").targets)


def test_workers_of_evaluation_pass_on_few_pieces_of_memory() -> None:
    batch = next(iter(DetectionEvalBatches(DRAWN.open("val"), PREPROCESSING.build(), batch_size=4)))
    for name in ("boxes", "labels", "area", "iscrowd"):
        tensors = [target[name] for target in batch.targets]  # type: ignore[literal-required]
        assert len({one.untyped_storage().data_ptr() for one in tensors}) == 1
    assert len({image.untyped_storage().data_ptr() for image in batch.images}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 1])
def test_gpu_makes_the_same_batches_of_pinned_memory(num_workers: int) -> None:
    torch.cuda.init()  # batches are pinned for a GPU that is in use
    for batch, expected in zip(train(num_workers=num_workers), moved(train()), strict=True):
        assert all(one.is_pinned() for one in pieces(batch))
        on_gpu = batch.to("cuda")
        images = torch.stack(list(on_gpu.images))
        assert images.is_cuda and on_gpu.targets[0]["masks"].is_cuda
        torch.testing.assert_close(images.cpu(), torch.stack(list(expected.images)))
        targets: Any = [
            {key: one.cpu() if isinstance(one, Tensor) else one for key, one in target.items()}
            for target in on_gpu.targets
        ]
        same = DetectionBatch(expected.images, targets, on_gpu.indices.cpu())
        assert_equal([same], [expected])


def test_number_of_workers_changes_nothing() -> None:
    assert_equal(moved(train()), moved(train(num_workers=1)))


def test_resuming_gives_the_rest() -> None:
    whole, begun, resumed = train(), train(), train()
    expected = [*moved(whole), *moved(whole)]
    list(islice(begun, 2))
    resumed.load_state_dict(begun.state_dict())
    assert_equal([*moved(resumed), *moved(resumed)], expected[2:])


def test_ranks_share_each_step() -> None:
    alone = torch.cat([batch.indices for batch in train()])
    ranks = [train(batch_size=2, rank=rank, num_ranks=2) for rank in (0, 1)]
    steps = zip(*ranks, strict=True)
    shared = torch.cat([torch.stack([a.indices, b.indices], 1).ravel() for a, b in steps])
    assert torch.equal(alone, shared)


def test_unreadable_picture_is_replaced_in_training() -> None:
    images = one_unreadable("train", on_unreadable="skip")
    transform = PREPROCESSING.build(DetectionAugmentation())
    batches = DetectionTrainBatches(images, transform, batch_size=4, seed=0)
    indices = torch.cat([batch.indices for batch in batches])
    assert 2 not in indices and len(indices) == 12
    assert batches.unreadable == ("2.png is damaged",)


def test_evaluation_gives_each_picture_once_to_one_rank() -> None:
    ranks = [
        DetectionEvalBatches(
            DRAWN.open("val"), PREPROCESSING.build(), batch_size=2, rank=rank, num_ranks=2
        )
        for rank in (0, 1)
    ]
    indices = [torch.cat([batch.indices for batch in batches]).tolist() for batches in ranks]
    assert indices == [[0, 2, 4], [1, 3, PADDING]]
    padded = list(ranks[1])[-1]
    assert len(padded.targets[0]["boxes"]) == 0 and padded.targets[0]["run_lengths"] == ()


def test_unreadable_picture_is_padding_in_evaluation_or_stops_it() -> None:
    skipping = one_unreadable("val", on_unreadable="skip")
    batches = DetectionEvalBatches(skipping, PREPROCESSING.build(), batch_size=5)
    assert next(iter(batches)).indices.tolist() == [0, 1, PADDING, 3, 4]
    failing = DetectionEvalBatches(one_unreadable("val"), PREPROCESSING.build(), batch_size=5)
    with pytest.raises(UnreadableImageError, match=r"2\.png is damaged, or leave"):
        next(iter(failing))


def test_transforms_of_the_other_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="build\\(\\) with an augmentation"):
        DetectionTrainBatches(DRAWN.open("train"), PREPROCESSING.build(), batch_size=1, seed=0)
    random = PREPROCESSING.build(DetectionAugmentation())
    with pytest.raises(ValueError, match="build\\(\\) without augmentation"):
        DetectionEvalBatches(DRAWN.open("val"), random, batch_size=1)


def test_drawn_pictures_depend_on_the_seed_alone() -> None:
    first, again = DRAWN.open("train"), DRAWN.open("train")
    other = replace(DRAWN, seed=1).open("train")
    assert (first.pixels == again.pixels).all() and (first.pixels != other.pixels).any()
    assert (first.pixels[:5] != DRAWN.open("val").pixels).any()


def test_drawn_pictures_have_large_objects_and_none_as_asked() -> None:
    drawn = DrawnObjects(num_train=40, image_size=48, large_share=0.5, empty_share=0.25)
    pictures = drawn.open("train").found
    largest = [
        max((right - left) * (bottom - top) for left, top, right, bottom in one.boxes)
        for one in pictures
        if len(one)
    ]
    assert len(largest) == 30
    assert sum(area > 48 * 48 / 2 for area in largest) == 20


def test_large_objects_stay_large_whatever_covers_them() -> None:
    drawn = DrawnObjects(num_train=300, image_size=64, max_objects=6, large_share=1.0)
    for one in drawn.open("train").found:
        left, top, right, bottom = one.boxes[0]
        assert (right - left) * (bottom - top) > 64 * 64 / 2


def test_shuffled_pictures_have_the_objects_of_others() -> None:
    true = DRAWN.open("train").found
    mixed = replace(DRAWN, shuffled=True).open("train").found
    assert [one.image_id for one in mixed] == [11, *range(11)]
    assert mixed[1].boxes.tolist() == true[0].boxes.tolist()
    unmixed = replace(DRAWN, shuffled=True).open("val").found
    assert [one.image_id for one in unmixed] == list(range(5))


def test_drawn_set_refuses_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size must be at least 32"):
        DrawnObjects(image_size=8)
    with pytest.raises(ValueError, match="large_share"):
        DrawnObjects(large_share=2)
