"""How fast training batches come, and whether the training waits for them."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from visionmamba.training.experiment import EpochBatches


@dataclass(kw_only=True)
class LoaderTimes:
    """What one process has counted around `next(batches)`, first batch of each pass included."""

    num_images: int = 0
    """Images it was given."""
    seconds: float = 0.0
    """Wall-clock seconds of training in which they were given out; validation is left out."""
    waited_seconds: float = 0.0
    """Those of them spent waiting for a batch."""

    @property
    def images_per_second(self) -> float:
        """Images given out a second of training."""
        return self.num_images / self.seconds if self.seconds else 0.0

    @property
    def waiting_share(self) -> float:
        """Share of the training time in which the device had no batch, 0 to 1."""
        return self.waited_seconds / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns its counts, ready for a checkpoint."""
        return asdict(self)


class TimedBatches:
    """Training batches that note in `times` how long each was waited for."""

    def __init__(self, batches: EpochBatches, *, batch_size: int, times: LoaderTimes) -> None:
        """Takes the batches and the number of images in each."""
        self._batches = batches
        self._batch_size = batch_size
        self.times = times

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._batches)
        former = time.perf_counter()
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            given = time.perf_counter()
            self.times.num_images += self._batch_size
            self.times.waited_seconds += given - asked
            self.times.seconds += given - former
            former = given
            yield batch

    @property
    def sampler(self) -> "TimedBatches":
        """Itself: training loops look here for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Moves to the start of an epoch, unless that epoch is already under way."""
        self._batches.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """Returns the place in the data."""
        return self._batches.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a place that `state_dict` returned."""
        self._batches.load_state_dict(state)
