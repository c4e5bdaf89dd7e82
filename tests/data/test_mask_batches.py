"""Batches of masks: the same for any workers and ranks, of one size each, complete."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.data.drawn_masks import bands, exif_behind_the_pixels, mask_folder, save_mask
from visionmamba.data import (
    IGNORE,
    PADDING,
    MaskFolder,
    SegmentationAugmentation,
    SegmentationBatch,
    SegmentationCuts,
    SegmentationEvalBatches,
    SegmentationPreprocessing,
    SegmentationSet,
    SegmentationTrainBatches,
    Shapes,
    UnreadableImageError,
)
from visionmamba.data.loading import CHANGES, derive_seed

pytestmark = pytest.mark.once

SHAPES = Shapes(num_train=20, num_val=7, image_size=32).build()
PREPROCESSING = SegmentationPreprocessing(crop_size=16, short_side=24)
TRAINING = PREPROCESSING.build(SegmentationAugmentation())
EVALUATION = PREPROCESSING.build()
SIZES = ((12, 16), (13, 9), (12, 16), (12, 16), (13, 9))


def batches(
    images: SegmentationSet = SHAPES.train,
    *,
    batch_size: int = 4,
    seed: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    batches_per_step: int = 1,
    epoch_steps: int | None = None,
) -> SegmentationTrainBatches:
    return SegmentationTrainBatches(
        images,
        TRAINING,
        batch_size=batch_size,
        seed=seed,
        num_workers=num_workers,
        rank=rank,
        num_ranks=num_ranks,
        batches_per_step=batches_per_step,
        epoch_steps=epoch_steps,
    )


def folder(tmp_path: Path, **options: str) -> SegmentationSet:
    source = MaskFolder(root=mask_folder(tmp_path, sizes=SIZES), **options)
    return source.open("val")


def eval_batches(
    images: SegmentationSet, *, batch_size: int = 2, num_ranks: int = 1
) -> list[list[SegmentationBatch]]:
    """The batches of every rank."""
    return [
        list(
            SegmentationEvalBatches(
                images, EVALUATION, batch_size=batch_size, rank=rank, num_ranks=num_ranks
            )
        )
        for rank in range(num_ranks)
    ]


def moved(loader: Iterable[SegmentationCuts]) -> list[SegmentationBatch]:
    """The batches of a pass as a model gets them."""
    return [batch.to("cpu") for batch in loader]


def assert_equal(first: list[SegmentationBatch], second: list[SegmentationBatch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for mine, others in zip(one, other, strict=True):
            assert torch.equal(mine, others)


def rows(found: list[SegmentationBatch]) -> list[list[float]]:
    """All pictures and masks as sorted rows of numbers."""
    images = torch.cat([batch.images for batch in found]).flatten(1)
    masks = torch.cat([batch.masks for batch in found]).flatten(1)
    return sorted(torch.cat([images, masks], dim=1).tolist())


def test_training_batches_have_one_shape_and_each_picture_once() -> None:
    found = moved(batches())
    assert len(found) == len(batches()) == 5
    assert all(batch.images.shape == (4, 3, 16, 16) for batch in found)
    assert all(batch.masks.shape == (4, 16, 16) for batch in found)
    assert sorted(torch.cat([batch.indices for batch in found]).tolist()) == list(range(20))


def test_batches_are_the_transformed_pictures(tmp_path: Path) -> None:
    images = folder(tmp_path)  # sizes on both sides of the crop
    (cuts,) = batches(images, batch_size=5, epoch_steps=1)
    found = cuts.to("cpu")
    assert (cuts.pixels.dtype, cuts.masks.dtype) == (torch.uint8, torch.uint8)
    assert (found.images.dtype, found.masks.dtype) == (torch.float32, torch.int64)
    for row, index in enumerate(cuts.indices.tolist()):
        torch.manual_seed(derive_seed(0, CHANGES, 0, index))
        image, mask = TRAINING(images.image(index), images.mask(index))
        torch.testing.assert_close(found.images[row], image)
        assert mask is not None
        assert torch.equal(found.masks[row], mask)


@pytest.mark.gpu
def test_a_gpu_makes_the_same_pictures(tmp_path: Path) -> None:
    (cuts,) = batches(folder(tmp_path), batch_size=5, epoch_steps=1)
    found, wanted = cuts.to("cuda"), cuts.to("cpu")
    torch.testing.assert_close(found.images.cpu(), wanted.images, rtol=1e-5, atol=1e-4)
    assert torch.equal(found.masks.cpu(), wanted.masks)


def test_seed_alone_decides() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert_equal(moved(batches()), moved(batches(num_workers=2)))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(next(iter(batches(seed=1))).pixels, next(iter(batches())).pixels)


@pytest.mark.parametrize("num_done", [0, 2, 5])
def test_resume_goes_on_with_the_same_batches(num_done: int) -> None:
    unbroken = batches()
    expected = moved([*unbroken, *unbroken])
    first = batches()
    list(islice(first, num_done))
    resumed = batches()
    resumed.load_state_dict(first.state_dict())
    found = moved([*resumed, *resumed] if num_done < 5 else resumed)
    assert_equal(found, expected[num_done : num_done + len(found)])


def test_ranks_share_the_batches_of_one() -> None:
    whole = moved(batches(batch_size=4))
    halves = [moved(batches(batch_size=2, rank=rank, num_ranks=2)) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert rows([half[number] for half in halves]) == rows([batch])


def test_epoch_of_many_steps_goes_through_the_set_again_in_another_order() -> None:
    loader = batches(epoch_steps=12, batches_per_step=1)
    found = moved(loader)
    indices = torch.cat([batch.indices for batch in found])
    assert len(loader) == len(found) == 12
    first, second = indices[:20], indices[20:40]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(20))
    assert first.tolist() != second.tolist()
    one, other = (int((part == 3).nonzero()) for part in (first, second))
    pictures = torch.cat([batch.images for batch in found])
    assert not torch.equal(pictures[one], pictures[20 + other])


def test_epoch_of_many_steps_resumes_and_is_shared_by_ranks() -> None:
    whole = batches(batch_size=4, epoch_steps=12)
    expected = moved(whole)
    resumed = batches(batch_size=4, epoch_steps=12)
    resumed.load_state_dict({"epoch": 0, "num_samples": 4 * 7})
    assert_equal(moved(resumed), expected[7:])
    half = list(batches(batch_size=2, epoch_steps=12, rank=1, num_ranks=2))
    for mine, whole_batch in zip(half, expected, strict=True):
        assert set(mine.indices.tolist()) <= set(whole_batch.indices.tolist())


def test_steps_of_an_epoch_may_be_few_or_the_set_small() -> None:
    assert len(list(batches(epoch_steps=2, batches_per_step=2))) == 4
    assert len(next(iter(batches(batch_size=64, epoch_steps=1))).pixels) == 64
    with pytest.raises(ValueError, match="batch_size=64 is larger than the training set of 20"):
        batches(batch_size=64)
    with pytest.raises(ValueError, match="epoch_steps must be at least 1"):
        batches(epoch_steps=0)


def test_evaluation_batches_hold_one_size_and_every_picture_once(tmp_path: Path) -> None:
    images = folder(tmp_path)
    (found,) = eval_batches(images)
    assert [tuple(batch.indices.tolist()) for batch in found] == [(0, 2), (3,), (1, 4)]
    for batch in found:
        height, width = images.size(int(batch.indices[0]))
        assert batch.masks.shape[1:] == (height, width)
        assert batch.images.shape[2:] == PREPROCESSING.evaluation_size(height, width)
        assert np.array_equal(batch.masks[0].numpy(), bands(height, width))


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_evaluate_every_picture_once_in_equally_many_batches(
    tmp_path: Path, num_ranks: int
) -> None:
    shares = eval_batches(folder(tmp_path), num_ranks=num_ranks)
    assert len({len(share) for share in shares}) == 1
    indices = torch.cat([batch.indices for share in shares for batch in share])
    assert sorted(indices[indices != PADDING].tolist()) == [0, 1, 2, 3, 4]
    for batch in (batch for share in shares for batch in share):
        assert_padding(batch, batch.indices == PADDING)


def assert_padding(batch: SegmentationBatch, rows: Tensor) -> None:
    assert (batch.masks[rows] == IGNORE).all()
    assert not batch.images[rows].any()


def test_bad_mask_stops_training_and_evaluation_or_is_left_out(tmp_path: Path) -> None:
    stopping = folder(tmp_path)
    skipping = MaskFolder(root=tmp_path, on_unreadable="skip").open("val")
    save_mask(tmp_path / "val" / "masks" / "2.png", bands(5, 5))
    message = r'2.png is 5x5 px.* or leave such files out with on_unreadable="skip"'
    for loader in (
        batches(stopping, batch_size=5),
        SegmentationEvalBatches(stopping, EVALUATION, batch_size=5),
    ):
        with pytest.raises(UnreadableImageError, match=message):
            list(loader)
    training = batches(skipping, batch_size=5)
    assert sorted(next(iter(training)).indices.tolist()) == [0, 1, 3, 3, 4]
    evaluation = SegmentationEvalBatches(skipping, EVALUATION, batch_size=5)
    first = next(iter(evaluation))
    assert first.indices.tolist() == [0, PADDING, 3]
    assert_padding(first, first.indices == PADDING)
    assert "2.png is 5x5 px" in evaluation.unreadable[0]


def test_bad_picture_is_found_before_evaluation_begins(tmp_path: Path) -> None:
    images = folder(tmp_path)
    (tmp_path / "val" / "images" / "1.png").write_bytes(b"no picture")
    with pytest.raises(UnreadableImageError, match=r"1.png is not an image"):
        SegmentationEvalBatches(images, EVALUATION, batch_size=2)
    skipping = MaskFolder(root=tmp_path, on_unreadable="skip").open("val")
    evaluation = SegmentationEvalBatches(skipping, EVALUATION, batch_size=2)
    assert [batch.indices.tolist() for batch in evaluation] == [[0, 2], [3], [4]]
    assert "1.png is not an image" in evaluation.unreadable[0]


def test_picture_turned_by_exif_behind_its_pixels_is_left_out(tmp_path: Path) -> None:
    folder(tmp_path)
    exif_behind_the_pixels(tmp_path / "val" / "images" / "2.png")
    skipping = MaskFolder(root=tmp_path, on_unreadable="skip").open("val")
    evaluation = SegmentationEvalBatches(skipping, EVALUATION, batch_size=5)
    assert next(iter(evaluation)).indices.tolist() == [0, PADDING, 3]
    assert "2.png is 12x16 px when it is opened" in evaluation.unreadable[0]


def test_picture_too_long_to_resize_is_named(tmp_path: Path) -> None:
    images = MaskFolder(root=mask_folder(tmp_path, sizes=((1, 60_000),))).open("val")
    transform = SegmentationPreprocessing(crop_size=8, short_side=512).build()
    with pytest.raises(
        UnreadableImageError, match=r"0.png is too long: .*cut it into shorter pieces"
    ):
        SegmentationEvalBatches(images, transform, batch_size=1)


def test_transforms_are_not_mixed_up() -> None:
    with pytest.raises(ValueError, match="training needs pictures of one size"):
        SegmentationTrainBatches(SHAPES.train, EVALUATION, batch_size=2, seed=0)
    with pytest.raises(ValueError, match="evaluation changes nothing at random"):
        SegmentationEvalBatches(SHAPES.val, TRAINING, batch_size=2)
