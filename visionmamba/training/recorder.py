"""What a run leaves behind and when: rows of metrics, pictures, weights, checkpoints."""

import copy
import io
import json
import math
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as lightning
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from typing_extensions import override

from visionmamba.training.checkpoint import replace_file
from visionmamba.training.engine import STATE_KEY, Engine
from visionmamba.training.experiment import Experiment, Task
from visionmamba.training.folder import CHECKPOINT, CLASSES, METRICS, PICTURES, UNREADABLE
from visionmamba.training.loader import LoaderTimes
from visionmamba.training.metrics import ClassesFile, MetricsFile
from visionmamba.training.sharding import whole_state
from visionmamba.training.stopping import Interrupted, StopRequest
from visionmamba.training.world import World

_MAX_SAVING_SHARE = 0.05  # of the time, that checkpoints after epochs may take


class Recorder(lightning.Callback):
    """Writes metrics, weights and checkpoints of a run into its folder, from the main process.

    The order makes every file agree with the checkpoint that follows: rows and best weights first.
    No checkpoint is taken between the last step of an epoch and the end of its validation. Where
    epochs are so short that writing would slow them down, not each is followed by one.
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
        world: World,
        times: LoaderTimes,
    ) -> None:
        """Takes the state of the run from its last checkpoint, or an empty one."""
        self._experiment = experiment
        self._task = experiment.task
        self._out = out
        self._checkpoint_every_steps = checkpoint_every_steps
        self._identity = identity
        self._stop = stop
        self._world = world
        self._times = times
        self.saved_step: int = state.get("step", 0)
        self._noted_step = self.saved_step
        self._seconds_before: float = state.get("seconds", 0.0)
        self._started = time.monotonic()
        self._saved_at, self._seconds_of_saving = -math.inf, 0.0
        self._best_states: dict[str, dict[str, Tensor]] = {}
        self.metrics: dict[str, float] = state.get("metrics", {})
        self.best: dict[str, float] = state.get("best", {})
        self.best_ema: dict[str, float] = state.get("best_ema", {})
        self.unreadable: dict[str, list[str]] = state.get("unreadable", {"train": [], "val": []})
        self._file: MetricsFile | None = None
        self._classes: ClassesFile | None = None
        self._writer: Task | None = None
        if world.is_main:
            names = experiment.task.metric_names
            if experiment.ema_decay is not None:
                names += tuple(f"{name}_ema" for name in names)
            path = out / METRICS
            self._file = MetricsFile(path, metric_names=names, last_step=self.saved_step)
            self._classes = ClassesFile(out / CLASSES, last_step=self.saved_step)
            self._writer = copy.deepcopy(experiment.task)  # stays whole, on the CPU

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, over all its pieces up to their checkpoints."""
        return self._seconds_before + time.monotonic() - self._started

    @override
    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._started = time.monotonic()
        self._stop.take_signals()  # pytorch-lightning's handler talks to the other processes

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
            self._write(trainer, cast(Engine, pl_module).step_values)
            self._log(trainer, {"loader_waiting_share": self._times.waiting_share})
        if batch_idx + 1 == len(self._experiment.train_batches):
            return
        if self._stop.is_agreed or step % self._checkpoint_every_steps == 0:
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
        engine = cast(Engine, pl_module)
        self.metrics, classes = engine.validation_results()
        self._write(trainer, self.metrics)
        if self._classes is not None and classes:
            step, epoch = trainer.global_step, trainer.current_epoch + 1
            self._classes.append(classes, step=step, epoch=epoch)
        if engine.picture is not None and self._world.is_main:
            self._write_picture(trainer, engine.picture)
        self._gather_unreadable()
        num_unreadable = sum(map(len, self.unreadable.values()))
        self._log(trainer, {"unreadable_files": num_unreadable})
        epoch, monitor = trainer.current_epoch + 1, self._task.monitor
        if not self.best or self.metrics[monitor] > self.best[monitor]:
            self.best = {"epoch": epoch, **self.metrics}
            self._hold("best.safetensors", whole_state(self._task.model.state_dict()))
        monitor = f"{monitor}_ema"
        if engine.average is not None and (
            not self.best_ema or self.metrics[monitor] > self.best_ema[monitor]
        ):
            self.best_ema = {"epoch": epoch, **self.metrics}
            self._hold("best_ema.safetensors", engine.average.state())

    @override
    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        is_last = trainer.current_epoch + 1 == self._experiment.epochs
        since = time.monotonic() - self._saved_at
        is_worth_it = since >= self._seconds_of_saving / _MAX_SAVING_SHARE
        if is_last or self._stop.is_agreed or self._world.from_main(is_worth_it):
            self._save(trainer)
        if not is_last:
            self._stop_if_asked()

    @override
    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Writes the last weights; comes only when all epochs are done."""
        engine = cast(Engine, pl_module)
        self._write_weights("last.safetensors", whole_state(self._task.model.state_dict()))
        if engine.average is not None:
            engine.begin_average()
            self._write_weights("last_ema.safetensors", engine.average.state())

    @override
    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        average = cast(Engine, pl_module).average
        checkpoint[STATE_KEY] = {
            "identity": self._identity,
            "step": trainer.global_step,
            "passes_per_step": self._experiment.passes_per_step,
            "seconds": self.seconds,
            "loader": self._times.to_dict(),
            "metrics": self.metrics,
            "best": self.best,
            "best_ema": self.best_ema,
            "unreadable": self.unreadable,
            "average": None if average is None else average.state(),
        }

    def _write(self, trainer: lightning.Trainer, values: dict[str, float]) -> None:
        step, epoch = trainer.global_step, trainer.current_epoch + 1
        if self._file is not None:
            self._file.append({"step": step, "epoch": epoch, **values})
        self._log(trainer, {"epoch": epoch, **values})

    def _log(self, trainer: lightning.Trainer, values: dict[str, float]) -> None:
        cast(TensorBoardLogger, trainer.logger).log_metrics(values, trainer.global_step)

    def _write_picture(self, trainer: lightning.Trainer, picture: Image.Image) -> None:
        epoch = trainer.current_epoch + 1
        picture = picture.convert("RGB")
        (self._out / PICTURES).mkdir(exist_ok=True)
        png = io.BytesIO()
        picture.save(png, format="PNG")
        target = self._out / PICTURES / f"epoch_{epoch:04}.png"
        replace_file(target, lambda file: file.write(png.getvalue()))
        board = cast(TensorBoardLogger, trainer.logger).experiment
        board.add_image("predictions", np.asarray(picture), trainer.global_step, dataformats="HWC")

    def _gather_unreadable(self) -> None:
        """Adds what the processes have met in the meantime, and names all of it in a file."""
        experiment = self._experiment
        batches = {"train": experiment.train_batches, "val": experiment.val_batches}
        texts = self._world.gather(
            json.dumps({name: one.unreadable for name, one in batches.items()})
        )
        for text in texts:
            for name, reasons in json.loads(text or "{}").items():
                known = dict.fromkeys(self.unreadable[name])
                self.unreadable[name] = list(known | dict.fromkeys(reasons))
        lines = [f"{name}: {reason}" for name, all_ in self.unreadable.items() for reason in all_]
        if lines and self._world.is_main:
            text = "\n".join(lines) + "\n"
            replace_file(self._out / UNREADABLE, lambda file: file.write(text.encode()))

    def _hold(self, name: str, state: dict[str, Tensor]) -> None:
        """Keeps weights until the next checkpoint, whose best they are."""
        if self._world.is_main:
            self._best_states[name] = {key: tensor.clone() for key, tensor in state.items()}

    def _write_weights(self, name: str, state: dict[str, Tensor]) -> None:
        if self._writer is None:
            return
        self._writer.model.load_state_dict(state)
        self._writer.save_weights(self._out / name)

    def _save(self, trainer: lightning.Trainer) -> None:
        started = time.monotonic()
        for name, state in self._best_states.items():
            self._write_weights(name, state)
        self._best_states.clear()
        trainer.save_checkpoint(self._out / CHECKPOINT)
        self.saved_step, self._saved_at = trainer.global_step, time.monotonic()
        self._seconds_of_saving = self._saved_at - started

    def _stop_if_asked(self) -> None:
        if self._stop.is_agreed:
            raise Interrupted
