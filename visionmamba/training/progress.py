"""Progress of a run: a bar over all steps on a terminal, a line an epoch elsewhere."""

from typing import Any, cast

import pytorch_lightning as lightning
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from typing_extensions import override

from visionmamba.training.engine import Engine
from visionmamba.training.graphs import launch_text
from visionmamba.training.recorder import Recorder

_SHOW_EVERY_STEPS = 10
_BAR_WIDTH = 16  # all columns together fit into 80 characters


class ProgressBar(lightning.Callback):
    """Shows how a GPU is kept busy, then epoch, loss and the monitored metric, on stderr."""

    def __init__(self, recorder: Recorder, *, title: str, epochs: int, monitor: str) -> None:
        self._recorder = recorder
        self._title = title
        self._epochs = epochs
        self._monitor = monitor
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=_BAR_WIDTH),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=self._console,
            refresh_per_second=4,
            disable=not self._console.is_terminal,
        )
        self._line = TaskID(0)

    @override
    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if trainer.strategy.root_device.type == "cuda":
            launch = launch_text(cast(Engine, pl_module).one_by_one)
            self._console.print(f"{self._title}  {launch}", highlight=False)
        self._line = self._bar.add_task(
            self._title,
            total=int(trainer.estimated_stepping_batches),
            completed=trainer.global_step,
            values="",
        )
        self._bar.start()

    @override
    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step % _SHOW_EVERY_STEPS == 0:
            loss = cast(Engine, pl_module).step_values.get("train_loss", float("nan"))
            self._show(trainer, f"loss {loss:.3f}")

    @override
    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        loss = cast(Engine, pl_module).step_values["train_loss"]
        self._show(trainer, f"loss {loss:.3f}")
        if not self._console.is_terminal:
            self._console.print(
                f"{self._title}  epoch {trainer.current_epoch + 1}/{self._epochs}  "
                f"loss {loss:.3f}  {self._metric()}",
                highlight=False,
            )

    @override
    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        self._bar.stop()

    def _show(self, trainer: lightning.Trainer, loss: str) -> None:
        epoch = f"epoch {trainer.current_epoch + 1}/{self._epochs}"
        self._bar.update(
            self._line,
            completed=trainer.global_step,
            values=f"{epoch}  {loss}  {self._metric()}",
        )

    def _metric(self) -> str:
        if not self._recorder.metrics:
            return ""
        return f"{self._monitor} {self._recorder.metrics[self._monitor]:.4f}"
