"""One training of a study: what is run, and what came of it."""

import gc
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from visionmamba.data import MaskSplit
from visionmamba.recipes.detection import DetectionRecipe
from visionmamba.recipes.recipe import Recipe
from visionmamba.recipes.segmentation import SegmentationRecipe
from visionmamba.tasks.segmentation_evaluation import evaluate_segmentation
from visionmamba.training import NonFiniteError, fit

AnyRecipe = Recipe | SegmentationRecipe | DetectionRecipe
"""What a study can train."""
Judged = Literal["last", "best", "last_ema", "best_ema"]
"""Whose weights count: those after the last epoch, those of the best epoch on the validation split,
or the moving average in place of either."""

_EVALUATION = "evaluation.json"
_TEST_METRICS = ("miou", "macc", "aacc")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training to be made, or taken up, in some process."""

    recipe: AnyRecipe
    """What is trained."""
    out: Path
    """Folder of the run, as `fit` fills it."""
    log: Path
    """What a process of its own prints goes here."""
    command: str
    """How to repeat it, for the run's results.json."""
    judged: Judged = "last"
    """Whose weights count."""
    test_split: MaskSplit | None = None
    """Split that a segmenter's weights are judged on when all is done; None leaves that out."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    num_workers: int = 0
    """Processes that prepare pictures beside the one that trains."""
    cuda_graphs: bool | None = None
    """Whether forward and backward are replayed from CUDA graphs; None leaves it to `fit`."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished training came to."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Validation metrics of the weights that count; empty when it failed."""
    test: dict[str, float] = field(default_factory=dict)
    """Their metrics on the test split; empty without one."""
    steps: int = 0
    """Optimizer steps."""
    seconds: float = 0.0
    """Wall-clock time of training and validation, beside whatever else ran."""
    images_per_second: float = 0.0
    """Training pictures per second of that time."""
    parameters: int = 0
    """Parameters of the model."""
    peak_memory_gb: float | None = None
    """Most memory of the GPU that it took, in 10^9 bytes; None on a CPU."""
    failure: str | None = None
    """Why there is no result: the loss was not finite at this learning rate."""


def run_job(job: Job) -> Outcome:
    """Trains, or goes on where it was left, judges the weights and returns what came of it.

    Raises:
        ValueError, OSError, ImportError, BatchTooLargeError, KeyboardInterrupt: as `fit` does.
    """
    try:
        result = fit(
            job.recipe,
            job.out,
            device=job.device,
            num_workers=job.num_workers,
            cuda_graphs=job.cuda_graphs,
            progress=False,
            command=job.command,
        )
        test = {} if job.test_split is None else _judge(job, job.test_split)
    except NonFiniteError as error:
        return Outcome(failure=str(error))
    finally:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            gc.collect()
            torch.cuda.empty_cache()  # for the processes beside this one
    best = result.best_ema if job.judged == "best_ema" else result.best
    return Outcome(
        metrics=result.metrics if job.judged.startswith("last") else best,
        test=test,
        steps=result.steps,
        seconds=result.seconds,
        images_per_second=result.images_per_second,
        parameters=result.parameters,
        peak_memory_gb=result.peak_memory_gb,
    )


def _judge(job: Job, split: MaskSplit) -> dict[str, float]:
    """Returns the metrics on a split of the recipe's data, from a folder when they are there."""
    assert isinstance(job.recipe, SegmentationRecipe)
    folder = job.out / f"{split}_{job.judged}"
    if not (folder / _EVALUATION).exists():
        with torch.random.fork_rng(devices=[]):
            # a Vim of bidirectional="sequence" draws its flips from the CPU's generator
            torch.default_generator.manual_seed(job.recipe.seed)
            evaluate_segmentation(
                job.out / f"{job.judged}.safetensors",
                job.recipe.data,
                split=split,
                precision=job.recipe.precision,
                device=job.device,
                batch_size=job.recipe.batch_size,
                num_workers=job.num_workers,
            ).save(folder)
    found: dict[str, Any] = json.loads((folder / _EVALUATION).read_text(encoding="utf-8"))
    return {name: found[name] for name in _TEST_METRICS}
