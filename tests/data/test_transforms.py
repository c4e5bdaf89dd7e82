"""From pictures to tensors."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import Compose, v2

from visionmamba.data import Augmentation, Preprocessing

ONE_GREY_LEVEL = 1 / 255


def gradient(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 / height, columns * 255 / width, rows * 0 + 9], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def test_values_are_normalised_by_mean_and_std() -> None:
    preprocessing = Preprocessing(image_size=4, crop_fraction=1, mean=(0, 0.5, 1), std=(1, 2, 4))
    pixels = preprocessing.build()(Image.new("RGB", (4, 4), (255, 255, 255)))
    assert pixels.dtype == torch.float32
    assert pixels[:, 0, 0].tolist() == [1.0, 0.25, 0.0]


@pytest.mark.parametrize("size", [(500, 375), (300, 700), (64, 64)])
def test_one_pass_equals_resize_then_centred_crop(size: tuple[int, int]) -> None:
    image = gradient(*size)
    preprocessing = Preprocessing(image_size=224, mean=(0,) * 3, std=(1,) * 3)
    resized = v2.functional.resize(
        image, [256], interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )
    expected = v2.functional.center_crop(resized, [224])
    expected = v2.functional.to_dtype(v2.functional.pil_to_tensor(expected), scale=True)
    actual = preprocessing.build()(image)
    assert (actual - expected).abs().max() <= 3 * ONE_GREY_LEVEL  # sides round apart by a pixel
    assert (actual - expected).abs().mean() <= ONE_GREY_LEVEL


def test_size_that_fits_is_left_alone() -> None:
    image = gradient(8, 8)
    preprocessing = Preprocessing(image_size=8, crop_fraction=1, mean=(0,) * 3, std=(1,) * 3)
    expected = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(preprocessing.build()(image), expected)


def test_sides_may_differ() -> None:
    assert Preprocessing(image_size=(32, 48)).build()(gradient(100, 100)).shape == (3, 32, 48)


def test_very_long_picture_is_cropped() -> None:
    assert Preprocessing(image_size=32).build()(gradient(20_000, 1)).shape == (3, 32, 32)


def test_colour_becomes_gray_where_one_channel_is_wanted() -> None:
    preprocessing = Preprocessing(image_size=8, channels="L", mean=(0,), std=(1,))
    assert preprocessing.build()(gradient(20, 20)).shape == (1, 8, 8)


def test_gray_becomes_colour_where_three_are_wanted() -> None:
    pixels = Preprocessing(image_size=8).build()(gradient(20, 20).convert("L"))
    assert pixels.shape == (3, 8, 8)


def test_header_holds_everything() -> None:
    preprocessing = Preprocessing(image_size=(8, 9), interpolation="lanczos", crop_fraction=0.9)
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing


def test_incomplete_header_is_refused() -> None:
    with pytest.raises(ValueError, match="preprocessing needs the keys channels, crop_fraction"):
        Preprocessing.from_dict({"mean": [0.5]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size must be positive"),
        ({"crop_fraction": 1.5}, "crop_fraction must lie between 0.01 and 1"),
        ({"interpolation": "cubic"}, "one of bilinear, bicubic, nearest, lanczos, got 'cubic'"),
        ({"channels": "CMYK"}, "channels must be RGB or L"),
        ({"mean": (0.5,)}, "mean needs 3 values for channels='RGB', got 1"),
        ({"std": (1, 0, 1)}, "std must be positive"),
    ],
)
def test_wrong_preprocessing_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{"image_size": 8, **options})  # type: ignore[arg-type]


def seeded(
    transform: Callable[[Image.Image], torch.Tensor], seed: int, image: Image.Image
) -> torch.Tensor:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    return transform(image)


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(min_crop_area=0.3),
        Augmentation(horizontal_flip=True),
        Augmentation(rotation_degrees=20, translation=0.1, zoom=0.2),
        Augmentation(auto_augment="rand-m9-mstd0.5-inc1"),
        Augmentation(color_jitter=0.3),
        Augmentation(erase_probability=0.9),
    ],
    ids=["crop", "flip", "move", "rand", "jitter", "erase"],
)
@pytest.mark.parametrize("channels", ["RGB", "L"])
def test_every_augmentation_follows_the_seeds(augmentation: Augmentation, channels: str) -> None:
    mean = (0.5,) * len(channels)
    transform = Preprocessing(
        image_size=16,
        mean=mean,
        std=mean,
        channels=channels,  # type: ignore[arg-type]
    ).build(augmentation)
    image = gradient(40, 30)
    for seed in range(8):
        assert torch.equal(seeded(transform, seed, image), seeded(transform, seed, image))
    assert any(
        not torch.equal(seeded(transform, 0, image), seeded(transform, seed, image))
        for seed in range(1, 8)
    )


def test_published_augmentation_equals_timms_transform() -> None:
    augmentation = Augmentation(auto_augment="rand-m9-mstd0.5-inc1")
    timms = create_transform(
        32,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        hflip=0,
    )
    changes = Compose(timms.transforms[1:])  # torchvision and timm draw the same crop differently
    image = gradient(32, 32)
    ours = Preprocessing(image_size=32, crop_fraction=1).build(augmentation)
    for seed in range(20):
        expected = seeded(changes, seed, image)
        torch.testing.assert_close(seeded(ours, seed, image), expected)


def test_rand_augment_survives_its_strongest_draws() -> None:
    transform = Preprocessing(image_size=8).build(Augmentation(auto_augment="rand-m10-inc1"))
    image = gradient(8, 8)
    deviations = [seeded(transform, seed, image).std().item() for seed in range(300)]
    assert max(deviations) > 0  # posterizing to no bits, which Pillow 13 refuses, is among them


def test_color_jitter_is_ignored_beside_rand_augment_as_in_timm() -> None:
    words = "rand-m9-mstd0.5-inc1"
    both = Preprocessing(image_size=16).build(Augmentation(auto_augment=words, color_jitter=0.3))
    one = Preprocessing(image_size=16).build(Augmentation(auto_augment=words))
    assert torch.equal(seeded(both, 1, gradient(40, 30)), seeded(one, 1, gradient(40, 30)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto_augment": "rand-k9"}, "must be a RandAugment in timm's words, as rand-m9"),
        ({"auto_augment": "original"}, "got 'original'"),
        ({"color_jitter": -0.1}, "color_jitter must lie between 0 and 1, got -0.1"),
        ({"erase_probability": 2}, "erase_probability must lie between 0 and 1, got 2"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ],
)
def test_wrong_augmentation_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


def test_default_augmentation_changes_nothing() -> None:
    preprocessing = Preprocessing(image_size=16)
    image = gradient(40, 30)
    assert torch.equal(preprocessing.build(Augmentation())(image), preprocessing.build()(image))
