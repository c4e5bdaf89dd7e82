"""Picture and mask stay together through every change, and the published settings are kept."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tests.data.drawn_masks import bands, pixels
from visionmamba.data import IGNORE, SegmentationAugmentation, SegmentationPreprocessing

pytestmark = pytest.mark.once

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
UNCHANGED = SegmentationAugmentation(
    min_scale=1, max_scale=1, max_category_share=1, flip=0, photometric=False
)
ODD_SIZES = [(41, 67), (97, 33), (65, 63), (7, 5)]  # whose pixels no centre falls between
MOVES = SegmentationAugmentation(photometric=False)


def drawn_pair(height: int, width: int) -> tuple[Image.Image, NDArray[np.uint8]]:
    """A mask of random blocks, and the picture whose gray levels are the mask's numbers."""
    blocks = np.random.default_rng(0).integers(0, 200, (height // 3 + 1, width // 5 + 1), np.uint8)
    mask = np.kron(blocks, np.ones((3, 5), np.uint8))[:height, :width]
    return Image.fromarray(mask).convert("RGB"), mask


def levels(image: Tensor) -> Tensor:
    """(h, w) int64: gray levels of a picture that was not normalised."""
    return (image * 255).round().long()[0]


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("crop", [(32, 48), (31, 17)])
def test_picture_and_mask_move_together(size: tuple[int, int], crop: tuple[int, int]) -> None:
    preprocessing = SegmentationPreprocessing(crop_size=crop, interpolation="nearest", **PLAIN)
    transform = preprocessing.build(MOVES)
    image, mask = drawn_pair(*size)
    for _ in range(10):
        changed, labels = transform(image, mask)
        assert labels is not None
        assert (changed.shape, labels.shape) == ((3, *crop), crop)
        assert (changed.dtype, labels.dtype) == (torch.float32, torch.int64)
        inside = labels != IGNORE
        assert torch.equal(levels(changed)[inside], labels[inside])
        assert not changed[:, ~inside].any()


def test_training_sees_mirrored_pictures_and_sizes_between_the_limits() -> None:
    transform = SegmentationPreprocessing(crop_size=130).build(MOVES)
    mask = np.zeros((40, 60), np.uint8)
    mask[:, :30] = 1
    image = pixels(40, 60)
    widths, starts = [], []
    for _ in range(60):
        _, labels = transform(image, mask)
        assert labels is not None
        inside = labels != IGNORE
        widths.append(int(inside.any(0).sum()))
        assert abs(int(inside.any(1).sum()) - widths[-1] * 40 / 60) <= 1
        starts.append(int(labels[0, 0]))
    assert 30 <= min(widths) < 40 < 110 < max(widths) <= 120
    assert set(starts) == {0, 1}


def test_unchanged_training_is_the_padded_picture() -> None:
    preprocessing = SegmentationPreprocessing(crop_size=(20, 24), **PLAIN)
    image, mask = drawn_pair(13, 17)
    changed, labels = preprocessing.build(UNCHANGED)(image, mask)
    plain, same = preprocessing.build()(image, mask)
    assert labels is not None
    assert same is not None
    assert torch.equal(changed[:, :13, :17], plain)
    assert torch.equal(labels[:13, :17], same)
    assert (labels[13:] == IGNORE).all()
    assert (labels[:, 17:] == IGNORE).all()


def test_padding_is_zero_after_normalisation() -> None:
    transform = SegmentationPreprocessing(crop_size=8).build(UNCHANGED)
    changed, _ = transform(Image.new("RGB", (4, 4), "white"), np.zeros((4, 4), np.uint8))
    assert (changed[:, :4, :4] > 2).all()
    assert not changed[:, 4:].any()


def test_crop_equals_a_crop_of_the_resized_picture() -> None:
    torch.manual_seed(0)
    photo = pixels(20, 30).resize((40, 30), Image.Resampling.BICUBIC)
    doubled = SegmentationAugmentation(
        min_scale=2, max_scale=2, max_category_share=1, flip=0, photometric=False
    )
    preprocessing = SegmentationPreprocessing(crop_size=25, **PLAIN)
    mask = np.zeros((30, 40), np.uint8)
    changed, _ = preprocessing.build(doubled)(photo, mask)
    whole = torch.from_numpy(np.array(photo.resize((80, 60), Image.Resampling.BILINEAR)))
    windows = whole.permute(2, 0, 1).unfold(1, 25, 1).unfold(2, 25, 1)  # (3, 36, 56, 25, 25)
    distance = (windows - (changed * 255)[:, None, None]).abs().amax(dim=(0, 3, 4))
    assert distance.min() <= 1


def test_crops_avoid_one_class_filling_them() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[:, 70:] = 1
    mask[:30] = IGNORE  # does not count
    image = pixels(100, 100)

    def dominated(share: float) -> int:
        augmentation = SegmentationAugmentation(
            min_scale=1, max_scale=1, max_category_share=share, flip=0, photometric=False
        )
        transform = SegmentationPreprocessing(crop_size=40).build(augmentation)
        torch.manual_seed(0)
        found = [transform(image, mask)[1] for _ in range(50)]
        shares = [
            counts.max() / counts.sum()
            for labels in found
            if labels is not None
            for counts in [torch.bincount(labels[labels != IGNORE], minlength=2)]
        ]
        return sum(float(share) > 0.75 for share in shares)

    assert dominated(1.0) > 25
    assert dominated(0.75) < 8  # ten tries each


def test_mask_of_nothing_but_ignored_pixels_is_taken() -> None:
    transform = SegmentationPreprocessing(crop_size=16).build(MOVES)
    _, labels = transform(pixels(20, 20), np.full((20, 20), IGNORE, np.uint8))
    assert labels is not None
    assert (labels == IGNORE).all()


def test_colours_change_and_the_mask_does_not() -> None:
    preprocessing = SegmentationPreprocessing(crop_size=32, **PLAIN)
    augmentation = SegmentationAugmentation(
        min_scale=1, max_scale=1, max_category_share=1, flip=0, photometric=True
    )
    image, mask = pixels(32, 32), bands(32, 32)
    transform = preprocessing.build(augmentation)
    plain = preprocessing.build()(image)[0]
    changes = []
    for _ in range(20):
        changed, labels = transform(image, mask)
        assert labels is not None
        assert np.array_equal(labels.numpy(), mask)
        assert 0 <= changed.min() <= changed.max() <= 1
        changes.append(float((changed - plain).abs().mean()))
    assert max(changes) > 0.05
    assert len(set(changes)) > 10


def test_gray_pictures_stay_gray_under_colour_changes() -> None:
    preprocessing = SegmentationPreprocessing(crop_size=16, **PLAIN)
    transform = preprocessing.build(SegmentationAugmentation(min_scale=1, max_scale=1))
    for _ in range(20):
        changed, _ = transform(Image.new("RGB", (16, 16), (90, 90, 90)))
        assert changed[:, 0, 0].max() - changed[:, 0, 0].min() <= 1.01 / 255


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((512, 683), (512, 683)),
        ((256, 256), (512, 512)),
        ((1024, 2048), (512, 1024)),
        ((300, 2400), (256, 2048)),
        ((1, 100_000), (1, 2048)),
    ],
)
def test_evaluation_size_follows_the_published_resize(
    size: tuple[int, int], resized: tuple[int, int]
) -> None:
    preprocessing = SegmentationPreprocessing(crop_size=512, short_side=512, max_long_side=2048)
    assert preprocessing.evaluation_size(*size) == resized


