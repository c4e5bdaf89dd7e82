"""The training steps of any task, on pytorch-lightning: randomness, gradients, non-finite values.

What is written when is in recorder.py.
"""

import math
import random
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytorch_lightning as lightning
import torch
from PIL import Image
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from visionmamba.data import derive_seed
from visionmamba.training.average import MovingAverage
from visionmamba.training.backbone import blocks_of
from visionmamba.training.experiment import Experiment, NonFiniteError, Validation
from visionmamba.training.graphs import graph_forward
from visionmamba.training.metrics import ClassValues
from visionmamba.training.sharding import local, shard, whole
from visionmamba.training.stopping import StopRequest
from visionmamba.training.world import World

STATE_KEY = "visionmamba"
"""Entry of a checkpoint that holds the state of the run beside that of the model."""

_MAX_PICTURES = 20  # of a run, spread over its epochs; they are large
_STEP_RANDOMNESS = 2  # a purpose of derive_seed; data/ uses 0 and 1
_REMEDY = "lower optimizer.lr, or set optimizer.clip_norm"


class Engine(lightning.LightningModule):
    """Runs the steps of an experiment; each has its own seed, made of (seed, number of batch)."""

    def __init__(
        self,
        experiment: Experiment,
        *,
        seed: int,
        world: World,
        stop: StopRequest,
        is_sharded: bool,
        one_by_one: str | None,
    ) -> None:
        super().__init__()
        self._experiment = experiment
        self._seed = seed
        self._world = world
        self._stop = stop
        self._is_sharded = is_sharded
        self._is_configured = False
        self._undo_graphs: Callable[[], None] | None = None
        self.task = cast(nn.Module, experiment.task)
        self._task = experiment.task
        self.average: MovingAverage | None = None
        if experiment.ema_decay is not None:
            self.average = MovingAverage(self._task.model, decay=experiment.ema_decay)
        self._loaded_average: dict[str, Tensor] | None = None
        self._loss: Tensor | None = None
        self._batch: Any = None
        self._validations: dict[str, Validation] = {}
        self.one_by_one = one_by_one
        """Why kernels are launched one by one; None: CUDA graphs are replayed."""
        self.picture: Image.Image | None = None
        """What the task draws of the first validation batch of this process, if it is kept."""
        self.step_values: dict[str, float] = {}
        """train_loss (mean over passes and processes), gradient_norm and lr of the last step."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return len(self._experiment.train_batches) // self._experiment.passes_per_step

    @override
    def configure_model(self) -> None:
        if self._is_configured:
            return
        self._is_configured = True
        model = self._task.model
        if self._world.size > 1 and self.trainer.strategy.root_device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        if self._experiment.compile_blocks:
            for block in blocks_of(model):
                block.compile()
        if self._is_sharded:
            assert self.device_mesh is not None
            shard(model, self.device_mesh["data_parallel"])

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer, schedule = self._experiment.optimizer.build(
            self._task.model, steps_per_epoch=self.steps_per_epoch, epochs=self._experiment.epochs
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint[STATE_KEY]
        self._loaded_average = state["average"]
        _rescale_passes(checkpoint, state["passes_per_step"], self._experiment.passes_per_step)
        for group in checkpoint["optimizer_states"][0]["param_groups"]:
            group["fused"] = True if self.trainer.strategy.root_device.type == "cuda" else None

    @override
    def on_train_start(self) -> None:
        self.begin_average()
        if self.one_by_one is None:
            self._undo_graphs = graph_forward(
                self._task.model,
                copies_gradients=self._world.size > 1 or self._experiment.passes_per_step > 1,
                on_failure=self._note_one_by_one,
            )

    def begin_average(self) -> None:
        """Starts the moving average, from the checkpoint if there is one, unless it has begun."""
        if self.average is not None:
            self.average.begin(self._loaded_average)
            self._loaded_average = None

    def release_graphs(self) -> None:
        """Gives the model its own forward back."""
        if self._undo_graphs is not None:
            self._undo_graphs()
            self._undo_graphs = None

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._seed_batch(batch_idx)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._task.training_loss(batch)
        self._batch = batch, batch_idx
        detached = loss.detach()
        self._loss = detached if self._loss is None else self._loss + detached
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
        assert self._loss is not None
        share = 1 / (self._experiment.passes_per_step * self._world.size)
        asked = self._loss.new_full((), self._stop.is_made)  # made there: a copy would wait
        shared = torch.stack([self._loss * share, asked])
        self._loss = None
        self._world.sum(shared)
        # the only wait for the device in a step
        loss, num_stops, norm_value = torch.cat([shared, whole(norm).reshape(1)]).tolist()
        self._stop.agree(num_stops > 0)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"{self._where()} the loss is {loss}; {self._first_bad()}; {_REMEDY}"
            )
        if not math.isfinite(norm_value):
            raise NonFiniteError(
                f"{self._where()} the gradient is not finite, first in "
                f"{self._first_bad_gradient()}; {_REMEDY}"
            )
        clip_norm = self._experiment.optimizer.clip_norm
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        self.step_values = {
            "train_loss": loss,
            "gradient_norm": norm_value,
            "lr": max(group["lr"] for group in optimizer.param_groups),
        }

    @override
    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.average is not None:
            self.average.update()

    @override
    def on_validation_epoch_start(self) -> None:
        endings = ("",) if self.average is None else ("", "_ema")
        self._validations = {ending: self._task.begin_validation() for ending in endings}

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.picture = self._task.draw(batch) if self._draws() else None
        self._validations[""].update(batch)
        if self.average is not None:
            with self.average.in_model():
                self._validations["_ema"].update(batch)

    def validation_results(self) -> tuple[dict[str, float], ClassValues]:
        """Returns metrics, and those of each class if there are any, over all processes.

        Each process must call this once after a validation, of which nothing is kept.
        """
        metrics: dict[str, float] = {}
        classes: ClassValues = {}
        failure: Exception | None = None
        validations, self._validations = self._validations, {}
        for ending, validation in validations.items():
            validation.merge(self._world)
            if not self._world.is_main or failure is not None:
                continue
            try:
                found, of_classes = validation.metrics(), validation.class_metrics() or {}
            except (ValueError, MemoryError) as error:  # else the others would wait for ever
                failure = error
                continue
            metrics |= {f"{name}{ending}": value for name, value in found.items()}
            for name, of_class in of_classes.items():
                row = classes.setdefault(name, {})
                row |= {f"{metric}{ending}": value for metric, value in of_class.items()}
        metrics, classes, failure = self._world.from_main((metrics, classes, failure))
        if failure is not None:
            raise failure
        return metrics, classes

    def _note_one_by_one(self, reason: str) -> None:
        self.one_by_one = reason

    def _draws(self) -> bool:
        is_kept = keeps_picture(self.current_epoch + 1, self._experiment.epochs)
        return is_kept and (self._world.is_main or self._is_sharded)  # sharded models need all

    def _seed_batch(self, batch_idx: int) -> None:
        number = self.current_epoch * len(self._experiment.train_batches) + batch_idx
        rank = (self._world.rank,) if self._world.rank else ()
        seed = derive_seed(self._seed, _STEP_RANDOMNESS, number, *rank)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def _where(self) -> str:
        lr = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
        return f"training stopped at step {self.global_step + 1} with learning rate {lr:.3g}:"

    def _first_bad(self) -> str:
        """Returns which parameter is not finite, or else where such a value first appears.

        All processes come here together and return the same.
        """
        name = self._first_not_finite(dict(self._task.model.named_parameters()))
        if name is not None:
            return f"its first parameter that is not finite is {name}"
        self.release_graphs()
        batch, batch_idx = self._batch
        self._seed_batch(batch_idx)
        found: list[str] = []
        handles = [
            module.register_forward_hook(_note_bad_output(name, found))
            for name, module in self._task.model.named_modules()
            if name
        ]
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                self._task.training_loss(batch)
        finally:
            for handle in handles:
                handle.remove()
        everywhere = self._world.gather(found[0] if found else None)
        name = next((one for one in everywhere if one is not None), None)
        return f"it first appears in layer {name}" if name else "every layer's output is finite"

    def _first_bad_gradient(self) -> str:
        gradients = {
            name: parameter.grad
            for name, parameter in self._task.model.named_parameters()
            if parameter.grad is not None
        }
        return self._first_not_finite(gradients) or "the norm of all together"

    def _first_not_finite(self, named: dict[str, Any]) -> str | None:
        bad = [(~torch.isfinite(local(tensor)).all()).float() for tensor in named.values()]
        counts = self._world.sum(torch.stack(bad)).tolist()
        return next((name for name, count in zip(named, counts, strict=True) if count), None)


def keeps_picture(epoch: int, epochs: int) -> bool:
    """Returns whether a run keeps the picture of an epoch: the last, and some before it."""
    return epoch == epochs or epoch % -(-epochs // _MAX_PICTURES) == 0


def _rescale_passes(checkpoint: dict[str, Any], former: int, current: int) -> None:
    """Makes the loop's counts of passes those of another number of passes a step."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["current"], progress["total"]):
        ready = counts["ready"]
        shift = ready // former * current - ready
        for name in ("ready", "started", "processed", "completed"):
            counts[name] += shift


def _note_bad_output(name: str, found: list[str]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple | list) else (output,)
        for tensor in tensors:
            if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                found.append(name)

    return hook
