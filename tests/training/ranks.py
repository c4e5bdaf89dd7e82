"""Runs of `fit` in several processes that train together, with the environment torchrun gives.

As a program it is one such process, for real launchers: python -m tests.training.ranks OUT DEVICES.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.recipes import segmenters
from tests.training.processes import SERVER
from tests.training.small import small_recipe
from visionmamba.models.segmentation import SegmentationHead
from visionmamba.recipes import Recipe, SegmentationRecipe
from visionmamba.recipes.dense import DenseRecipe
from visionmamba.training import Experiment, NonFiniteError, fit

STOPPED, NOT_FINITE = 3, 4


def shared_recipe(**changes: Any) -> Recipe:
    """Returns the small recipe with nothing that depends on how a step is divided."""
    recipe = small_recipe(**{"log_every_steps": 1, "ema_decay": 0.9, **changes})
    return replace(recipe, model=replace(recipe.model, drop_path=0.0, dropout=0.0))


def shared_segmentation(*, head: SegmentationHead = "segmenter") -> SegmentationRecipe:
    """Returns the small segmentation with nothing that depends on how a step is divided.

    UperNet's batch norms do, unless GPUs synchronise them.
    """
    recipe = segmenters.small_recipe(ema_decay=0.9)
    backbone = replace(recipe.model.backbone, drop_path=0.0)
    return replace(recipe, model=replace(recipe.model, backbone=backbone, head=head, dropout=0.0))


def train_in_ranks(
    out: Path,
    *,
    ranks: int,
    make: Callable[..., Recipe | DenseRecipe] = shared_recipe,
    strategy: str = "ddp",
    launcher: str = "torchrun",
    device: str = "cpu",
    rank_1: str | None = None,
    at_step: int = 0,
    **changes: Any,
) -> list[int]:
    """Trains a recipe, and returns the exit codes of the processes.

    Args:
        out: folder of the run.
        make: makes the recipe of `changes`.
        ranks: processes; all are killed once one has died, as launchers do.
        strategy: as fit takes it.
        launcher: whose environment they find: "torchrun", "torchrun on machines of one process
            each", "srun".
        device: "cpu" or "cuda".
        rank_1: what befalls the second process after a step: "killed", "asked to stop", "not
            finite"; with one process, what befalls that.
        at_step: the step.
        changes: what `make` is called with.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {
            **_ENVIRONMENTS[launcher](rank, ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        fate = rank_1 if rank == ranks - 1 else None
        given = (out, environment, strategy, device, fate, at_step, make, changes)
        processes.append(SERVER.Process(target=_train, args=given))
    for process in processes:
        process.start()
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode == -signal.SIGKILL for process in processes):
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return [process.exitcode or 0 for process in processes]


def _torchrun(rank: int, ranks: int) -> dict[str, str]:
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
    }


def _torchrun_on_machines(rank: int, ranks: int) -> dict[str, str]:
    here = {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "GROUP_RANK": str(rank)}
    return {**_torchrun(rank, ranks), **here}


def _srun(rank: int, ranks: int) -> dict[str, str]:
    return {
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": str(ranks),
        "SLURM_NTASKS_PER_NODE": str(ranks),
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


_ENVIRONMENTS = {
    "torchrun": _torchrun,
    "torchrun on machines of one process each": _torchrun_on_machines,
    "srun": _srun,
}


class _BreakingRecipe(Recipe):
    """The same run; from a step on, the model's norm gives infinity."""

    def build(self, *, num_workers: int = 0, rank: int = 0, num_ranks: int = 1) -> Experiment:
        experiment = super().build(num_workers=num_workers, rank=rank, num_ranks=num_ranks)
        experiment.task.model.get_submodule("norm").register_forward_hook(
            lambda module, inputs, output: tuple(part * float("inf") for part in output)
        )
        return experiment


def _train(
    out: Path,
    environment: dict[str, str],
    strategy: Any,
    device: str,
    fate: str | None,
    at_step: int,
    make: Callable[..., Recipe | DenseRecipe],
    changes: dict[str, Any],
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    recipe = make(**changes)
    if fate == "not finite":
        assert isinstance(recipe, Recipe)
        values = {name: getattr(recipe, name) for name in recipe.__dataclass_fields__}
        recipe = _BreakingRecipe(**values)
    elif fate is not None:
        number = {"killed": signal.SIGKILL, "asked to stop": signal.SIGTERM}[fate]
        _raise_signal_after(at_step, number)
    try:
        with contextlib.redirect_stderr(None):
            fit(
                recipe,
                out,
                device=device,
                strategy=strategy,
                checkpoint_every_steps=4,
                progress=False,
            )
    except KeyboardInterrupt:
        sys.exit(STOPPED)
    except NonFiniteError as error:
        name = f"error-{environment['RANK']}.txt"
        out.with_name(name).write_text(str(error), encoding="utf-8")
        sys.exit(NOT_FINITE)


def _raise_signal_after(step: int, number: signal.Signals) -> None:
    from visionmamba.training.engine import Engine

    former = Engine.optimizer_step

    def optimizer_step(self: Engine, *given: Any) -> None:
        former(self, *given)
        if self.trainer.global_step + 1 == step:  # counted when this has returned
            signal.raise_signal(number)

    Engine.optimizer_step = optimizer_step  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit(
        shared_recipe(epochs=1),
        sys.argv[1],
        device="cpu",
        devices=int(sys.argv[2]),
        progress=False,
    )
