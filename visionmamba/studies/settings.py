"""What all studies of the command line have in common: data, rates, seeds, processes, folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import tyro

from visionmamba.bench.machine import command_of
from visionmamba.data import Coco, MaskFolder, MaskSplit
from visionmamba.models import VimConfig
from visionmamba.recipes import RECIPES, DetectionRecipe, Recipe, SegmentationRecipe
from visionmamba.recipes.camvid import vim_camvid
from visionmamba.recipes.dense import DenseRecipe
from visionmamba.recipes.digits import digits_vim
from visionmamba.recipes.nuclei import vim_nuclei
from visionmamba.recipes.objects import vim_large_objects, vim_objects
from visionmamba.recipes.scratch import vim_tiny_folder
from visionmamba.recipes.shapes import vim_shapes
from visionmamba.studies.jobs import AnyRecipe, Judged
from visionmamba.studies.study import MetricTable, RunOptions, Study, Variant, with_epochs
from visionmamba.tasks.detection_metrics import COLUMNS
from visionmamba.training import Precision

if TYPE_CHECKING:
    from rich.console import Console

    from visionmamba.studies.results import StudyResult

Task = Literal["classification", "segmentation", "detection"]

_SCORES: dict[Task, str] = {
    "classification": "val_accuracy",
    "segmentation": "val_miou",
    "detection": "val_mask_ap",
}
_KINDS = {"Boxes": "box", "Masks": "mask"}
_HEADINGS = {"ap": "AP", "ap50": "AP50", "ap75": "AP75"}

_EMA_DECAY = 0.999
_PRETRAINED_DIVISOR = 5  # of the learning rates, as in `vim_camvid` with weights


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Options that every study has; None means what the recipe says."""

    name: ClassVar[str] = "study"

    task: Task = "classification"
    """What is learned: one class a picture, one a pixel, or objects with boxes and masks."""
    data: str = ""
    """Classification: "digits", or a folder with train/ and val/ of class folders. Segmentation:
    "shapes", or a folder with {train,val,test}/{images,masks} and a file of classes. Detection:
    "objects", "large-objects", or a folder in COCO's format. By default the digits, the shapes or
    the objects, which are there without a download."""
    recipe: str | None = None
    """Name of a recipe of `visionmamba train` that trains a Vim for the task, such as
    vim_tiny_cifar10; --data says where its data are. From drawn weights, also where the recipe has
    others. By default the plain one for such data."""
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    """Peak learning rates that every variant is tried at; those with weights may have their own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that each variant is trained with at its best learning rate."""
    epochs: int | None = None
    """Epochs of the runs that count; the warm-up keeps its share of them."""
    sweep_epochs: int | None = None
    """Epochs of the runs that choose the learning rate; by default the whole schedule, and then the
    run at the best rate counts."""
    sweep_seeds: int = 1
    """How many of the seeds choose the learning rate."""
    batch_size: int | None = None
    """Pictures of a step."""
    epoch_steps: int | None = None
    """Segmentation, detection: steps from one validation to the next."""
    precision: Precision | None = None
    """"float32", or "bfloat16": forward and backward under autocast."""
    judged: Judged = "last"
    """Which weights count: those after the last epoch, those of the best on the validation split,
    or their moving average, which is kept for that alone."""
    jobs: int = 1
    """Trainings at the same time on one device, each in a process of its own."""
    device: str = "auto"
    """"auto" (the GPU when there is one), "cpu", "cuda" or "cuda:N"."""
    num_workers: int | None = None
    """Processes that prepare pictures beside each training; by default the machine's cores divided
    by the jobs on a GPU, none on the CPU."""
    cuda_graphs: tyro.conf.DisallowNone[bool | None] = None  # not on the command line, that is
    """Replay forward and backward from CUDA graphs, which spares the host. Without either: on an
    NVIDIA GPU, but not for detection."""
    out: Path = Path("runs/study")
    """Folder of all runs and of the results; the same command goes on with what it finds there."""

    def __post_init__(self) -> None:
        if self.task == "classification" and self.epoch_steps is not None:
            raise ValueError("epoch_steps is for --task segmentation and detection; leave it out")
        if self.task == "detection" and self.cuda_graphs:
            raise ValueError(
                "the steps of a detector cannot be recorded, as they hang on the boxes found; "
                "leave out --cuda-graphs"
            )
        for name in ("epochs", "epoch_steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.run_options(0)

    @property
    def data_name(self) -> str:
        """The data asked for, or those that are there without a download."""
        return self.data or self.recipe or next(iter(_drawn(self.task)))

    @property
    def command(self) -> str:
        """The command that repeats the study, without the device and options at their defaults."""
        return command_of(self, "ablate", self.name, without=("device",))

    def run_options(self, num_workers: int) -> RunOptions:
        """Returns how the trainings are run, with so many processes that prepare pictures."""
        return RunOptions(
            jobs=self.jobs,
            device=self.device,
            num_workers=num_workers,
            cuda_graphs=self.cuda_graphs,
        )

    def plan(self) -> Study:
        """Returns the study, of which nothing is trained yet.

        Raises:
            FileNotFoundError: there are no such data or weights.
            ValueError: an option is out of range.
        """
        raise NotImplementedError

    def run(self, *, num_workers: int = 0, console: "Console | None" = None) -> "StudyResult":
        """Trains what is not finished and returns the result; raises as `Study.run`."""
        return self.plan().run(self.run_options(num_workers), console=console)

    def vim_recipe(self) -> AnyRecipe:
        """Returns the recipe of the plain Vim on the data, with the options put in.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: an option is out of range, or there is no such recipe.
        """
        if self.recipe is not None:
            return self.with_options(self._named_recipe(self.recipe))
        drawn = _drawn(self.task)
        if self.data_name in drawn:
            return self.with_options(drawn[self.data_name]())
        root = Path(self.data_name)
        if not root.is_dir():
            raise FileNotFoundError(
                f"there is no folder {root} to learn {self.task} from; give --data a folder, or "
                f"{' or '.join(drawn)}"
            )
        recipe: AnyRecipe
        if self.task == "classification":
            recipe = vim_tiny_folder(root)
        elif self.task == "segmentation":
            recipe = replace(vim_camvid(), data=MaskFolder(root=root))
        else:
            recipe = replace(vim_nuclei(), data=Coco(root=root))
        return self.with_options(recipe)

    def _named_recipe(self, name: str) -> AnyRecipe:
        recipe = RECIPES[name]() if name in RECIPES else None
        if recipe is None or not _trains_a_vim(recipe, self.task):
            known = [one for one, make in RECIPES.items() if _trains_a_vim(make(), self.task)]
            raise ValueError(
                f"recipe must be one of a Vim for {self.task} ({', '.join(known)}), got {name}"
            )
        if isinstance(recipe, DenseRecipe):
            recipe = replace(recipe, weights=None, backbone_only=False)
        else:
            recipe = replace(recipe, weights=None)
        if not self.data:
            return recipe
        root = Path(self.data)
        if not root.is_dir():
            raise FileNotFoundError(f"there is no folder {root} to learn {self.task} from")
        data: Any = recipe.data
        if not hasattr(data, "root"):
            raise ValueError(f"recipe {name} has its own data; leave --data out")
        changed: Any = recipe
        result: AnyRecipe = replace(changed, data=replace(data, root=root))
        return result

    def with_options(self, recipe: AnyRecipe) -> AnyRecipe:
        """Returns the recipe with the options that were given."""
        recipe = replace(
            with_epochs(
                recipe,
                recipe.epochs if self.epochs is None else self.epochs,
                epoch_steps=self.epoch_steps,
            ),
            batch_size=recipe.batch_size if self.batch_size is None else self.batch_size,
            precision=self.precision or recipe.precision,
        )
        decay = recipe.ema_decay or _EMA_DECAY
        return replace(recipe, ema_decay=decay if self.judged.endswith("_ema") else None)

    def study(self, variants: Sequence[Variant], *, title: str, notes: Sequence[str] = ()) -> Study:
        """Returns the study of these variants under the options."""
        ending = "_ema" if self.judged.endswith("_ema") else ""
        return Study(
            name=f"{self.name}_{self.task}",
            title=title,
            variants=tuple(variants),
            learning_rates=self.learning_rates,
            seeds=self.seeds,
            sweep_epochs=self.sweep_epochs,
            sweep_seeds=self.sweep_seeds,
            score=_SCORES[self.task] + ending,
            tables=_tables(ending) if self.task == "detection" else (),
            judged=self.judged,
            test_split=_test_split(variants[0].recipe),
            notes=tuple(notes),
            command=self.command,
            out=self.out,
        )


@dataclass(frozen=True, kw_only=True)
class PretrainedStudySettings(StudySettings):
    """Options of studies that have variants which begin with weights."""

    pretrained_learning_rates: tuple[float, ...] | None = None
    """Peak learning rates of variants that begin with weights; None tries a fifth of each rate."""

    @property
    def pretrained_rates(self) -> tuple[float, ...]:
        """The learning rates of variants that begin with weights."""
        if self.pretrained_learning_rates is not None:
            return self.pretrained_learning_rates
        return tuple(float(f"{lr / _PRETRAINED_DIVISOR:g}") for lr in self.learning_rates)


def compared_with_first(variants: Sequence[Variant]) -> list[Variant]:
    """Returns the variants, all but the first compared with it."""
    first, *others = variants
    return [first, *(replace(other, compared_with=first.name) for other in others)]


def _trains_a_vim(recipe: AnyRecipe, task: Task) -> bool:
    kinds = {
        "classification": Recipe,
        "segmentation": SegmentationRecipe,
        "detection": DetectionRecipe,
    }
    model = recipe.model
    backbone = getattr(model, "backbone", model)
    return isinstance(recipe, kinds[task]) and isinstance(backbone, VimConfig)


def _drawn(task: Task) -> Mapping[str, Callable[[], AnyRecipe]]:
    """Returns the recipes whose data are there without a download, by the names of the data."""
    if task == "classification":
        return {"digits": digits_vim}
    if task == "segmentation":
        return {"shapes": vim_shapes}
    return {"objects": vim_objects, "large-objects": vim_large_objects}


def _tables(ending: str) -> tuple[MetricTable, ...]:
    """Returns the average precisions of boxes and of masks, as papers print them."""
    return tuple(
        MetricTable(
            title=title,
            metrics={_HEADINGS.get(name, name): f"val_{kind}_{name}{ending}" for name in COLUMNS},
        )
        for title, kind in _KINDS.items()
    )


def _test_split(recipe: AnyRecipe) -> MaskSplit | None:
    """Returns "test" when the data have such a split with masks."""
    if not isinstance(recipe.data, MaskFolder):
        return None
    return "test" if (recipe.data.root / "test" / "masks").is_dir() else None