def test_evaluation_resizes_the_picture_alone() -> None:
    transform = SegmentationPreprocessing(crop_size=16, short_side=20).build()
    changed, labels = transform(pixels(10, 15), bands(10, 15))
    assert changed.shape == (3, 20, 30)
    assert labels is not None
    assert np.array_equal(labels.numpy(), bands(10, 15))
    assert transform(pixels(10, 15))[1] is None


def test_strip_that_would_become_huge_is_refused() -> None:
    preprocessing = SegmentationPreprocessing(crop_size=16, short_side=512)
    with pytest.raises(
        ValueError, match=r"100000x1 px would be resized to .* train with max_long_side"
    ):
        preprocessing.evaluation_size(1, 100_000)


def test_strip_is_cut_in_training_without_being_resized_whole() -> None:
    transform = SegmentationPreprocessing(crop_size=16, short_side=512).build(MOVES)
    changed, _ = transform(Image.new("RGB", (100_000, 1)), np.zeros((1, 100_000), np.uint8))
    assert changed.shape == (3, 16, 16)


def test_mask_of_another_size_is_refused() -> None:
    transform = SegmentationPreprocessing(crop_size=16).build()
    with pytest.raises(ValueError, match="the mask is 5x4 px and the image 10x8"):
        transform(pixels(8, 10), bands(4, 5))


def test_header_brings_preprocessing_back() -> None:
    preprocessing = SegmentationPreprocessing(
        crop_size=(32, 48), short_side=64, interpolation="bicubic", mean=(0.1, 0.2, 0.3)
    )
    values = preprocessing.to_dict()
    assert SegmentationPreprocessing.from_dict(values) == preprocessing
    with pytest.raises(ValueError, match="preprocessing of masks needs the keys"):
        SegmentationPreprocessing.from_dict({**values, "channels": "RGB"})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop_size": 0}, "crop_size must be positive"),
        ({"short_side": 0}, "short_side must be at least 1"),
        ({"max_long_side": 0}, "max_long_side must be at least 1"),
        ({"interpolation": "cubic"}, "interpolation must be one of"),
        ({"mean": (0.5,)}, "mean needs 3 values"),
        ({"std": (0.0, 1.0, 1.0)}, "std must be positive"),
    ],
)
def test_wrong_preprocessing_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationPreprocessing(**{"crop_size": 16, **wrong})


@pytest.mark.parametrize(
    "wrong", [{"min_scale": 0}, {"max_scale": 0.1}, {"max_category_share": 0}, {"flip": 2}]
)
def test_wrong_augmentation_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must lie between"):
        SegmentationAugmentation(**wrong)
