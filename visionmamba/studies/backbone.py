"""Vim against DeiT under the same rules: from drawn weights, and after the same minutes of lessons.

Both get the same data, augmentation, epochs and learning rates, and each its best rate.
"""

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from visionmamba.models import DeiTConfig, DetectorConfig, SegmenterConfig, VimConfig
from visionmamba.recipes.dense import DenseRecipe
from visionmamba.recipes.detection import DetectionRecipe
from visionmamba.recipes.digits import digits_deit
from visionmamba.recipes.recipe import Recipe
from visionmamba.recipes.scratch import vim_tiny_folder
from visionmamba.recipes.segmentation import SegmentationRecipe
from visionmamba.recipes.small_sets import vim_tiny_imagenette
from visionmamba.studies.jobs import AnyRecipe, Job, Outcome
from visionmamba.studies.overlays import draw_largest_objects
from visionmamba.studies.pool import TrainingPool
from visionmamba.studies.settings import PretrainedStudySettings, StudySettings, Task
from visionmamba.studies.study import RunOptions, Study, Variant, alone_in
from visionmamba.tasks.detection_metrics import COLUMNS
from visionmamba.training.checkpoint import replace_json

if TYPE_CHECKING:
    from rich.console import Console

    from visionmamba.studies.results import StudyResult

# arXiv 2401.09417, tables 1 to 3: ImageNet-1k top-1; ADE20K mIoU, COCO AP from ImageNet weights
_PAPER: dict[Task, tuple[str, dict[str, str]]] = {
    "classification": ("ImageNet top-1", {"Vim-Ti": "76.1", "DeiT-Ti": "72.2"}),
    "segmentation": ("ADE20K mIoU", {"Vim-Ti": "41.0", "DeiT-Ti": "39.2"}),
    "detection": ("COCO mask AP", {"Vim-Ti": "39.2", "DeiT-Ti": "38.1"}),
}
_PAPER_AP = {  # table 3: boxes, masks; in the order of COLUMNS
    "Vim-Ti": ("45.7 63.9 49.6 26.1 49.0 63.2", "39.2 60.9 41.7 18.2 41.8 60.2"),
    "DeiT-Ti": ("44.4 63.0 47.8 26.1 47.4 61.8", "38.1 59.9 40.5 18.1 40.5 58.4"),
}
_HEAD_CHANNELS = 64
_BLOCKS_A_GLOBAL_ONE = 3  # ViTDet's four of twelve
_EPOCHS_FILE = "epochs.json"
_TRIAL_EPOCHS = (1, 1, 5)  # the first builds kernels; the others differ by epochs alone


