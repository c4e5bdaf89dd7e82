"""Counting what the loader gives and how long it is waited for."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest

from visionmamba.training.loader import LoaderTimes, TimedBatches

pytestmark = pytest.mark.once


class SlowBatches:
    """Three batches, each 20 ms in the making."""

    unreadable = ()
    epoch = 0

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]

    def workers_kept(self) -> AbstractContextManager[None]:
        return nullcontext()


def test_waiting_is_told_from_working() -> None:
    times = LoaderTimes()
    batches = TimedBatches(SlowBatches(), batch_size=4, times=times)
    for _ in batches:
        time.sleep(0.02)
    assert times.num_images == 12
    assert times.waited_seconds >= 0.06
    assert times.seconds - times.waited_seconds >= 0.04  # the work between batches
    assert 0 < times.waiting_share < 1


def test_counts_go_on_after_a_resume() -> None:
    times = LoaderTimes(**LoaderTimes(num_images=10, seconds=2.0, waited_seconds=1.0).to_dict())
    assert times.images_per_second == 5
    assert times.waiting_share == pytest.approx(0.5)


def test_place_in_the_data_is_that_of_the_batches() -> None:
    batches = TimedBatches(SlowBatches(), batch_size=4, times=LoaderTimes())
    batches.sampler.set_epoch(3)
    assert batches.state_dict() == {"epoch": 3}
    batches.load_state_dict({"epoch": 5})
    assert batches.state_dict() == {"epoch": 5}
