"""Colours of a batch change as in HSV, each picture by its own numbers, within 0..255."""

import colorsys

import pytest
import torch

from visionmamba.data.photometric import UNCHANGED, change_colours, draw_colours

pytestmark = pytest.mark.once


def pictures(count: int = 1) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (count, 3, 9, 7)).float()


def changed(images: torch.Tensor, **changes: float) -> torch.Tensor:
    names = ("brightness", "contrast", "saturation", "hue", "contrast_later")
    numbers = dict(zip(names, UNCHANGED, strict=True)) | changes
    return change_colours(images, torch.tensor([list(numbers.values())] * len(images)))


def test_nothing_changes_by_the_numbers_of_none() -> None:
    torch.testing.assert_close(changed(pictures()), pictures(), rtol=0, atol=1e-3)


def test_brightness_is_added_and_contrast_multiplied() -> None:
    images = pictures()
    torch.testing.assert_close(changed(images, brightness=20.0), (images + 20).clamp(max=255))
    wanted = (images * 1.5).clamp(max=255)
    for name in ("contrast", "contrast_later"):
        torch.testing.assert_close(changed(images, **{name: 1.5}), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("saturation", "hue"), [(1.4, 0.0), (0.5, 36.0), (1.0, -36.0), (1.5, 20.0)]
)
def test_saturation_and_hue_are_those_of_hsv(saturation: float, hue: float) -> None:
    images = pictures()
    images[..., 0, 0], images[..., 1, 0], images[..., 2, 0] = 0.0, 255.0, 90.0  # without a hue
    found = changed(images, saturation=saturation, hue=hue)
    for pixel, answer in zip(images[0].flatten(1).T, found[0].flatten(1).T, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255).tolist())
        wanted = colorsys.hsv_to_rgb((h + hue / 360) % 1, min(s * saturation, 1.0), v)
        torch.testing.assert_close(answer / 255, torch.tensor(wanted), rtol=0, atol=1e-5)


def test_each_picture_has_its_own_numbers() -> None:
    images = pictures(count=6)
    colours = torch.tensor([draw_colours() for _ in images])
    together = change_colours(images, colours)
    alone = [change_colours(*one) for one in zip(images.split(1), colours.split(1), strict=True)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert together.min() >= 0
    assert together.max() <= 255


def test_half_of_each_change_is_drawn_and_one_contrast() -> None:
    torch.manual_seed(0)
    drawn = torch.tensor([draw_colours() for _ in range(2000)])
    is_changed = drawn != torch.tensor(UNCHANGED)
    shares = is_changed.float().mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.5, 0.5, 0.25]), rtol=0, atol=0.04)
    assert not (is_changed[:, 1] & is_changed[:, 4]).any()
