"""Rectangles are drawn as by timm's RandomErasing, and noise stays inside of them."""

import pytest
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from visionmamba.data.erasing import NOTHING, draw_rectangle, erase

pytestmark = pytest.mark.once


def heights_and_widths(masks: list[Tensor]) -> Tensor:
    """(num, 2) of the rectangles of zeros in (H, W) masks."""
    return torch.stack(
        [torch.stack([(mask == 0).any(1).sum(), (mask == 0).any(0).sum()]) for mask in masks]
    )


def test_rectangles_are_as_large_and_as_long_as_timms() -> None:
    timms = RandomErasing(1.0, mode="const", device="cpu")
    wanted = heights_and_widths([timms(torch.ones(1, 60, 80))[0] for _ in range(1500)]).double()
    drawn = torch.tensor([draw_rectangle((60, 80)) for _ in range(1500)]).double()
    found = drawn[:, 2:]
    torch.testing.assert_close(found.prod(1).mean(), wanted.prod(1).mean(), rtol=0.06, atol=0)
    torch.testing.assert_close(found.mean(0), wanted.mean(0), rtol=0.06, atol=0)
    torch.testing.assert_close(found.std(0), wanted.std(0), rtol=0.1, atol=0)
    ends = drawn[:, :2] + found
    assert (ends <= torch.tensor([60, 80])).all()
    assert (ends.max(0).values > torch.tensor([57, 77])).all()
    assert (drawn[:, :2].min(0).values == 0).all()


def test_tiny_pictures_stay_whole() -> None:
    assert not any(draw_rectangle((1, 1))[2] for _ in range(20))


def test_noise_is_normal_follows_from_its_seed_and_stays_inside() -> None:
    images = torch.full((3, 2, 40, 50), 7.0)
    rectangles = [(5, 10, 30, 20), NOTHING, (0, 0, 40, 1)]
    erased = erase(images.clone(), rectangles, (2, 3, 4))
    assert not torch.equal(erased, erase(images.clone(), rectangles, (3, 3, 4)))
    alone = erase(images[:1].clone(), rectangles[:1], (2,))  # in whatever batch
    assert torch.equal(erased[:1], alone)
    inside = torch.zeros(3, 40, 50, dtype=torch.bool)
    inside[0, 5:35, 10:30] = inside[2, :, :1] = True
    inside = inside.unsqueeze(1).expand_as(erased)
    assert (erased[~inside] == 7).all()
    assert (erased[inside] != 7).all()
    assert abs(erased[inside].mean()) < 0.1
    assert abs(erased[inside].std() - 1) < 0.1


@pytest.mark.gpu
def test_noise_is_the_same_on_a_gpu():
    images = torch.zeros(2, 3, 64, 48)
    rectangles, seeds = [(0, 0, 60, 40), (3, 5, 20, 20)], (2**62 - 1, 7)
    wanted = erase(images.clone(), rectangles, seeds)
    torch.testing.assert_close(
        erase(images.cuda(), rectangles, seeds).cpu(), wanted, rtol=1e-4, atol=1e-5
    )
