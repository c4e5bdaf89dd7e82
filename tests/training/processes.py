"""Runs of `fit` in processes of their own, which kill themselves with SIGKILL when told to."""

import io
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytorch_lightning  # noqa: F401  # imported once, by the server that forks the processes
import sklearn.model_selection  # noqa: F401
import torch

from tests.training.small import small_recipe
from visionmamba.recipes import Recipe
from visionmamba.training import Experiment, fit

SERVER = multiprocessing.get_context("forkserver")
"""Starts processes that have all imports behind them."""
SERVER.set_forkserver_preload(["tests.training.processes"])


@dataclass(frozen=True, kw_only=True)
class Death:
    """When a process kills itself."""

    at_batch: int | None = None
    """As it is about to train on this batch, counted from 0 over all epochs."""
    in_checkpoint: int | None = None
    """Half-way through writing its checkpoint of this number, counted from 1."""


def train_in_process(out: Path, order: Path, death: Death | None = None, **changes: Any) -> int:
    """Trains the small recipe, notes its batches, and returns the exit code, -9 when killed."""
    process = SERVER.Process(target=_train, args=(out, order, death or Death(), changes))
    process.start()
    process.join()
    code = process.exitcode
    process.close()
    assert code is not None
    return code


def read_order(order: Path) -> dict[int, str]:
    """Returns the pictures of each batch trained on; one repeated after a kill must be the same."""
    batches: dict[int, str] = {}
    for line in order.read_text().splitlines():
        number, pictures = line.split(":")
        assert batches.setdefault(int(number), pictures) == pictures
    return batches


@dataclass(frozen=True, kw_only=True)
class _WatchedRecipe(Recipe):
    """The same run as the recipe it is made from, with its batches noted down."""

    def build(self, *, num_workers: int = 0, rank: int = 0, num_ranks: int = 1) -> Experiment:
        experiment = super().build(num_workers=num_workers, rank=rank, num_ranks=num_ranks)
        return replace(experiment, train_batches=_WatchedBatches(experiment.train_batches))


class _WatchedBatches:
    order: Path
    death: Death

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self.sampler = batches

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def unreadable(self) -> tuple[str, ...]:
        unreadable: tuple[str, ...] = self._batches.unreadable
        return unreadable

    def state_dict(self) -> dict[str, int]:
        state: dict[str, int] = self._batches.state_dict()
        return state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._batches.load_state_dict(state)

    def set_epoch(self, epoch: int) -> None:
        self._batches.set_epoch(epoch)

    def workers_kept(self) -> AbstractContextManager[None]:
        kept: AbstractContextManager[None] = self._batches.workers_kept()
        return kept

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            place = self._batches.state_dict()
            number = place["epoch"] * len(self) + place["num_samples"] // 128 - 1
            if number == self.death.at_batch:
                os.kill(os.getpid(), signal.SIGKILL)
            with open(self.order, "a") as order:
                order.write(f"{number}:{batch.indices.tolist()} {batch.pixels.double().sum()}\n")
            yield batch


def _train(out: Path, order: Path, death: Death, changes: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    _WatchedBatches.order, _WatchedBatches.death = order, death
    if death.in_checkpoint is not None:
        _die_in_checkpoint(death.in_checkpoint)
    recipe = small_recipe(**changes)
    watched = _WatchedRecipe(
        **{field.name: getattr(recipe, field.name) for field in fields(recipe)}
    )
    fit(watched, out, device="cpu", checkpoint_every_steps=4, progress=False)


def _die_in_checkpoint(number: int) -> None:
    save, count = torch.save, 0

    def save_by_half(checkpoint: Any, file: Any) -> None:
        nonlocal count
        count += 1
        if count < number:
            save(checkpoint, file)
            return
        whole = io.BytesIO()
        save(checkpoint, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_by_half
