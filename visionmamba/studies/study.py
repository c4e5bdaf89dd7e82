"""A study: variants of a recipe trained at several learning rates and seeds, and what came of it.

Every variant gets the same data and epochs, and the learning rates of what it is compared with. A
sweep with the first seeds finds each one's best rate on the validation split, shorter than the runs
that count when asked to be; then all seeds are trained at that rate. Each training is a folder of
`fit`, so a study that was stopped goes on where it was.
"""

import fcntl
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionmamba.bench.machine import choose_device, describe_machine
from visionmamba.data import MaskSplit
from visionmamba.recipes.dense import DenseRecipe
from visionmamba.studies.jobs import AnyRecipe, Job, Judged, Outcome
from visionmamba.studies.pool import TrainingPool
from visionmamba.studies.results import Run, StudyResult

if TYPE_CHECKING:
    from rich.console import Console

_SAME_FOR_ALL = ("data", "augmentation", "epochs", "epoch_steps", "batch_size")
_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the things that are compared."""

    name: str
    """As the table calls it."""
    recipe: AnyRecipe
    """How it is trained; learning rate, seed and, in the sweep, epochs are the study's."""
    learning_rates: tuple[float, ...] | None = None
    """Peak rates that it is tried at, equal to those of the variant it is compared with; None takes
    the study's."""
    compared_with: str | None = None
    """Name of the variant whose score is subtracted from this one's; None compares nothing."""
    paper: Mapping[str, str] = field(default_factory=dict)
    """What the paper has in its columns, ready to print."""
    paper_metrics: Mapping[str, str] = field(default_factory=dict)
    """What the paper has for metrics in the study's tables, by their names without "_ema"."""

    @property
    def folder_name(self) -> str:
        """The name in lower case, with nothing but letters, digits and underscores."""
        return _NOT_IN_NAMES.sub("_", self.name.lower()).strip("_")


