"""Order and random changes depend on seed, epoch and picture alone."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from visionmamba.data import (
    PADDING,
    Augmentation,
    Batch,
    Digits,
    EvalBatches,
    ImageFolder,
    Preprocessing,
    TrainBatches,
    UnreadableImageError,
    derive_seed,
)

PREPROCESSING = Preprocessing(image_size=8, crop_fraction=1, mean=(0.5,), std=(0.5,), channels="L")
AUGMENTATION = Augmentation(rotation_degrees=10, translation=0.1, zoom=0.1)


def batches(*, seed: int = 0, num_workers: int = 0, batch_size: int = 256) -> TrainBatches:
    return TrainBatches(
        Digits().build().train,
        PREPROCESSING.build(AUGMENTATION),
        batch_size=batch_size,
        seed=seed,
        num_workers=num_workers,
    )


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.indices, other.indices)


def test_epoch_holds_every_picture_at_most_once() -> None:
    indices = torch.cat([batch.indices for batch in batches()])
    assert len(indices) == 5 * 256
    assert len(indices.unique()) == len(indices)


def test_same_seed_gives_same_batches() -> None:
    assert_equal(list(batches()), list(batches()))


def test_other_seed_or_epoch_gives_another_order() -> None:
    loader = batches()
    first, second = list(loader), list(loader)
    assert not torch.equal(first[0].indices, second[0].indices)
    assert not torch.equal(first[0].indices, next(iter(batches(seed=1))).indices)


def test_changes_of_a_picture_differ_between_epochs() -> None:
    loader = batches()
    first = {int(i): x for b in loader for i, x in zip(b.indices, b.images, strict=True)}
    second = {int(i): x for b in loader for i, x in zip(b.indices, b.images, strict=True)}
    shared = next(iter(first.keys() & second.keys()))
    assert not torch.equal(first[shared], second[shared])


def test_number_of_workers_changes_nothing() -> None:
    assert_equal(list(batches()), list(batches(num_workers=2)))


def test_global_random_state_neither_matters_nor_moves() -> None:
    expected = list(batches())
    torch.manual_seed(123)
    before = torch.get_rng_state()
    actual = list(batches())
    assert torch.equal(torch.get_rng_state(), before)
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


def test_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=2000 is larger than the training set of 1437"):
        batches(batch_size=2000)


def test_negative_number_of_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="num_workers must be at least 0, got -1"):
        batches(num_workers=-1)


def test_evaluation_sees_every_picture_in_order() -> None:
    loader = EvalBatches(Digits().build().val, PREPROCESSING.build(), batch_size=100)
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
