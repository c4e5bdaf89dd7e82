"""The moving average of the weights."""

import pytest
import torch
from torch import nn

from visionmamba.training.average import MovingAverage

pytestmark = pytest.mark.once


class Counted(nn.Module):
    """A model of one weight and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))
        self.register_buffer("count", torch.tensor(0))


def advance(model: Counted, average: MovingAverage, value: float) -> None:
    with torch.no_grad():
        model.weight.fill_(value)
    average.update()


def test_average_begins_with_the_weights_and_decays() -> None:
    model = Counted()
    average = MovingAverage(model, decay=0.75)
    average.begin()
    advance(model, average, 3.0)
    advance(model, average, 5.0)
    expected = 0.75 * (0.75 * 1.0 + 0.25 * 3.0) + 0.25 * 5.0
    torch.testing.assert_close(average.state()["weight"], torch.tensor([expected]))


def test_average_copies_counters() -> None:
    model = Counted()
    average = MovingAverage(model, decay=0.75)
    average.begin()
    model.get_buffer("count").fill_(7)
    average.update()
    assert average.state()["count"] == 7


def test_model_has_the_average_inside_and_its_own_weights_after() -> None:
    model = Counted()
    average = MovingAverage(model, decay=0.5)
    average.begin()
    advance(model, average, 3.0)
    with average.in_model():
        assert model.weight.item() == 2.0
    assert model.weight.item() == 3.0
    assert average.state()["weight"].item() == 2.0


def test_average_goes_on_from_its_state() -> None:
    model = Counted()
    average = MovingAverage(model, decay=0.5)
    average.begin({"weight": torch.tensor([9.0]), "count": torch.tensor(3)})
    advance(model, average, 1.0)
    assert average.state()["weight"].item() == 5.0