@dataclass(frozen=True, kw_only=True)
class BackboneComparison(PretrainedStudySettings):
    """Train a Vim and a DeiT of the same width under the same rules and compare them.

    For segmentation, with UperNet on both, for detection with Cascade Mask R-CNN; there with
    --pretraining-data also from weights that both get from the same minutes of classification,
    which are spent first; these variants have learning rates of their own.
    """

    name: ClassVar[str] = "backbone"

    pretraining_data: Path | None = None
    """Segmentation, detection: a folder with train/ and val/ of class folders that both backbones
    learn first; None compares them from drawn weights alone."""
    pretraining_minutes: float = 3.0
    """Minutes of classification; as many epochs as each backbone can do in them beside the other,
    by the time of one, which trials of seven epochs find out. A start comes on top."""
    pretraining_epochs: int | None = None
    """Epochs of classification for both, instead of minutes."""
    pretraining_image_size: int = 160
    """Side in pixels of the pictures in classification."""
    pretraining_resident: bool = False
    """Keeps the pictures of classification decoded on the device, and changes them there as in
    `vim_tiny_imagenette`: for some thousand pictures, of which a GPU sees each a hundred times in
    minutes. By default processes prepare them as in `vim_tiny_folder`."""
    pretraining_lr: float = 1e-3
    """Peak learning rate of classification."""
    pretraining_batch_size: int = 256
    """Pictures of a step in classification."""
    window_size: int | None = None
    """Detection: side in patches of the windows that DeiT's attention is confined to, as in ViTDet
    (there 14), but for every third block; None lets all blocks see the whole picture, as Vim's."""
    overlays: int = 0
    """Detection: so many pictures of the validation split, those with the largest objects, are
    drawn with what each variant finds in them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task == "classification" and self.pretraining_data is not None:
            raise ValueError(
                "pretraining_data is for --task segmentation and detection; leave it out"
            )
        if self.pretraining_data is None and self.pretrained_learning_rates is not None:
            raise ValueError(
                "pretrained_learning_rates is for what --pretraining-data pretrains; give that, too"
            )
        if self.task != "detection" and (self.window_size is not None or self.overlays):
            raise ValueError("window_size and overlays are for --task detection; leave them out")
        if self.overlays < 0:
            raise ValueError(f"overlays must be at least 0; got {self.overlays}")
        if not 0 < self.pretraining_minutes < math.inf:
            raise ValueError(
                f"pretraining_minutes must be positive; got {self.pretraining_minutes}"
            )
        if self.pretraining_epochs is not None and self.pretraining_epochs < 1:
            raise ValueError(
                f"pretraining_epochs must be at least 1; got {self.pretraining_epochs}"
            )

    def run(self, *, num_workers: int = 0, console: "Console | None" = None) -> "StudyResult":
        """Trains what is not finished and returns the result; raises as `Study.run`."""
        from rich.console import Console

        console = console or Console()
        options = self.run_options(num_workers)
        recipes = self._recipes()
        lessons = self._pretrain(recipes, options, console)
        result = self.plan(lessons).run(options, console=console)
        if self.overlays:
            path = draw_largest_objects(result, self.overlays, device=options.device)
            console.print(f"drew {path}", highlight=False)
        return result

    def plan(self, lessons: "dict[str, Lessons] | None" = None) -> Study:
        """Returns the study, of which nothing is trained yet.

        Args:
            lessons: what classification gave each backbone, by its name; nothing compares them from
                drawn weights alone.
        """
        lessons = lessons or {}
        recipes = self._recipes()
        (vim, _), (deit, _) = recipes.items()
        heading, paper = _PAPER[self.task]
        is_published = self.task == "classification"  # the paper's others begin with weights
        variants = []
        for start in ("from scratch", "pretrained") if lessons else ("from scratch",):
            for name, recipe in recipes.items():
                own, rates = recipe, None
                if start == "pretrained" and isinstance(recipe, DenseRecipe):
                    own = replace(recipe, weights=lessons[name].weights)
                    rates = self.pretrained_rates
                is_comparable = is_published or start == "pretrained"
                variants.append(
                    Variant(
                        name=f"{name}, {start}",
                        recipe=own,
                        learning_rates=rates,
                        compared_with=f"{deit}, {start}" if name == vim else None,
                        paper={heading: paper.get(name, "") if is_comparable else ""},
                        paper_metrics=self._paper_metrics(name) if is_comparable else {},
                    )
                )
        notes = [f"Data: {self.data_name}; the paper's column: {heading.partition(' ')[0]}."]
        if lessons:
            said = "; ".join(f"{name} {lesson}" for name, lesson in lessons.items())
            notes.append(f"Pretrained on {self.pretraining_data}: {said}.")
            if self.pretrained_learning_rates is None:
                notes.append("The pretrained ones were trained at a fifth of the learning rates.")
        return self.study(variants, title=f"{vim} against {deit}, {self.task}", notes=notes)

    def _recipes(self) -> dict[str, AnyRecipe]:
        """Returns how the Vim and the DeiT are trained, by their names."""
        if self.task == "classification":
            return dict(classifiers_of(self))
        vim = self.vim_recipe()
        assert isinstance(vim, SegmentationRecipe | DetectionRecipe)
        backbone = vim.model.backbone
        assert isinstance(backbone, VimConfig)
        deit = replace(vim, name=_twins_name(vim), model=self._twins_model(vim.model))
        size = _size_of(backbone)
        return {f"Vim{size}": vim, f"DeiT{size}": deit}

    def _twins_model(self, model: SegmenterConfig | DetectorConfig) -> Any:
        """Returns the model with a DeiT in place of its Vim."""
        assert isinstance(model.backbone, VimConfig)
        backbone = _deit_like(model.backbone)
        if isinstance(model, DetectorConfig):
            num_global = max(backbone.depth // _BLOCKS_A_GLOBAL_ONE, 1)
            return replace(
                model, backbone=backbone, window_size=self.window_size, num_global=num_global
            )
        kinds: dict[str, Any] = {
            name: "residual"
            for name in ("features", "last_features")
            if getattr(model, name) == "mixer"  # which a DeiT does not have
        }
        return replace(model, backbone=backbone, **kinds)

    def _paper_metrics(self, name: str) -> dict[str, str]:
        """Returns what the paper's table 3 has of a model, by the names of the metrics."""
        if self.task != "detection" or name not in _PAPER_AP:
            return {}
        return {
            f"val_{kind}_{column}": number
            for kind, numbers in zip(("box", "mask"), _PAPER_AP[name], strict=True)
            for column, number in zip(COLUMNS, numbers.split(), strict=True)
        }

    def _pretrain(
        self, recipes: dict[str, AnyRecipe], options: RunOptions, console: "Console"
    ) -> "dict[str, Lessons]":
        """Teaches each backbone to classify, both at once where there are jobs for it."""
        if self.pretraining_data is None:
            return {}
        classifiers = {name: self._classifier(recipe) for name, recipe in recipes.items()}
        with alone_in(self.out), TrainingPool(min(options.jobs, len(classifiers))) as pool:
            epochs = self._epochs(classifiers, options, pool)
            plan = {name: replace(one, epochs=epochs[name]) for name, one in classifiers.items()}
            outcomes = self._train(plan, options, pool)
        lessons = {}
        for name, outcome in outcomes.items():
            self._require_result(name, outcome)
            lessons[name] = Lessons(
                weights=self._folder(name) / "last.safetensors",
                epochs=epochs[name],
                minutes=outcome.seconds / 60,
                accuracy=outcome.metrics["val_accuracy"],
            )
            console.print(f"{name}: {lessons[name]}", highlight=False)
        return lessons

    def _classifier(self, recipe: AnyRecipe) -> Recipe:
        """Returns how the backbone of a segmenter or detector learns to classify."""
        assert isinstance(recipe, SegmentationRecipe | DetectionRecipe)
        assert self.pretraining_data is not None
        side, backbone = self.pretraining_image_size, recipe.model.backbone
        model: VimConfig | DeiTConfig
        if isinstance(backbone, VimConfig):
            model = replace(backbone, image_size=side, readout="middle")
        else:
            model = replace(backbone, image_size=side)
        lessons = vim_tiny_imagenette if self.pretraining_resident else vim_tiny_folder
        plain = lessons(self.pretraining_data)
        return replace(
            plain,
            name=f"{recipe.name}_classifier",
            model=model,
            preprocessing=replace(plain.preprocessing, image_size=side),
            optimizer=replace(plain.optimizer, lr=self.pretraining_lr),
            batch_size=self.pretraining_batch_size,
            precision=recipe.precision,
        )

    def _epochs(
        self, classifiers: dict[str, Recipe], options: RunOptions, pool: TrainingPool
    ) -> dict[str, int]:
        """Returns the epochs of each classifier: those asked for, or what fits into the minutes.

        Trials of unequal length give the time of an epoch, without that of a start; their rate is
        small, as they have no warm-up.
        """
        if self.pretraining_epochs is not None:
            return dict.fromkeys(classifiers, self.pretraining_epochs)
        path = self.out / "pretraining" / _EPOCHS_FILE
        if not path.exists():
            trials = {
                f"{name} trial {number}": replace(
                    one,
                    epochs=epochs,
                    optimizer=replace(one.optimizer, lr=one.optimizer.lr / 100, warmup_epochs=0.0),
                )
                for number, epochs in enumerate(_TRIAL_EPOCHS)
                for name, one in classifiers.items()
            }
            outcomes = self._train(trials, options, pool)
            for name in trials:
                shutil.rmtree(self._folder(name), ignore_errors=True)
            for name, outcome in outcomes.items():
                self._require_result(name, outcome)
            epochs = {
                name: max(
                    1,
                    round(60 * self.pretraining_minutes / _seconds_of_an_epoch(name, outcomes)),
                )
                for name in classifiers
            }
            replace_json(path, {"minutes": self.pretraining_minutes, "epochs": epochs})
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["minutes"] != self.pretraining_minutes:
            raise ValueError(
                f"{path} is of {found['minutes']:g} minutes of classification and not of "
                f"{self.pretraining_minutes:g}; repeat them, or give another --out"
            )
        return {name: int(found["epochs"][name]) for name in classifiers}

    def _require_result(self, name: str, outcome: Outcome) -> None:
        if outcome.failure is not None:
            raise ValueError(
                f"the classification of {name} came to nothing ({outcome.failure}); lower "
                f"--pretraining-lr, which is {self.pretraining_lr:g}"
            )

    def _train(
        self, recipes: dict[str, Recipe], options: RunOptions, pool: TrainingPool
    ) -> dict[str, Outcome]:
        """Returns what each training came to, by its name."""
        names = {self._folder(name): name for name in recipes}
        outcomes: dict[str, Outcome] = {}
        for folder, name in names.items():
            job = Job(
                recipe=recipes[name],
                out=folder,
                log=self.out / "logs" / f"pretraining_{folder.name}.txt",
                command=self.command,
                device=options.device,
                num_workers=options.num_workers * options.jobs // min(options.jobs, 2),
                cuda_graphs=options.cuda_graphs,
            )
            pool.submit(job)
        while pool.num_unfinished:
            job, outcome = pool.next_outcome()
            outcomes[names[job.out]] = outcome
        return {name: outcomes[name] for name in recipes}

    def _folder(self, name: str) -> Path:
        return self.out / "pretraining" / name.lower().replace(" ", "_").replace("-", "_")


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What a backbone got from classification."""

    weights: Path
    """Where it is."""
    epochs: int
    """Passes over the pictures."""
    minutes: float
    """Wall-clock time, beside the other backbone's."""
    accuracy: float
    """Share of the validation pictures classified rightly in the end."""

    def __str__(self) -> str:
        return f"{self.epochs} epochs in {self.minutes:.1f} minutes, top-1 {self.accuracy:.1%}"


