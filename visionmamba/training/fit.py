"""`fit`: train a recipe into a folder, from the start or from where it was left."""

import json
import logging
import platform
import random
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import distributed

from visionmamba import __version__
from visionmamba.data import explain_out_of_memory
from visionmamba.models.weights import resolve_device
from visionmamba.training.experiment import Experiment, Recipe
from visionmamba.training.folder import (
    CHECKPOINT,
    CURVES,
    LOGS,
    METRICS,
    RECIPE,
    RESULTS,
    identity_of,
    refuse_foreign_files,
    refuse_other_recipe,
    remove_leftovers,
)
from visionmamba.training.world import World, device_of, find_world

if TYPE_CHECKING:
    from visionmamba.training.recorder import Recorder

Strategy = Literal["auto", "ddp", "fsdp"]
"""How several processes share the work of a step."""

_RESULT_FIELDS = (
    "metrics", "best", "best_ema", "epochs", "steps", "seconds", "images_per_second", "parameters",
    "peak_memory_gb",
)  # fmt: skip
_LIBRARY_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # pytorch-lightning asks torch for a class that torch has renamed; nothing a caller can do
    (r".*LeafSpec.* is deprecated", FutureWarning),
    # device="cpu" beside a GPU is a choice
    ("GPU available but not used", UserWarning),
    # a sharded block hands the residual stream on; nothing is added to it in place in training
    (r"FSDP2-wrapped module .* returned a view tensor", UserWarning),
)
_PACKAGES = ("torch", "torchvision", "timm", "pytorch-lightning", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a finished run came to; also in its results.json."""

    out: Path
    """Folder of the run."""
    metrics: dict[str, float]
    """Validation metrics after the last epoch, by names that begin with "val_"; one that cannot be
    judged is left out."""
    best: dict[str, float]
    """The same, and "epoch", for the epoch whose weights are in best.safetensors."""
    best_ema: dict[str, float]
    """The same for best_ema.safetensors; empty when no moving average was kept."""
    epochs: int
    """Passes over the training data."""
    steps: int
    """Optimizer steps."""
    seconds: float
    """Wall-clock time of training and validation, summed over interruptions."""
    images_per_second: float
    """Training images per second of that time, over all devices."""
    parameters: int
    """Parameters of the model."""
    peak_memory_gb: float | None = None
    """Most memory of the first device that was taken at a time since this process began or went on
    with the run, in 10^9 bytes; None on a CPU."""
    was_finished: bool = False
    """True when the run had been finished before, so that nothing was done."""


def fit(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    strategy: Strategy = "auto",
    num_workers: int = 0,
    checkpoint_every_steps: int = 500,
    cuda_graphs: bool | None = None,
    progress: bool = True,
    command: str | None = None,
) -> FitResult:
    """Trains a recipe into a folder, or goes on where an interrupted run of it was left.

    The folder receives recipe.json, metrics.csv, tensorboard/, last.ckpt, best.safetensors,
    last.safetensors, curves.png and, when all is done, results.json; best_ema.safetensors and
    last_ema.safetensors when a moving average is kept; unreadable.txt when files were left out;
    classes.csv and pictures/ when the task judges single classes and draws what it makes of
    pictures. On the CPU a run that was killed and resumed gives bit for bit what an unbroken one
    gives. A run can be resumed with another number of processes and another strategy.

    Under torchrun or SLURM's srun each process calls fit; otherwise devices > 1 starts this command
    line again for the others. The folder must be one that all machines see.

    Args:
        recipe: what to train.
        out: folder of the run; made when missing. A finished run in it is left as it is.
        device: "auto" (the GPU when there is one), "cpu", "cuda", "cuda:N".
        devices: processes of each machine, one a device; a launcher's number is taken by itself.
        nodes: machines; a launcher's number is taken by itself.
        strategy: how several processes share the work: "ddp" gives each the whole model, "fsdp"
            shards weights, gradients and optimizer (FSDP2), where validation runs the model
            equally often on each process. "auto" is "ddp".
        num_workers: processes that prepare images beside each of these; changes no result.
        checkpoint_every_steps: steps between checkpoints, beside those after epochs, which are
            taken as long as they take no more than a twentieth of the time.
        cuda_graphs: record forward and backward once and replay them, which spares the host some
            900 launches a step and halves the time of one of Vim-Ti on an H200. None does so on
            one NVIDIA GPU. No effect on CPUs, with "fsdp", torch.compile, batch norms synchronised
            over several GPUs, sequences flipped at random, detectors, or activation checkpointing
            with drop path; what was taken, and why, is in results.json. Where the model cannot be
            recorded training goes on without, after a warning.
        progress: show a bar, and on a GPU first how kernels are launched.
        command: how to repeat the run, for results.json; by default the process's command line.

    Raises:
        ValueError: the recipe does not fit its data or the devices, or differs from that of the run
            in the folder.
        FileNotFoundError: the data are missing.
        ImportError: the packages of visionmamba[train] are missing.
        BatchTooLargeError: a batch does not fit into memory.
        NonFiniteError: loss or gradient is not finite, on any process.
        KeyboardInterrupt: stopped by Ctrl-C, after a checkpoint.
    """
    if checkpoint_every_steps < 1:
        raise ValueError(f"checkpoint_every_steps must be at least 1, got {checkpoint_every_steps}")
    if strategy not in get_args(Strategy):
        raise ValueError(f'strategy must be "auto", "ddp" or "fsdp", got {strategy!r}')
    out = Path(out)
    world = find_world(devices=devices, nodes=nodes)
    refuse_foreign_files(out)
    target = device_of(world, resolve_device(device))
    with _randomness_kept(target):
        torch.manual_seed(recipe.seed)
        experiment = recipe.build(num_workers=num_workers, rank=world.rank, num_ranks=world.size)
    identity = identity_of(recipe, experiment)
    if (out / RESULTS).exists():
        return _finished(out, identity)
    if strategy == "fsdp" and world.size > 1 and not experiment.task.validates_evenly:
        raise ValueError(
            'strategy "fsdp" needs a validation that runs the model equally often on each process, '
            "which windows over pictures of any size do not: --inference.mode whole, or "
            "--strategy ddp"
        )
    _require_lightning()
    is_new = not (out / CHECKPOINT).exists()
    is_own_folder = world.is_main and not out.exists()
    if world.is_main:
        out.mkdir(parents=True, exist_ok=True)
    had_group = distributed.is_available() and distributed.is_initialized()
    try:
        with _randomness_kept(target):
            return _train(
                experiment,
                out,
                recipe=recipe,
                identity=identity,
                device=target,
                world=world,
                strategy=strategy,
                checkpoint_every_steps=checkpoint_every_steps,
                cuda_graphs=cuda_graphs,
                progress=progress,
                command=command or shlex.join(sys.argv),
            )
    finally:
        if world.size > 1 and not had_group and distributed.is_initialized():
            distributed.destroy_process_group()
        if world.is_main and is_new and not (out / CHECKPOINT).exists():
            remove_leftovers(out, with_folder=is_own_folder)


def _train(
    experiment: Experiment,
    out: Path,
    *,
    recipe: Recipe,
    identity: dict[str, Any],
    device: torch.device,
    world: World,
    strategy: Strategy,
    checkpoint_every_steps: int,
    cuda_graphs: bool | None,
    progress: bool,
    command: str,
) -> FitResult:
    import pytorch_lightning as lightning
    from pytorch_lightning.loggers import TensorBoardLogger

    from visionmamba.training.checkpoint import AtomicCheckpointIO, read_checkpoint, replace_json
    from visionmamba.training.curves import draw_curves
    from visionmamba.training.engine import STATE_KEY, Engine
    from visionmamba.training.graphs import why_one_by_one
    from visionmamba.training.loader import LoaderTimes, TimedBatches
    from visionmamba.training.progress import ProgressBar
    from visionmamba.training.recorder import Recorder
    from visionmamba.training.stopping import Interrupted, StopRequest

    checkpoint = out / CHECKPOINT
    state: dict[str, Any] = {}
    if checkpoint.exists():
        state = read_checkpoint(checkpoint)[STATE_KEY]
        refuse_other_recipe(out, json.loads(state["identity"]), identity)
    if world.is_main:
        replace_json(out / RECIPE, identity)
    stop = StopRequest(num_processes=world.size)
    passes = experiment.passes_per_step
    device_batch_size = experiment.batch_size // (world.size * passes)
    times = LoaderTimes(**state.get("loader", {}))
    recorder = Recorder(
        experiment,
        out,
        checkpoint_every_steps=checkpoint_every_steps,
        identity=json.dumps(identity),
        state=state,
        stop=stop,
        world=world,
        times=times,
    )
    callbacks: list[lightning.Callback] = [recorder]
    if progress and world.is_main:
        monitor = experiment.task.monitor
        bar = ProgressBar(recorder, title=recipe.name, epochs=experiment.epochs, monitor=monitor)
        callbacks.append(bar)
    engine = Engine(
        experiment,
        seed=recipe.seed,
        world=world,
        stop=stop,
        is_sharded=strategy == "fsdp",
        one_by_one=why_one_by_one(
            cuda_graphs,
            experiment.task.model,
            device=device,
            num_processes=world.size,
            is_sharded=strategy == "fsdp",
            is_compiled=experiment.compile_blocks,
        ),
    )
    with _quiet_lightning():
        trainer = lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=_trainer_devices(world, device),
            num_nodes=world.nodes,
            strategy=_trainer_strategy(strategy, world, device),
            use_distributed_sampler=False,
            inference_mode=False,  # sharded weights gathered in it could not be trained on
            precision="32-true" if experiment.precision == "float32" else "bf16-mixed",
            max_epochs=experiment.epochs,
            accumulate_grad_batches=passes,
            logger=TensorBoardLogger(
                out, name="", version=LOGS, purge_step=state["step"] + 1 if state else None
            ),
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO(), *_cluster(world)],
            default_root_dir=out,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
        if device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]
            torch.cuda.reset_peak_memory_stats(device)
        # theirs waits for the device before each batch; the step itself agrees on stopping
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        try:
            with (
                stop.listening(),
                experiment.train_batches.workers_kept(),
                experiment.val_batches.workers_kept(),
                explain_out_of_memory(device_batch_size, option="device_batch_size"),
            ):
                trainer.fit(
                    engine,
                    train_dataloaders=TimedBatches(
                        experiment.train_batches, batch_size=device_batch_size, times=times
                    ),
                    val_dataloaders=experiment.val_batches,
                    ckpt_path=checkpoint if state else None,
                    weights_only=True,
                )
        except Interrupted:
            where = f"step {recorder.saved_step} of {trainer.estimated_stepping_batches}"
            raise KeyboardInterrupt(f"stopped; the same command goes on from {where}") from None
        finally:
            engine.release_graphs()
    result = _result(experiment, out, recorder, steps=trainer.global_step, device=device)
    if not world.is_main:
        return result
    draw_curves(out / METRICS, out / CURVES, monitor=experiment.task.monitor, title=recipe.name)
    values = {name: getattr(result, name) for name in _RESULT_FIELDS}
    facts = {
        "device": str(device),
        "world_size": world.size,
        "nodes": world.nodes,
        "strategy": _strategy_name(strategy, world),
        "cuda_graphs": {"used": engine.one_by_one is None, "why_not": engine.one_by_one},
        "device_batch_size": device_batch_size,
        "passes_per_step": passes,
        "loader": {
            "images_per_second": round(times.images_per_second * world.size, 1),
            "waiting_share": round(times.waiting_share, 4),
        },
        "unreadable": recorder.unreadable,
        "threads": torch.get_num_threads(),
        "seed": recipe.seed,
        "command": command,
        "versions": _versions(),
    }
    replace_json(out / RESULTS, {"name": recipe.name, **values, **facts, **identity})
    return result


def _strategy_name(strategy: Strategy, world: World) -> str:
    if strategy == "fsdp":
        return strategy
    return "ddp" if world.size > 1 else "single"


def _trainer_devices(world: World, device: torch.device) -> list[int] | int:
    if world.size == 1 and device.type == "cuda":
        return [device.index or 0]
    return world.size // world.nodes


def _trainer_strategy(strategy: Strategy, world: World, device: torch.device) -> Any:
    """Returns how pytorch-lightning shares the work between the processes."""
    from pytorch_lightning.strategies import DDPStrategy

    backend = "nccl" if device.type == "cuda" else "gloo"
    if strategy == "fsdp":
        from visionmamba.training.sharding import ShardedStrategy

        return ShardedStrategy(num_processes=world.size, process_group_backend=backend)
    if world.size == 1:
        return "auto"
    return DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True)


def _cluster(world: World) -> list[Any]:
    """Returns pytorch-lightning's view of SLURM, without its own way to requeue jobs."""
    if world.launcher != "slurm":
        return []
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    return [SLURMEnvironment(auto_requeue=False)]


def _result(
    experiment: Experiment, out: Path, recorder: "Recorder", *, steps: int, device: torch.device
) -> FitResult:
    is_gpu = device.type == "cuda"
    return FitResult(
        out=out,
        metrics=recorder.metrics,
        best=recorder.best,
        best_ema=recorder.best_ema,
        epochs=experiment.epochs,
        steps=steps,
        seconds=round(recorder.seconds, 3),
        images_per_second=round(steps * experiment.batch_size / recorder.seconds, 1),
        parameters=sum(p.numel() for p in experiment.task.model.parameters()),
        peak_memory_gb=round(torch.cuda.max_memory_allocated(device) / 1e9, 3) if is_gpu else None,
    )


def _finished(out: Path, identity: dict[str, Any]) -> FitResult:
    values = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    refuse_other_recipe(out, {name: values[name] for name in identity}, identity)
    known = {name: values[name] for name in _RESULT_FIELDS if name in values}
    return FitResult(out=out, was_finished=True, **known)


def _require_lightning() -> None:
    try:
        import pytorch_lightning  # noqa: F401
        import tensorboard  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"training needs {error.name}; install it with: pip install 'visionmamba[train]'"
        ) from error


@contextmanager
def _randomness_kept(device: torch.device) -> Iterator[None]:
    """Gives the caller's generators of torch, numpy and Python their states back."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keeps advice away that is about pytorch-lightning, not about the run."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message, category in _LIBRARY_WARNINGS:
                warnings.filterwarnings("ignore", message=message, category=category)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "visionmamba": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
