"""Order and random changes depend on seed, epoch and picture alone."""

import os
import random
import signal
from dataclasses import replace
from itertools import islice
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch

from visionmamba.data import (
    PADDING,
    Augmentation,
    ChangedImages,
    Digits,
    EvalBatches,
    ImageFolder,
    Preprocessing,
    TrainBatches,
    UnreadableImageError,
    derive_seed,
)
from visionmamba.data.loading import CHANGES

pytestmark = pytest.mark.once

PREPROCESSING = Preprocessing(image_size=8, crop_fraction=1, mean=(0.5,), std=(0.5,), channels="L")
MOVES = Augmentation(rotation_degrees=10, translation=0.1, zoom=0.1)
EVERYTHING = replace(MOVES, auto_augment="rand-m9", erase_probability=0.5)
DIGITS = Digits().build()


def batches(
    *,
    seed: int = 0,
    num_workers: int = 0,
    batch_size: int = 256,
    rank: int = 0,
    num_ranks: int = 1,
    repeats: int = 1,
    batches_per_step: int = 1,
    augmentation: Augmentation = MOVES,
) -> TrainBatches:
    return TrainBatches(
        DIGITS.train,
        PREPROCESSING.build(augmentation),
        batch_size=batch_size,
        seed=seed,
        num_workers=num_workers,
        rank=rank,
        num_ranks=num_ranks,
        repeats=repeats,
        batches_per_step=batches_per_step,
    )


def pictures(loaders: list[TrainBatches], first: int, last: int) -> list[list[float]]:
    """All pixels of some batches of every rank, sorted."""
    found = [batch.to("cpu") for loader in loaders for batch in list(islice(loader, last))[first:]]
    return sorted(torch.cat([batch.images for batch in found]).flatten(1).tolist())


def assert_equal(first: list[ChangedImages], second: list[ChangedImages]) -> None:
    assert len(first) == len(second)
    moved = ((one.to("cpu"), other.to("cpu")) for one, other in zip(first, second, strict=True))
    for one, other in moved:
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.indices, other.indices)


def test_epoch_holds_every_picture_at_most_once() -> None:
    indices = torch.cat([batch.indices for batch in batches()])
    assert len(indices) == 5 * 256
    assert len(indices.unique()) == len(indices)


def test_batches_are_the_transformed_pictures() -> None:
    loader = batches(batch_size=8, augmentation=replace(MOVES, horizontal_flip=True))
    changed = next(iter(loader))
    batch = changed.to("cpu")
    assert (changed.pixels.dtype, batch.images.dtype) == (torch.uint8, torch.float32)
    transform = PREPROCESSING.build(replace(MOVES, horizontal_flip=True))
    for index, image, label in zip(batch.indices.tolist(), batch.images, batch.labels, strict=True):
        torch.manual_seed(derive_seed(0, CHANGES, 0, index))
        assert torch.equal(transform(DIGITS.train.image(index)), image)
        assert DIGITS.train.labels[index] == label


def test_part_of_the_pictures_is_erased_and_alone() -> None:
    plain = next(iter(batches(batch_size=200))).to("cpu").images
    loader = batches(batch_size=200, augmentation=replace(MOVES, erase_probability=0.5))
    erased = next(iter(loader)).to("cpu").images
    is_changed = (plain != erased).flatten(1).any(1)
    assert 0.3 < is_changed.float().mean() < 0.6  # of 8x8 px, few rectangles are empty


@pytest.mark.gpu
def test_a_gpu_makes_the_same_pictures() -> None:
    changed = next(iter(batches(batch_size=64)))
    torch.testing.assert_close(changed.to("cuda").images.cpu(), changed.to("cpu").images)


def test_same_seed_gives_same_batches() -> None:
    assert_equal(list(batches()), list(batches()))


def test_other_seed_or_epoch_gives_another_order() -> None:
    loader = batches()
    first, second = list(loader), list(loader)
    assert not torch.equal(first[0].indices, second[0].indices)
    assert not torch.equal(first[0].indices, next(iter(batches(seed=1))).indices)


def test_changes_of_a_picture_differ_between_epochs() -> None:
    loader = batches()
    first = {int(i): x for b in loader for i, x in zip(b.indices, b.pixels, strict=True)}
    second = {int(i): x for b in loader for i, x in zip(b.indices, b.pixels, strict=True)}
    shared = next(iter(first.keys() & second.keys()))
    assert not torch.equal(first[shared], second[shared])