@dataclass(frozen=True, kw_only=True)
class MetricTable:
    """Further metrics of the weights that count, in a table of their own."""

    title: str
    """Over the table."""
    metrics: Mapping[str, str]
    """Names among the validation metrics, 0 to 1, by the headings of their columns."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How the trainings of a study are run; on the CPU nothing here changes a result."""

    jobs: int = 1
    """Trainings at the same time, on one device."""
    device: str = "auto"
    """"auto" (the GPU when there is one), "cpu", "cuda" or "cuda:N"."""
    num_workers: int = 0
    """Processes that prepare pictures beside each training."""
    cuda_graphs: bool | None = None
    """Replay forward and backward from CUDA graphs; None does where `fit` does."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1; got {self.jobs}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must be at least 0; got {self.num_workers}")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Variants x learning rates x seeds, trained into one folder."""

    name: str
    """What the names of the result files begin with."""
    title: str
    """Over the table."""
    variants: tuple[Variant, ...]
    """What is compared."""
    learning_rates: tuple[float, ...]
    """Peak rates that a variant without its own is tried at; one rate needs no sweep."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds at the best rate; mean and deviation are over these."""
    sweep_epochs: int | None = None
    """Epochs of the sweep; None takes the whole schedule, whose runs then count."""
    sweep_seeds: int = 1
    """How many of the seeds the sweep is run with."""
    score: str = "val_accuracy"
    """Metric that chooses and ranks, 0 to 1; higher is better."""
    tables: tuple[MetricTable, ...] = ()
    """What else is told of the weights that count; it chooses nothing."""
    judged: Judged = "last"
    """Whether the weights after the last epoch count, those of the best one on the validation
    split, or their moving average."""
    test_split: MaskSplit | None = None
    """Split that the weights which count are judged on too; it chooses nothing."""
    notes: tuple[str, ...] = ()
    """Sentences for below the table."""
    command: str = ""
    """What repeats the study."""
    out: Path = Path("runs/study")
    """Folder of all runs and results."""

    def __post_init__(self) -> None:
        for name in ("variants", "learning_rates", "seeds"):
            values = getattr(self, name)
            distinct = {one.folder_name for one in values} if name == "variants" else set(values)
            if not values or len(distinct) < len(values):
                raise ValueError(
                    f"{name} must be at least one, each different; got {len(values)} of which "
                    f"{len(distinct)} differ"
                )
        for rates in (self.learning_rates, *map(self.rates_of, self.variants)):
            if not rates or len(set(rates)) < len(rates) or min(rates) <= 0:
                raise ValueError(f"learning rates must be positive, each different; got {rates}")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must be at least 0; got {self.seeds}")
        if not 1 <= self.sweep_seeds <= len(self.seeds):
            raise ValueError(
                f"sweep_seeds must lie between 1 and the number of seeds, {len(self.seeds)}; "
                f"got {self.sweep_seeds}"
            )
        self._check_fairness()
        if not 1 <= self.short_epochs <= self.epochs:
            raise ValueError(
                f"sweep_epochs must lie between 1 and the epochs of a run, {self.epochs}; "
                f"got {self.sweep_epochs}"
            )
        for variant in self.variants:
            if variant.compared_with is not None:
                rates = self.rates_of(variant)
                others = self.rates_of(self.variant(variant.compared_with))
                if sorted(rates) != sorted(others):
                    raise ValueError(
                        "variants that are compared must have equal learning rates; "
                        f"{variant.name} has {rates} and {variant.compared_with} {others}"
                    )

    def _check_fairness(self) -> None:
        first, *others = self.variants
        for name in _SAME_FOR_ALL:
            wanted = getattr(first.recipe, name, None)
            for other in others:
                if getattr(other.recipe, name, None) != wanted:
                    raise ValueError(
                        f"all variants of a study must have equal {name}; {first.name} has "
                        f"{wanted} and {other.name} {getattr(other.recipe, name, None)}"
                    )

    @property
    def epochs(self) -> int:
        """Epochs of the runs that count."""
        return self.variants[0].recipe.epochs

    @property
    def short_epochs(self) -> int:
        """Epochs of the sweep."""
        return self.epochs if self.sweep_epochs is None else self.sweep_epochs

    def variant(self, name: str) -> Variant:
        """Returns the variant of that name.

        Raises:
            ValueError: there is none.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        names = ", ".join(variant.name for variant in self.variants)
        raise ValueError(f"there is no variant {name!r} in this study; it has {names}")

    @property
    def has_sweep(self) -> bool:
        """Whether any variant has more than one learning rate to choose from."""
        return any(len(self.rates_of(variant)) > 1 for variant in self.variants)

    def rates_of(self, variant: Variant) -> tuple[float, ...]:
        """Returns the learning rates that a variant is tried at."""
        return self.learning_rates if variant.learning_rates is None else variant.learning_rates

    def sweep_of(self, variant: Variant) -> list[Run]:
        """Returns the runs that choose a variant's learning rate; none when there is one rate."""
        rates = self.rates_of(variant)
        if len(rates) == 1:
            return []
        return [
            Run(variant=variant.name, lr=lr, seed=seed, epochs=self.short_epochs)
            for lr in rates
            for seed in self.seeds[: self.sweep_seeds]
        ]

    def runs_at(self, variant: Variant, lr: float) -> list[Run]:
        """Returns the runs of a variant that count, all seeds at one rate."""
        return [
            Run(variant=variant.name, lr=lr, seed=seed, epochs=self.epochs) for seed in self.seeds
        ]

    def recipe_of(self, run: Run) -> AnyRecipe:
        """Returns what a run trains; a shorter schedule has a warm-up as much shorter."""
        recipe = self.variant(run.variant).recipe
        recipe = replace(recipe, optimizer=replace(recipe.optimizer, lr=run.lr), seed=run.seed)
        return with_epochs(recipe, run.epochs)

    def folder_of(self, run: Run) -> Path:
        """Returns the folder of a run, as `fit` fills it."""
        name = f"lr{run.lr:g}_epochs{run.epochs}_seed{run.seed}"
        return self.out / self.variant(run.variant).folder_name / name

    def run(
        self, options: RunOptions | None = None, *, console: "Console | None" = None
    ) -> StudyResult:
        """Trains what is not finished and returns the result, whose files are in `out`.

        The table is written anew after every run, so that what is there is never lost.

        Raises:
            ValueError, OSError, ImportError, BatchTooLargeError: a recipe does not fit its data,
                the device or what the folder holds, the others write a checkpoint first; or another
                study is running in the folder.
            TrainingProcessError: a process failed; the message names its log.
            KeyboardInterrupt: stopped by Ctrl-C, every run after a checkpoint.
        """
        from rich.console import Console

        options = options or RunOptions()
        console = console or Console()
        is_gpu = options.device.startswith("cuda:") or choose_device(options.device) == "cuda"
        device = options.device if is_gpu and ":" in options.device else "cuda" if is_gpu else "cpu"
        result = StudyResult(
            study=self, machine=describe_machine(device, command=self.command), outcomes={}
        )
        try:
            with alone_in(self.out), TrainingPool(options.jobs) as pool:
                self._train(pool, options, result, console)
        except KeyboardInterrupt:
            result.save()
            count = f"{len(result.outcomes)} runs are finished"
            raise KeyboardInterrupt(f"stopped; {count}, the same command goes on") from None
        result.save()
        return result

    def _train(
        self, pool: TrainingPool, options: RunOptions, result: StudyResult, console: "Console"
    ) -> None:
        runs: dict[Path, Run] = {}

        def submit(run: Run) -> None:
            if self.folder_of(run) not in runs:
                runs[self.folder_of(run)] = run
                pool.submit(self._job(run, options))

        def submit_what_counts(variant: Variant) -> None:
            sweep = self.sweep_of(variant)
            if all(run in result.outcomes for run in sweep):
                best = result.best_rate(variant)
                for run in [] if best is None else self.runs_at(variant, best):
                    submit(run)

        for variant in self.variants:
            for run in self.sweep_of(variant):
                submit(run)
        for variant in self.variants:
            if not self.sweep_of(variant):
                submit_what_counts(variant)
        while pool.num_unfinished:
            job, outcome = pool.next_outcome()
            run = runs[job.out]
            result.outcomes[run] = outcome
            submit_what_counts(self.variant(run.variant))
            console.print(f"{_said(run, outcome, self.score)}", highlight=False, markup=False)
            result.save(pictures=False)

    def _job(self, run: Run, options: RunOptions) -> Job:
        recipe, folder = self.recipe_of(run), self.folder_of(run)
        is_final = run.epochs == self.epochs
        return Job(
            recipe=recipe,
            out=folder,
            log=self.out / "logs" / f"{folder.parent.name}_{folder.name}.txt",
            command=self.command,
            judged=self.judged,
            test_split=self.test_split if is_final else None,
            device=options.device,
            num_workers=options.num_workers,
            cuda_graphs=options.cuda_graphs,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON-ready values, the variants' recipes in full."""
        return {
            "name": self.name,
            "title": self.title,
            "learning_rates": list(self.learning_rates),
            "variant_learning_rates": {
                variant.name: list(self.rates_of(variant)) for variant in self.variants
            },
            "seeds": list(self.seeds),
            "epochs": self.epochs,
            "sweep_epochs": self.short_epochs,
            "sweep_seeds": self.sweep_seeds,
            "score": self.score,
            "judged": self.judged,
            "test_split": self.test_split,
            "variants": {variant.name: asdict(variant.recipe) for variant in self.variants},
        }


def with_epochs(recipe: AnyRecipe, epochs: int, *, epoch_steps: int | None = None) -> AnyRecipe:
    """Returns the recipe with another length; the warm-up keeps its share of it.

    Args:
        recipe: what is trained.
        epochs: its new length.
        epoch_steps: steps of an epoch of segmentation or detection; None leaves them.
    """
    share, optimizer = epochs / recipe.epochs, recipe.optimizer
    if isinstance(recipe, DenseRecipe) and epoch_steps is not None:
        if recipe.epoch_steps is not None:
            share *= epoch_steps / recipe.epoch_steps
        recipe = replace(recipe, epoch_steps=epoch_steps)
    steps = optimizer.warmup_steps
    optimizer = replace(
        optimizer,
        warmup_epochs=optimizer.warmup_epochs * epochs / recipe.epochs,
        warmup_steps=None if steps is None else round(steps * share),
    )
    return replace(recipe, optimizer=optimizer, epochs=epochs)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other studies out of a folder, made when missing, as long as the body runs.

    Raises:
        ValueError: there is one in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another study is running in {folder}; wait for its end, or give another --out"
            ) from None
        yield


def _said(run: Run, outcome: Outcome, score: str) -> str:
    what = f"{run.variant}, learning rate {run.lr:g}, seed {run.seed}, {run.epochs} epochs"
    if outcome.failure is not None:
        return f"{what}: no result, {outcome.failure}"
    tested = "".join(f", test {name} {value:.4f}" for name, value in outcome.test.items())
    return f"{what}: {score} {outcome.metrics[score]:.4f}{tested}, {outcome.seconds:.1f} s"