def classifiers_of(settings: StudySettings) -> dict[str, Recipe]:
    """Returns how the Vim and the DeiT of a study of classifiers are trained, by their names.

    Raises:
        FileNotFoundError, ValueError: as `StudySettings.vim_recipe`.
    """
    vim = settings.vim_recipe()
    assert isinstance(vim, Recipe) and isinstance(vim.model, VimConfig)
    if settings.data_name == "digits":
        deit = settings.with_options(digits_deit())
        assert isinstance(deit, Recipe)
    else:
        deit = replace(vim, name=_twins_name(vim), model=_deit_like(vim.model))
    size = _size_of(vim.model)
    return {f"Vim{size}": vim, f"DeiT{size}": deit}


def _size_of(vim: VimConfig) -> str:
    return "-Ti" if (vim.d_model, vim.depth) == (192, 24) else ""


def _seconds_of_an_epoch(name: str, outcomes: dict[str, Outcome]) -> float:
    """Returns what an epoch of a backbone took in its trials."""
    short, long = (outcomes[f"{name} trial {number}"].seconds for number in (1, 2))
    if short >= long:  # a picture or two
        return long / _TRIAL_EPOCHS[2]
    return (long - short) / (_TRIAL_EPOCHS[2] - _TRIAL_EPOCHS[1])


def _deit_like(vim: VimConfig) -> DeiTConfig:
    """Returns the DeiT of a Vim's width: half as many blocks, which have an MLP each, as DeiT-Ti
    beside Vim-Ti."""
    return DeiTConfig(
        image_size=vim.image_size,
        patch_size=vim.patch_size,
        stride=vim.stride,
        in_channels=vim.in_channels,
        num_classes=max(vim.num_classes, 1),
        d_model=vim.d_model,
        depth=max(vim.depth // 2, 1),
        num_heads=max(vim.d_model // _HEAD_CHANNELS, 1),
        drop_path=vim.drop_path,
    )


def _twins_name(vim: AnyRecipe) -> str:
    return vim.name.replace("vim", "deit")