def test_number_of_workers_changes_nothing() -> None:
    alone, helped = (
        batches(augmentation=EVERYTHING),
        batches(num_workers=2, augmentation=EVERYTHING),
    )
    assert_equal(list(alone), list(helped))


def test_kept_workers_give_the_same_and_end_with_the_body() -> None:
    alone, helped = batches(), batches(num_workers=2)
    with helped.workers_kept():
        passes = [list(helped)]
        workers = {process.pid for process in active_children()}
        next(iter(helped))  # a pass that is broken off
        helped.set_epoch(0)
        helped.set_epoch(1)
        passes.append(list(helped))
        assert {process.pid for process in active_children()} == workers
    for expected, actual in zip((list(alone), list(alone)), passes, strict=True):
        assert_equal(expected, actual)
    assert not workers & {process.pid for process in active_children()}


def test_kept_workers_outlive_a_signal_to_all_processes() -> None:
    helped = batches(num_workers=2)
    with helped.workers_kept():
        iterator = iter(helped)
        first = next(iterator)
        workers = [process.pid for process in active_children() if process.pid is not None]
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGINT)
        assert_equal(list(batches()), [first, *iterator])


def test_global_random_state_neither_matters_nor_moves() -> None:
    expected = list(batches(augmentation=EVERYTHING))
    torch.manual_seed(123)
    np.random.seed(123)
    random.seed(123)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    actual = list(batches(augmentation=EVERYTHING))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
    assert_equal(actual, expected)


@pytest.mark.parametrize("num_done", [0, 1, 4, 5])
def test_resume_gives_the_rest_of_the_epoch_and_then_the_next(num_done: int) -> None:
    unbroken = batches()
    expected = [*unbroken, *unbroken]
    interrupted = batches()
    head = list(islice(interrupted, num_done))
    resumed = batches()
    resumed.load_state_dict(interrupted.state_dict())
    assert_equal([*head, *resumed, *resumed], expected)


def test_set_epoch_keeps_the_place_in_an_epoch_under_way() -> None:
    loader = batches()
    loader.load_state_dict({"epoch": 3, "num_samples": 512})
    loader.set_epoch(3)
    assert loader.state_dict() == {"epoch": 3, "num_samples": 512}
    loader.set_epoch(4)
    assert loader.state_dict() == {"epoch": 4, "num_samples": 0}


@pytest.mark.parametrize("repeats", [1, 3])
def test_ranks_share_each_step_whatever_their_number(repeats: int) -> None:
    alone = [batches(batch_size=64, repeats=repeats)]
    four = [batches(batch_size=16, rank=r, num_ranks=4, repeats=repeats) for r in range(4)]
    assert pictures(four, 2, 4) == pictures(alone, 2, 4)
    assert len(four[0]) == len(alone[0])


def test_accumulated_batches_make_the_same_steps() -> None:
    one = batches(batch_size=256)
    many = [batches(batch_size=32, rank=r, num_ranks=2, batches_per_step=4) for r in range(2)]
    assert pictures(many, 4, 8) == pictures([one], 1, 2)
    assert len(many[0]) == 4 * len(one)


def test_run_goes_on_with_another_number_of_ranks() -> None:
    unbroken = batches(batch_size=256)
    interrupted = batches(batch_size=128, rank=1, num_ranks=2)
    list(islice(interrupted, 2))
    assert interrupted.state_dict() == {"epoch": 0, "num_samples": 512}
    resumed = [batches(batch_size=64, rank=rank, num_ranks=4) for rank in range(4)]
    for loader in resumed:
        loader.load_state_dict(interrupted.state_dict())
    assert pictures(resumed, 0, 3) == pictures([unbroken], 2, 5)


def test_repeated_augmentation_changes_a_picture_anew_each_time() -> None:
    loader = batches(batch_size=255, repeats=3)
    first = next(iter(loader))
    assert len(loader) == 1437 // 256 * 256 // 255
    counts = first.indices.unique(return_counts=True)[1]
    assert counts.tolist() == [3] * 85
    same = first.pixels[first.indices == first.indices[0]]
    assert not torch.equal(same[0], same[1])
    assert not torch.equal(same[1], same[2])


