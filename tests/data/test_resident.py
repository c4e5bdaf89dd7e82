"""Pictures that stay on the device: cut out and changed as by torchvision and timm."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as v2

from tests.training.small import small_recipe
from visionmamba.data import (
    Augmentation,
    Batch,
    EvalBatches,
    KeptEvalBatches,
    Preprocessing,
    ResidentTrainBatches,
    UnreadableImageError,
)
from visionmamba.data.resident import Changes, ResidentBatch
from visionmamba.data.sets import LabelledImages, OnUnreadable
from visionmamba.training import fit

pytestmark = pytest.mark.once

SIZES = [(20, 31), (16, 16), (40, 17), (18, 18), (25, 60), (16, 22)]
PREPROCESSING = Preprocessing(image_size=(16, 20), crop_fraction=0.3)
CHANGED = Augmentation(
    min_crop_area=0.2, horizontal_flip=True, color_jitter=0.4, erase_probability=0.5
)


class Pictures(LabelledImages):
    """Noise of several sizes; picture 2 cannot be read if so asked."""

    def image(self, index: int) -> Image.Image:
        if index == 2 and "broken" in self.class_names:
            raise UnreadableImageError("picture 2 is no picture")
        noise = np.random.default_rng(index).integers(0, 256, (*SIZES[index], 3), dtype=np.uint8)
        return Image.fromarray(noise)


def pictures(*, other: str = "b", on_unreadable: OnUnreadable = "fail") -> Pictures:
    labels = tuple(index % 2 for index in range(len(SIZES)))
    return Pictures(labels=labels, class_names=("a", other), on_unreadable=on_unreadable)


def batches_of(
    augmentation: Augmentation = CHANGED, *, batch_size: int = 2, **options: int
) -> ResidentTrainBatches:
    return ResidentTrainBatches(
        pictures(), PREPROCESSING, augmentation, batch_size=batch_size, seed=3, **options
    )


def drawn(batches: ResidentTrainBatches, num_epochs: int = 1) -> Iterator[ResidentBatch]:
    for _ in range(num_epochs):
        yield from batches


def test_boxes_are_resized_and_mirrored_as_by_torchvision() -> None:
    plain = Augmentation(min_crop_area=0.2, horizontal_flip=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    num_flipped = 0
    for batch in drawn(batches_of(plain), 4):
        images = batch.to("cpu").images * std + mean
        for image, index, box, is_flipped in zip(
            images, batch.indices, batch.changes.boxes, batch.changes.flips, strict=True
        ):
            whole = v2.pil_to_tensor(pictures().image(int(index))).float() / 255
            cut = v2.crop(whole, *(int(side) for side in box))
            expected = F.interpolate(cut[None], PREPROCESSING.size, mode="bilinear")[0]
            num_flipped += is_flipped
            torch.testing.assert_close(image, expected.flip(2) if is_flipped else expected)
    assert 4 < num_flipped < 20


def test_without_random_crops_the_middle_is_taken_as_in_evaluation() -> None:
    small = replace(PREPROCESSING, image_size=(28, 28), interpolation="bilinear", crop_fraction=0.8)
    batches = ResidentTrainBatches(pictures(), small, Augmentation(), batch_size=6, seed=0)
    batch = next(iter(batches)).to("cpu")
    transform = small.build()
    for image, index in zip(batch.images, batch.indices, strict=True):
        expected = transform(pictures().image(int(index)))
        inside = (slice(None), slice(2, -2), slice(2, -2))  # a box of PIL has neighbours beyond
        assert (image[inside] - expected[inside]).abs().max() < 0.06  # PIL rounds to 8 bits


def test_colours_are_those_of_torchvision() -> None:
    sharp = Augmentation(color_jitter=0.4)
    changed = next(iter(batches_of(sharp, batch_size=6)))
    images = changed.to("cpu").images
    plain = replace(changed, changes=replace(changed.changes, colours=np.ones((6, 3), "float32")))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    for image, before, factors in zip(
        images, plain.to("cpu").images * std + mean, changed.changes.colours.tolist(), strict=True
    ):
        expected = v2.adjust_brightness(before, factors[0])
        expected = v2.adjust_contrast(expected, factors[1])
        expected = v2.adjust_saturation(expected, factors[2])
        torch.testing.assert_close(image * std + mean, expected, atol=2e-3, rtol=0)


def test_rectangles_become_noise_and_nothing_else_changes() -> None:
    changed = next(iter(batches_of(batch_size=6)))
    nowhere = replace(changed.changes, erased=np.zeros((6, 4), dtype=np.int64))
    image_pairs = zip(
        changed.to("cpu").images,
        replace(changed, changes=nowhere).to("cpu").images,
        changed.changes.erased.tolist(),
        strict=True,
    )
    erased = 0
    for image, before, (top, left, height, width) in image_pairs:
        differs = (image != before).all(0)
        assert int((image != before).any(0).sum()) == height * width
        assert differs[top : top + height, left : left + width].all()
        erased += height > 0
    assert 0 < erased < 6


def test_what_is_drawn_lies_where_it_may() -> None:
    sizes = np.random.default_rng(0).integers(60, 120, (4000, 2))
    seeds = np.arange(4000, dtype=np.uint64)
    changes = Changes.draw(sizes, seeds, PREPROCESSING, CHANGED)
    top, left, height, width = changes.boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()
    shares = height * width / sizes.prod(1)
    assert 0.15 < shares.min() < 0.25 < 0.5 < shares.mean() < 0.65
    assert np.quantile(width / height, 0.02) > 0.6
    assert 0.47 < changes.flips.mean() < 0.53
    assert abs(changes.colours.mean() - 1) < 0.01
    assert 0.59 < changes.colours.min() < 0.61 < 1.39 < changes.colours.max() < 1.41
    assert 0.46 < (changes.erased[:, 2] > 0).mean() < 0.54
    assert (changes.erased[:, 0] + changes.erased[:, 2] <= 16).all()
    assert (changes.erased[:, 1] + changes.erased[:, 3] <= 20).all()
    again = Changes.draw(sizes[7:9], seeds[7:9], PREPROCESSING, CHANGED)
    np.testing.assert_array_equal(again.boxes, changes.boxes[7:9])
    np.testing.assert_array_equal(again.erased, changes.erased[7:9])


def test_ranks_and_interruptions_do_not_show() -> None:
    alone = [batch.to("cpu") for batch in drawn(batches_of(replace(CHANGED, erase_probability=0)))]
    plain = replace(CHANGED, erase_probability=0)
    shared = [
        [batch.to("cpu") for batch in batches_of(plain, batch_size=1, rank=rank, num_ranks=2)]
        for rank in range(2)
    ]
    for whole, *halves in zip(alone, *shared, strict=True):
        assert torch.equal(whole.images, torch.cat([half.images for half in halves]))
        assert torch.equal(whole.labels, torch.cat([half.labels for half in halves]))
    begun, resumed = batches_of(plain), batches_of(plain)
    next(iter(begun))
    resumed.load_state_dict(begun.state_dict())
    assert torch.equal(next(iter(resumed)).to("cpu").images, alone[1].images)
    second = list(drawn(begun, 1))[-1]
    assert not torch.equal(next(iter(begun)).to("cpu").images, alone[0].images)
    assert second.indices.tolist() == alone[-1].indices.tolist()


def test_other_processes_read_the_same_pictures() -> None:
    assert torch.equal(
        next(iter(batches_of(num_workers=1))).to("cpu").images,
        next(iter(batches_of())).to("cpu").images,
    )


def test_unreadable_pictures_are_named_or_replaced_by_the_next() -> None:
    def batches(on_unreadable: OnUnreadable) -> ResidentTrainBatches:
        images = pictures(other="broken", on_unreadable=on_unreadable)
        return ResidentTrainBatches(images, PREPROCESSING, CHANGED, batch_size=6, seed=0)

    with pytest.raises(UnreadableImageError, match=r"picture 2 is no picture, or leave such files"):
        next(iter(batches("fail")))
    skipping = batches("skip")
    assert sorted(next(iter(skipping)).to("cpu").indices.tolist()) == [0, 1, 3, 3, 4, 5]
    assert skipping.unreadable == ("picture 2 is no picture",)


def test_what_is_not_made_on_the_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leave augmentation\.auto_augment, augmentation\.zoom"):
        batches_of(Augmentation(auto_augment="rand-m9", zoom=0.1))


def test_pictures_far_larger_than_the_input_are_read_smaller() -> None:
    small = replace(PREPROCESSING, image_size=(8, 8), crop_fraction=0.875)
    batches = ResidentTrainBatches(pictures(), small, CHANGED, batch_size=6, seed=0)
    sizes = next(iter(batches)).store.sizes
    assert (sizes.min(1) == 9).all()


def test_kept_batches_are_those_of_evaluation_and_opened_once() -> None:
    class Counting(Pictures):
        def image(self, index: int) -> Image.Image:
            opened.append(index)
            return super().image(index)

    opened: list[int] = []
    images = Counting(labels=pictures().labels, class_names=("a", "b"))
    kept = KeptEvalBatches(EvalBatches(images, PREPROCESSING.build(), batch_size=4))
    next(iter(kept))  # a pass that is broken off is not kept
    opened.clear()
    asked = iter(kept)  # whoever knows the length, as training loops do, asks for no more
    passes: list[list[Batch]] = [[next(asked) for _ in range(len(kept))], list(kept)]
    assert opened == list(range(len(SIZES)))
    assert len(kept) == 2
    for first, second in zip(*passes, strict=True):
        assert torch.equal(first.images, second.images)


def test_a_recipe_learns_from_resident_pictures(tmp_path) -> None:  # type: ignore[no-untyped-def]
    recipe = small_recipe(resident=True, augmentation=Augmentation(min_crop_area=0.5))
    result = fit(recipe, tmp_path / "run", device="cpu")
    again = fit(recipe, tmp_path / "again", device="cpu")
    assert result.metrics["val_accuracy"] == again.metrics["val_accuracy"]
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == (
        tmp_path / "again" / "last.safetensors"
    ).read_bytes()


@pytest.mark.gpu
def test_gpu_makes_the_same_pictures() -> None:
    batch = next(iter(batches_of(replace(CHANGED, erase_probability=0), batch_size=6)))
    on_gpu = batch.to("cuda")
    assert on_gpu.images.is_cuda
    torch.testing.assert_close(on_gpu.images.cpu(), batch.to("cpu").images, atol=1e-4, rtol=0)
