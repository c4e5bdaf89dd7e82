"""The training loop of any task, on pytorch-lightning: steps, randomness, records, interruption."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import pytorch_lightning as lightning
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from visionmamba.data import derive_seed
from visionmamba.training.experiment import Experiment, NonFiniteError
from visionmamba.training.metrics import MetricsFile

STATE_KEY = "visionmamba"
"""Entry of a checkpoint that holds the state of the run beside that of the model."""

_STEP_RANDOMNESS = 2  # a purpose of derive_seed; data/ uses 0 and 1


class Engine(lightning.LightningModule):
    """Runs the steps of an experiment; each has its own seed, made of (seed, number of batch)."""

    def __init__(self, experiment: Experiment, *, seed: int) -> None:
        super().__init__()
        self._experiment = experiment
        self._seed = seed
        self.task = cast(nn.Module, experiment.task)
        self._task = experiment.task
        self._step_values: dict[str, float | Tensor] = {}

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        config = self._experiment.optimizer
        steps_per_epoch = -(-len(self._experiment.train_batches) // config.accumulate_batches)
        optimizer, schedule = config.build(
            self._task.model, steps_per_epoch=steps_per_epoch, epochs=self._experiment.epochs
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._seed_batch(batch_idx)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._task.training_loss(batch)
        if not torch.isfinite(loss):
            self._seed_batch(batch_idx)
            raise NonFiniteError(
                f"{self._where()} the loss is {loss.item()}; {self._first_bad(batch)}; {_REMEDY}"
            )
        self._step_values["train_loss"] = loss.detach()
        return loss

    @override
    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        parameters = [p for p in self._task.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters])
        if not torch.isfinite(norm):
            bad_names = (
                name
                for name, parameter in self._task.model.named_parameters()
                if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
            )
            name = next(bad_names, "the norm of all together")
            raise NonFiniteError(
                f"{self._where()} the gradient is not finite, first in {name}; {_REMEDY}"
            )
        clip_norm = self._experiment.optimizer.clip_norm
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        self._step_values["gradient_norm"] = norm
        self._step_values["lr"] = optimizer.param_groups[0]["lr"]

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._task.add_to_validation(batch)

    def step_values(self) -> dict[str, float]:
        """Returns train_loss, gradient_norm and lr of the last step."""
        return {name: float(value) for name, value in self._step_values.items()}

    def _seed_batch(self, batch_idx: int) -> None:
        number = self.current_epoch * len(self._experiment.train_batches) + batch_idx
        torch.manual_seed(derive_seed(self._seed, _STEP_RANDOMNESS, number))

    def _where(self) -> str:
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        return f"training stopped at step {self.global_step + 1} with learning rate {lr:.3g}:"

    def _first_bad(self, batch: Any) -> str:
        """Returns which parameter is not finite, or else where such a value first appears."""
        for name, parameter in self._task.model.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"its first parameter that is not finite is {name}"
        found: list[str] = []
        handles = [
            module.register_forward_hook(_note_bad_output(name, found))
            for name, module in self._task.model.named_modules()
            if name
        ]
        try:
            with torch.no_grad():
                self._task.training_loss(batch)
        finally:
            for handle in handles:
                handle.remove()
        return (
            f"it first appears in layer {found[0]}" if found else "every layer's output is finite"
        )


_REMEDY = "lower optimizer.lr, or set optimizer.clip_norm"


def _note_bad_output(name: str, found: list[str]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple | list) else (output,)
        for tensor in tensors:
            if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                found.append(name)

    return hook


class Interrupted(Exception):
    """The run was asked to stop and has done so, between two steps."""


class StopRequest:
    """Whether Ctrl-C or a termination signal has asked to stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.is_made = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over in its body; signals reach the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in former:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_made:
            raise KeyboardInterrupt
        self.is_made = True


class Recorder(lightning.Callback):
    """Writes metrics, weights and checkpoints of a run into its folder.

    The order makes every file agree with the checkpoint that follows: rows and best weights first.
    No checkpoint is taken between the last step of an epoch and the end of its validation.
    """

    def __init__(
        self,
        experiment: Experiment,
        out: Path,
        *,
        checkpoint_every_steps: int,
        identity: str,
        state: dict[str, Any],
        stop: StopRequest,
    ) -> None:
        """Takes the state of the run from its last checkpoint, or an empty one."""
        self._experiment = experiment
        self._task = experiment.task
        self._out = out
        self._checkpoint_every_steps = checkpoint_every_steps
        self._identity = identity
        self._stop = stop
        self.saved_step: int = state.get("step", 0)
        self._noted_step = self.saved_step
        self._seconds_before: float = state.get("seconds", 0.0)
        self._started = time.monotonic()
        self.metrics: dict[str, float] = state.get("metrics", {})
        self.best: dict[str, float] = state.get("best", {})
        self._file = MetricsFile(
            out / "metrics.csv",
            metric_names=experiment.task.metric_names,
            last_step=self.saved_step,
        )

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, over all its pieces up to their checkpoints."""
        return self._seconds_before + time.monotonic() - self._started

    @override
    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._started = time.monotonic()

    @override
    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step == self._noted_step:
            return  # gradients are still being accumulated
        self._noted_step = step
        if step % self._experiment.log_every_steps == 0:
            self._write(trainer, cast(Engine, pl_module).step_values())
        if batch_idx + 1 == len(self._experiment.train_batches):
            return
        if self._stop.is_made or step % self._checkpoint_every_steps == 0:
            self._save(trainer)
        self._stop_if_asked()

    @override
    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._stop_if_asked()

    @override
    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.metrics = self._task.validation_metrics()
        self._write(trainer, self.metrics)
        monitor = self._task.monitor
        if not self.best or self.metrics[monitor] > self.best[monitor]:
            self.best = {"epoch": trainer.current_epoch + 1, **self.metrics}
            self._task.save_weights(self._out / "best.safetensors")

    @override
    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._save(trainer)
        if trainer.current_epoch + 1 < self._experiment.epochs:
            self._stop_if_asked()

    @override
    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        checkpoint[STATE_KEY] = {
            "identity": self._identity,
            "step": trainer.global_step,
            "seconds": self.seconds,
            "metrics": self.metrics,
            "best": self.best,
        }

    def _write(self, trainer: lightning.Trainer, values: dict[str, float]) -> None:
        step, epoch = trainer.global_step, trainer.current_epoch + 1
        self._file.append({"step": step, "epoch": epoch, **values})
        cast(TensorBoardLogger, trainer.logger).log_metrics({"epoch": epoch, **values}, step)

    def _save(self, trainer: lightning.Trainer) -> None:
        trainer.save_checkpoint(self._out / "last.ckpt")
        self.saved_step = trainer.global_step

    def _stop_if_asked(self) -> None:
        if self._stop.is_made:
            raise Interrupted