def test_repeats_are_the_same_after_an_interruption() -> None:
    expected = list(batches(batch_size=300, repeats=3, augmentation=EVERYTHING))
    interrupted = batches(batch_size=300, repeats=3, augmentation=EVERYTHING)
    head = list(islice(interrupted, 2))
    resumed = batches(batch_size=300, repeats=3, num_workers=1, augmentation=EVERYTHING)
    resumed.load_state_dict(interrupted.state_dict())
    assert_equal([*head, *resumed], expected)


@pytest.mark.parametrize("num_ranks", [3, 7])
def test_evaluation_gives_each_picture_to_one_rank(num_ranks: int) -> None:
    loaders = [
        EvalBatches(
            DIGITS.val, PREPROCESSING.build(), batch_size=50, rank=rank, num_ranks=num_ranks
        )
        for rank in range(num_ranks)
    ]
    ranks = [torch.cat([batch.indices for batch in loader]) for loader in loaders]
    assert len({len(rank) for rank in ranks}) == 1
    assert len({len(list(loader)) for loader in loaders} | {len(loaders[0])}) == 1
    found = torch.cat(ranks)
    assert sorted(found[found != PADDING].tolist()) == list(range(360))


def test_rank_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must lie between 0 and num_ranks - 1 = 1, got 2"):
        batches(rank=2, num_ranks=2)


def test_step_larger_than_the_set_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=2048 is larger than the training set of 1437"):
        batches(batch_size=512, num_ranks=2, batches_per_step=2)


def test_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=2000 is larger than the training set of 1437"):
        batches(batch_size=2000)


def test_negative_number_of_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="num_workers must be at least 0, got -1"):
        batches(num_workers=-1)


def test_evaluation_sees_every_picture_in_order() -> None:
    loader = EvalBatches(DIGITS.val, PREPROCESSING.build(), batch_size=100)
    assert [len(batch.labels) for batch in loader] == [100, 100, 100, 60]
    assert torch.cat([batch.indices for batch in loader]).tolist() == list(range(360))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_file_is_named_from_any_process(folder: Path, num_workers: int) -> None:
    (folder / "val" / "dog" / "0.png").write_text("no image")
    loader = EvalBatches(
        ImageFolder(root=folder).build().val,
        Preprocessing(image_size=8).build(),
        batch_size=2,
        num_workers=num_workers,
    )
    with pytest.raises(UnreadableImageError) as caught:
        list(loader)
    message = str(caught.value)
    assert "dog/0.png is not an image" in message
    assert message.endswith('leave such files out with on_unreadable="skip"')
    assert "\n" not in message


def test_training_takes_the_next_readable_picture_and_names_the_bad_one(folder: Path) -> None:
    (folder / "train" / "cat" / "1.png").write_text("no image")
    loader = TrainBatches(
        ImageFolder(root=folder, on_unreadable="skip").build().train,
        Preprocessing(image_size=8).build(),
        batch_size=6,
        seed=0,
    )
    (batch,) = list(loader)
    assert sorted(batch.indices.tolist()) == [0, 2, 2, 3, 4, 5]
    assert sorted(batch.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    (reason,) = loader.unreadable
    assert "cat/1.png is not an image" in reason


def test_training_gives_up_when_nothing_can_be_read(folder: Path) -> None:
    images = ImageFolder(root=folder, on_unreadable="skip").open("train")
    for path in images.files:
        path.unlink()
    loader = TrainBatches(images, Preprocessing(image_size=8).build(), batch_size=6, seed=0)
    with pytest.raises(UnreadableImageError, match="100 images in a row cannot be opened; the"):
        list(loader)


def test_evaluation_leaves_unreadable_pictures_out_and_names_them(folder: Path) -> None:
    (folder / "val" / "dog" / "0.png").write_text("no image")
    loader = EvalBatches(
        ImageFolder(root=folder, on_unreadable="skip").build().val,
        Preprocessing(image_size=8).build(),
        batch_size=4,
    )
    (batch,) = list(loader)
    assert batch.labels.tolist() == [0, 0, PADDING, 1]
    assert batch.indices.tolist() == [0, 1, PADDING, 3]
    assert not batch.images[2].any()
    assert "dog/0.png is not an image" in loader.unreadable[0]


def test_seeds_differ_in_every_part() -> None:
    seeds = {derive_seed(*parts) for parts in [(0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1)]}
    assert len(seeds) == 5
