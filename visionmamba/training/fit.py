"""`fit`: train a recipe into a folder, from the start or from where it was left."""

import json
import logging
import platform
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from visionmamba import __version__
from visionmamba.data import explain_out_of_memory
from visionmamba.models.weights import resolve_device
from visionmamba.training.experiment import Experiment, Recipe

if TYPE_CHECKING:
    from visionmamba.training.engine import Recorder

CHECKPOINT = "last.ckpt"
RESULTS = "results.json"
_RECIPE = "recipe.json"
_METRICS = "metrics.csv"
_CURVES = "curves.png"
_LOGS = "tensorboard"
_OWN_FILES = (_RECIPE, _METRICS, _CURVES, "best.safetensors", "last.safetensors")
_RESULT_FIELDS = (
    "metrics", "best", "epochs", "steps", "seconds", "images_per_second", "parameters",
)  # fmt: skip
_LIBRARY_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # pytorch-lightning asks torch for a class that torch has renamed; nothing a caller can do
    (r".*LeafSpec.* is deprecated", FutureWarning),
    # device="cpu" beside a GPU is a choice
    ("GPU available but not used", UserWarning),
)
_PACKAGES = ("torch", "torchvision", "timm", "pytorch-lightning", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a finished run came to; also in its results.json."""

    out: Path
    """Folder of the run."""
    metrics: dict[str, float]
    """Validation metrics after the last epoch, by names that begin with "val_"."""
    best: dict[str, float]
    """The same, and "epoch", for the epoch whose weights are in best.safetensors."""
    epochs: int
    """Passes over the training data."""
    steps: int
    """Optimizer steps."""
    seconds: float
    """Wall-clock time of training and validation, summed over interruptions."""
    images_per_second: float
    """Training images per second of that time."""
    parameters: int
    """Parameters of the model."""
    was_finished: bool = False
    """True when the run had been finished before, so that nothing was done."""


def fit(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str = "auto",
    num_workers: int = 0,
    checkpoint_every_steps: int = 50,
    progress: bool = True,
    command: str | None = None,
) -> FitResult:
    """Trains a recipe into a folder, or goes on where an interrupted run of it was left.

    The folder receives recipe.json, metrics.csv, tensorboard/, last.ckpt, best.safetensors,
    last.safetensors, curves.png and, when all is done, results.json. On the CPU a run that was
    killed and resumed gives bit for bit what an unbroken one gives.

    Args:
        recipe: what to train.
        out: folder of the run; made when missing. A finished run in it is left as it is.
        device: "auto" (the GPU when there is one), "cpu", "cuda", "cuda:N".
        num_workers: processes that prepare images beside this one; changes no result.
        checkpoint_every_steps: steps between checkpoints, beside the one after each epoch.
        progress: show a bar.
        command: how to repeat the run, for results.json; by default the process's command line.

    Raises:
        ValueError: the recipe does not fit its data, or differs from that of the run in the folder.
        FileNotFoundError: the data are missing.
        ImportError: the packages of visionmamba[train] are missing.
        BatchTooLargeError: a batch does not fit into memory.
        NonFiniteError: loss or gradient is not finite.
        KeyboardInterrupt: stopped by Ctrl-C, after a checkpoint.
    """
    if checkpoint_every_steps < 1:
        raise ValueError(f"checkpoint_every_steps must be at least 1, got {checkpoint_every_steps}")
    out = Path(out)
    _refuse_foreign_files(out)
    target = resolve_device(device)
    devices = [target] if target.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(recipe.seed)
        experiment = recipe.build(num_workers=num_workers)
    identity = _identity(recipe, experiment)
    if (out / RESULTS).exists():
        return _finished(out, identity)
    _require_lightning()
    is_new = not (out / CHECKPOINT).exists()
    is_own_folder = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with torch.random.fork_rng(devices=devices):
            return _train(
                experiment,
                out,
                recipe=recipe,
                identity=identity,
                device=target,
                checkpoint_every_steps=checkpoint_every_steps,
                progress=progress,
                command=command or shlex.join(sys.argv),
            )
    finally:
        if is_new and not (out / CHECKPOINT).exists():
            _remove_leftovers(out, with_folder=is_own_folder)


def _train(
    experiment: Experiment,
    out: Path,
    *,
    recipe: Recipe,
    identity: dict[str, Any],
    device: torch.device,
    checkpoint_every_steps: int,
    progress: bool,
    command: str,
) -> FitResult:
    import pytorch_lightning as lightning
    from pytorch_lightning.loggers import TensorBoardLogger
    from pytorch_lightning.utilities.exceptions import SIGTERMException

    from visionmamba.training.checkpoint import AtomicCheckpointIO, read_checkpoint, replace_json
    from visionmamba.training.curves import draw_curves
    from visionmamba.training.engine import (
        STATE_KEY,
        Engine,
        Interrupted,
        Recorder,
        StopRequest,
    )
    from visionmamba.training.progress import ProgressBar

    checkpoint = out / CHECKPOINT
    state: dict[str, Any] = {}
    if checkpoint.exists():
        state = read_checkpoint(checkpoint)[STATE_KEY]
        _refuse_other_recipe(out, json.loads(state["identity"]), identity)
    replace_json(out / _RECIPE, identity)
    stop = StopRequest()
    recorder = Recorder(
        experiment,
        out,
        checkpoint_every_steps=checkpoint_every_steps,
        identity=json.dumps(identity),
        state=state,
        stop=stop,
    )
    callbacks: list[lightning.Callback] = [recorder]
    if progress:
        monitor = experiment.task.monitor
        bar = ProgressBar(recorder, title=recipe.name, epochs=experiment.epochs, monitor=monitor)
        callbacks.append(bar)
    engine = Engine(experiment, seed=recipe.seed)
    with _quiet_lightning():
        trainer = lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=[device.index or 0] if device.type == "cuda" else 1,
            precision="32-true" if experiment.precision == "float32" else "bf16-mixed",
            max_epochs=experiment.epochs,
            accumulate_grad_batches=experiment.optimizer.accumulate_batches,
            logger=TensorBoardLogger(
                out, name="", version=_LOGS, purge_step=state["step"] + 1 if state else None
            ),
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=out,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
        try:
            with stop.listening(), explain_out_of_memory(experiment.batch_size):
                trainer.fit(
                    engine,
                    train_dataloaders=experiment.train_batches,
                    val_dataloaders=experiment.val_batches,
                    ckpt_path=checkpoint if state else None,
                    weights_only=True,
                )
        except (Interrupted, SIGTERMException):
            where = f"step {recorder.saved_step} of {trainer.estimated_stepping_batches}"
            raise KeyboardInterrupt(f"stopped; the same command goes on from {where}") from None
    experiment.task.save_weights(out / "last.safetensors")
    draw_curves(out / _METRICS, out / _CURVES, monitor=experiment.task.monitor, title=recipe.name)
    result = _result(experiment, out, recorder, steps=trainer.global_step)
    values = {name: getattr(result, name) for name in _RESULT_FIELDS}
    facts = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seed": recipe.seed,
        "command": command,
        "versions": _versions(),
    }
    replace_json(out / RESULTS, {"name": recipe.name, **values, **facts, **identity})
    return result


def _result(experiment: Experiment, out: Path, recorder: "Recorder", *, steps: int) -> FitResult:
    images = len(experiment.train_batches) * experiment.batch_size * experiment.epochs
    return FitResult(
        out=out,
        metrics=recorder.metrics,
        best=recorder.best,
        epochs=experiment.epochs,
        steps=steps,
        seconds=round(recorder.seconds, 3),
        images_per_second=round(images / recorder.seconds, 1),
        parameters=sum(p.numel() for p in experiment.task.model.parameters()),
    )


def _finished(out: Path, identity: dict[str, Any]) -> FitResult:
    values = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    _refuse_other_recipe(out, {name: values[name] for name in identity}, identity)
    return FitResult(out=out, was_finished=True, **{name: values[name] for name in _RESULT_FIELDS})


def _identity(recipe: Recipe, experiment: Experiment) -> dict[str, Any]:
    """Returns all that decides a run's result, as plain values."""
    assert is_dataclass(recipe) and not isinstance(recipe, type)
    plain: dict[str, Any] = json.loads(
        json.dumps({"recipe": asdict(recipe), "data": experiment.data_summary}, default=str)
    )
    return plain


def _refuse_other_recipe(out: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    flat_there, flat_here = _flat(there), _flat(here)
    absent = "absent"
    differences = [
        f"{name} is {flat_there.get(name, absent)} there and {flat_here.get(name, absent)} here"
        for name in sorted(flat_there.keys() | flat_here.keys())
        if flat_there.get(name, absent) != flat_here.get(name, absent)
    ]
    if differences:
        raise ValueError(
            f"{out} holds a run of another recipe ({'; '.join(differences)}); "
            "repeat its options to go on with it, or give another --out"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}".removeprefix("recipe.")] = value
    return flat


def _refuse_foreign_files(out: Path) -> None:
    """Raises ValueError when files of somebody else would be overwritten."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, wanted a folder for the run; give another --out")
    if (out / _RECIPE).exists():
        return
    for name in (*_OWN_FILES, RESULTS, CHECKPOINT):
        if (out / name).exists():
            raise ValueError(
                f"{out} holds a {name} but no {_RECIPE}, so it is not a run of ours and is left "
                "alone; give another --out"
            )


def _remove_leftovers(out: Path, *, with_folder: bool) -> None:
    """Removes what a run wrote that came to an end before its first checkpoint."""
    for name in (*_OWN_FILES, f"{_METRICS}.tmp", f"{_RECIPE}.tmp", f"{CHECKPOINT}.tmp"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / _LOGS, ignore_errors=True)
    if with_folder:
        out.rmdir()


def _require_lightning() -> None:
    try:
        import pytorch_lightning  # noqa: F401
        import tensorboard  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"training needs {error.name}; install it with: pip install 'visionmamba[train]'"
        ) from error


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
