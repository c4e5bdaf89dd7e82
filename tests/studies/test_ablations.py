"""The studies of the command: what they train, the paper's numbers beside, lessons before."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.studies.plans import make_up
from visionmamba.cli import main
from visionmamba.data import ImageFolder, Shapes
from visionmamba.models import DeiTConfig, VimConfig, save
from visionmamba.recipes import Recipe, digits_deit, digits_vim, vim_camvid, vim_shapes
from visionmamba.recipes.segmentation import SegmentationRecipe
from visionmamba.studies import Outcome, jobs, settings
from visionmamba.studies.backbone import BackboneComparison, Lessons
from visionmamba.studies.bidirectional import BidirectionalAblation
from visionmamba.studies.choices import ChoicesAblation
from visionmamba.studies.jobs import Job
from visionmamba.studies.readout import ReadoutAblation
from visionmamba.studies.settings import Task
from visionmamba.studies.stride import StrideComparison

pytestmark = pytest.mark.once

QUIET = Console(quiet=True)


def tiny_shapes() -> SegmentationRecipe:
    recipe = vim_shapes()
    backbone = VimConfig(image_size=32, patch_size=8, d_model=16, depth=2, readout="mean")
    return replace(
        recipe,
        data=Shapes(num_train=16, num_val=4, image_size=32),
        model=replace(recipe.model, backbone=backbone, channels=8, auxiliary_channels=8),
        preprocessing=replace(recipe.preprocessing, crop_size=32),
        batch_size=8,
        epochs=1,
    )


def folder_of_shapes(root: Path) -> Path:
    """Writes three splits of drawn shapes as any user's folder of pictures and masks."""
    shapes = Shapes(num_train=8, num_val=2, image_size=32)
    for split, count in (("train", 8), ("val", 2), ("test", 2)):
        pictures = shapes.open("train" if split == "train" else "val")
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            pictures.image(index).save(root / split / "images" / f"{index}.png")
            Image.fromarray(pictures.mask(index)).save(root / split / "masks" / f"{index}.png")
    (root / "classes.txt").write_text("\n".join(shapes.open("val").class_names))
    return root


def folder_of_classes(root: Path) -> Path:
    for split in ("train", "val"):
        for number, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for index in range(4):
                shade = np.full((20, 20, 3), 200 * number + index, dtype=np.uint8)
                Image.fromarray(shade).save(root / split / name / f"{index}.png")
    return root


def test_bidirectional_classification_has_five_rows_without_class_token() -> None:
    study = BidirectionalAblation().plan()
    models = [variant.recipe.model for variant in study.variants]
    assert [model.bidirectional for model in models] == [  # type: ignore[union-attr]
        "none", "sequence", "layer", "ssm", "ssm+conv",
    ]  # fmt: skip
    assert {model.readout for model in models} == {"mean"}  # type: ignore[union-attr]
    numbers = [variant.paper["ImageNet top-1"] for variant in study.variants]
    assert numbers == ["73.2", "not given", "70.9", "72.8", "73.9"]
    assert {variant.compared_with for variant in study.variants[1:]} == {"None"}
    for variant in study.variants:
        variant.recipe.model.build()


def test_bidirectional_segmentation_has_the_segmenter_head() -> None:
    study = BidirectionalAblation(task="segmentation", rows=("none", "ssm+conv")).plan()
    for variant in study.variants:
        assert isinstance(variant.recipe, SegmentationRecipe)
        assert variant.recipe.model.head == "segmenter"
        assert variant.recipe.ema_decay is None
        backbone = variant.recipe.model.backbone
        assert isinstance(backbone, VimConfig)
        assert backbone.readout == "mean"
    assert [variant.paper["ADE20K mIoU"] for variant in study.variants] == ["32.3", "35.9"]
    assert study.score == "val_miou"


def test_twin_of_vim_tiny_is_deit_tiny_under_the_same_recipe(tmp_path: Path) -> None:
    study = BackboneComparison(task="segmentation", data=str(tmp_path)).plan()
    vim, deit = (variant.recipe for variant in study.variants)
    assert isinstance(vim, SegmentationRecipe)
    assert isinstance(deit, SegmentationRecipe)
    size, drop_path = vim.model.backbone.image_size, vim.model.backbone.drop_path
    assert deit.model.backbone == DeiTConfig.tiny(
        image_size=size, drop_path=drop_path, num_classes=0
    )
    assert replace(deit, name=vim.name, model=vim.model) == vim
    assert [variant.name for variant in study.variants] == [
        "Vim-Ti, from scratch", "DeiT-Ti, from scratch",
    ]  # fmt: skip


def test_strides_are_halved_from_weights_of_both_and_compared_with_fine_tuning_alone(
    tmp_path: Path,
) -> None:
    for name, config in (("vim", digits_vim().model), ("deit", digits_deit().model)):
        save(config.build(), tmp_path / f"{name}.safetensors")
    chosen = StrideComparison(
        vim_weights=tmp_path / "vim.safetensors",
        deit_weights=tmp_path / "deit.safetensors",
        learning_rates=(1e-3,),
        seeds=(0,),
        epochs=1,
        batch_size=512,
        device="cpu",
        out=tmp_path / "study",
    )
    result = chosen.run(console=QUIET)
    rows = {row.variant: row for row in result.rows()}
    assert list(rows) == ["Vim, stride 2", "Vim, stride 1", "DeiT, stride 2", "DeiT, stride 1"]
    assert all(row.best_rate == 2e-4 and row.validation is not None for row in rows.values())
    for name, width in (("Vim", 72), ("DeiT", 64)):
        coarse, fine = rows[f"{name}, stride 2"], rows[f"{name}, stride 1"]
        assert coarse.difference is None
        assert fine.difference is not None and fine.difference.other == coarse.variant
        assert fine.parameters - coarse.parameters == (7 * 7 - 4 * 4) * width
    assert "| paper, ImageNet top-1 |" in result.to_markdown()


def test_missing_weights_and_tasks_without_a_stride_are_refused(tmp_path: Path) -> None:
    missing = tmp_path / "vim.safetensors"
    with pytest.raises(
        FileNotFoundError, match=r"there are no weights .*vim\.safetensors to fine-tune"
    ):
        StrideComparison(vim_weights=missing, deit_weights=missing).plan()
    with pytest.raises(ValueError, match="stride is for --task classification"):
        StrideComparison(vim_weights=missing, deit_weights=missing, task="segmentation")


def test_shorter_schedules_keep_the_share_of_the_warm_up(tmp_path: Path) -> None:
    whole = vim_camvid()
    assert whole.epoch_steps is not None
    assert whole.optimizer.warmup_steps is not None
    chosen = BackboneComparison(
        task="segmentation", data=str(tmp_path), epochs=whole.epochs // 2, epoch_steps=100
    )
    recipe = chosen.plan().variants[0].recipe
    steps = recipe.epochs * 100
    share = whole.optimizer.warmup_steps / (whole.epochs * whole.epoch_steps)
    assert recipe.optimizer.warmup_steps == round(share * steps)


def test_averaged_weights_are_kept_only_to_be_judged(tmp_path: Path) -> None:
    chosen = BackboneComparison(task="segmentation", data=str(tmp_path), judged="last_ema")
    study = chosen.plan()
    assert study.score == "val_miou_ema"
    assert study.variants[0].recipe.ema_decay == vim_camvid().ema_decay
    assert replace(chosen, judged="last").plan().variants[0].recipe.ema_decay is None


def test_lessons_take_equal_minutes_and_their_weights_start_the_segmenters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "vim_shapes", tiny_shapes)

    def answer(job: Job) -> Outcome:
        if isinstance(job.recipe, SegmentationRecipe):
            return Outcome(metrics={"val_miou": 0.5})
        job.out.mkdir(parents=True)
        seconds = {"VimConfig": 6.0, "DeiTConfig": 2.0}[type(job.recipe.model).__name__]
        seconds = 20.0 + seconds * job.recipe.epochs  # a start, and each epoch
        return Outcome(metrics={"val_accuracy": 0.6}, seconds=seconds)

    made = make_up(monkeypatch, answer)
    study = BackboneComparison(
        task="segmentation",
        pretraining_data=folder_of_classes(tmp_path / "classes"),
        pretraining_minutes=1.0,
        learning_rates=(1e-3,),
        seeds=(0,),
        out=tmp_path / "out",
    )
    result = study.run(console=QUIET)
    lessons = {job.out.name: job.recipe for job in made[6:8]}
    assert {name: recipe.epochs for name, recipe in lessons.items()} == {"vim": 10, "deit": 30}
    assert not any(recipe.resident for recipe in lessons.values())
    assert [path.name for path in (tmp_path / "out" / "pretraining").iterdir() if path.is_dir()]
    weights = [getattr(job.recipe, "weights", None) for job in made[8:]]
    folder = tmp_path / "out" / "pretraining"
    files = [folder / name / "last.safetensors" for name in ("vim", "deit")]
    assert weights == [None, None, *files]
    assert "Vim 10 epochs in 1.3 minutes, top-1 60.0%" in result.to_markdown()
    assert [row.variant for row in result.rows()] == [
        "Vim, from scratch", "DeiT, from scratch", "Vim, pretrained", "DeiT, pretrained",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="of 1 minutes of classification and not of 2"):
        replace(study, pretraining_minutes=2.0).run(console=QUIET)


def test_resident_lessons_have_their_own_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "vim_shapes", tiny_shapes)

    def answer(job: Job) -> Outcome:
        job.out.mkdir(parents=True)
        return Outcome(metrics={"val_accuracy": 0.6, "val_miou": 0.5}, seconds=1.0)

    made = make_up(monkeypatch, answer)
    BackboneComparison(
        task="segmentation",
        pretraining_data=folder_of_classes(tmp_path / "classes"),
        pretraining_resident=True,
        learning_rates=(1e-3,),
        seeds=(0,),
        out=tmp_path / "out",
    ).run(console=QUIET)
    lessons = [job.recipe for job in made if isinstance(job.recipe, Recipe)]
    assert len(lessons) == 8
    assert all(one.resident and one.mixing.cutmix for one in lessons)
    # trials as long as each other: five epochs in the time of one
    assert [one.epochs for one in lessons[-2:]] == [900, 900]


@pytest.mark.parametrize("epochs", [None, 1])
def test_lessons_without_result_say_what_to_change(
    epochs: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_up(monkeypatch, lambda job: Outcome(failure="loss is inf at step 3"))
    study = BackboneComparison(
        task="segmentation",
        pretraining_data=folder_of_classes(tmp_path / "classes"),
        pretraining_epochs=epochs,
        out=tmp_path / "out",
    )
    with pytest.raises(ValueError, match=r"of Vim.* came to nothing .* lower --pretraining-lr"):
        study.run(console=QUIET)


def test_published_numbers_stand_beside_pretrained_segmenters_only(tmp_path: Path) -> None:
    lesson = Lessons(weights=tmp_path / "w.safetensors", epochs=1, minutes=1.0, accuracy=0.5)
    study = BackboneComparison(task="segmentation", data=str(tmp_path)).plan(
        {"Vim-Ti": lesson, "DeiT-Ti": lesson}
    )
    assert [v.paper["ADE20K mIoU"] for v in study.variants] == ["", "", "41.0", "39.2"]


def test_pretrained_segmenters_of_either_kind_have_a_fifth_of_the_rates(tmp_path: Path) -> None:
    lesson = Lessons(weights=tmp_path / "w.safetensors", epochs=1, minutes=1.0, accuracy=0.5)
    study = BackboneComparison(
        task="segmentation", data=str(tmp_path), learning_rates=(1e-3, 3e-3)
    ).plan({"Vim-Ti": lesson, "DeiT-Ti": lesson})
    whole, fifth = (1e-3, 3e-3), (2e-4, 6e-4)
    assert [study.rates_of(variant) for variant in study.variants] == [whole, whole, fifth, fifth]
    assert study.to_dict()["variant_learning_rates"]["DeiT-Ti, pretrained"] == list(fifth)


def test_pretrained_variants_have_the_rates_given_for_them(tmp_path: Path) -> None:
    lesson = Lessons(weights=tmp_path / "w.safetensors", epochs=1, minutes=1.0, accuracy=0.5)
    study = BackboneComparison(
        task="segmentation",
        data=str(tmp_path),
        learning_rates=(1e-3,),
        pretraining_data=tmp_path,
        pretrained_learning_rates=(3e-4, 7e-5),
    ).plan({"Vim-Ti": lesson, "DeiT-Ti": lesson})
    own = (3e-4, 7e-5)
    assert [study.rates_of(variant) for variant in study.variants] == [(1e-3,)] * 2 + [own] * 2
    assert not any("fifth" in note for note in study.notes)


def test_test_split_is_judged_with_the_seed_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    class Evaluation:
        def save(self, folder: Path) -> None:
            folder.mkdir(parents=True)
            (folder / "evaluation.json").write_text('{"miou": 0, "macc": 0, "aacc": 0}')

    def evaluate(*given: object, **options: object) -> Evaluation:
        drawn.append(torch.rand(()).item())
        return Evaluation()

    monkeypatch.setattr(jobs, "evaluate_segmentation", evaluate)
    before = torch.get_rng_state()
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        recipe = replace(tiny_shapes(), seed=seed)
        job = Job(recipe=recipe, out=tmp_path / name, log=tmp_path / "log.txt", command="x")
        jobs._judge(job, "test")
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_command_trains_lessons_and_segmenters_and_judges_the_test_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "vim_camvid", tiny_shapes)
    out = tmp_path / "out"
    arguments = [
        *("ablate", "backbone", "--task", "segmentation", "--data"),
        *(str(folder_of_shapes(tmp_path / "masks")), "--pretraining-data"),
        *(str(folder_of_classes(tmp_path / "classes")), "--pretraining-epochs", "1"),
        *("--pretraining-image-size", "16", "--pretraining-batch-size", "4"),
        *("--learning-rates", "1e-3", "--seeds", "0", "--device", "cpu", "--out", str(out)),
    ]
    assert main(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Vim, pretrained is" in said
    record = json.loads((out / "backbone_segmentation.json").read_text())
    assert len(record["runs"]) == 4
    assert all(0 < run["test"]["miou"] < 1 for run in record["runs"])
    assert (out / "vim_pretrained" / "lr0.0002_epochs1_seed0" / "test_last").is_dir()
    assert "| mIoU, test |" in (out / "backbone_segmentation.md").read_text()


def test_readouts_of_any_recipe_stand_beside_the_papers_table(tmp_path: Path) -> None:
    study = ReadoutAblation(
        recipe="vim_tiny_cifar10", data=str(tmp_path), rows=("middle", "mean"), epochs=20
    ).plan()
    middle, mean = study.variants
    assert (middle.name, middle.compared_with) == ("Middle class token", None)
    assert (mean.name, mean.compared_with) == ("Mean pool", "Middle class token")
    assert mean.paper == {"ImageNet top-1": "73.9"}
    assert isinstance(mean.recipe, Recipe)
    assert isinstance(mean.recipe.model, VimConfig)
    assert mean.recipe.model.readout == "mean"
    assert isinstance(mean.recipe.data, ImageFolder)
    assert mean.recipe.data.root == tmp_path
    assert (mean.recipe.epochs, mean.recipe.batch_size) == (20, 512)
    plain = ReadoutAblation().plan()
    readouts = [one.recipe.model.readout for one in plain.variants]  # type: ignore[union-attr]
    assert readouts == ["mean", "max", "head", "double", "middle"]


@pytest.mark.parametrize(
    ("task", "recipe"),
    [
        ("classification", "finetune"),
        ("segmentation", "vim_tiny_upernet_ade20k"),
        ("detection", "vim_tiny_cascade_coco"),
    ],
)
def test_recipes_with_weights_are_compared_from_scratch(task: Task, recipe: str) -> None:
    variants = BackboneComparison(task=task, recipe=recipe).plan().variants
    assert [one.recipe.weights for one in variants] == [None, None]
    assert all(one.name.endswith("from scratch") for one in variants)


def test_each_choice_is_made_otherwise_alone() -> None:
    study = ChoicesAblation().plan()
    published, *others = (one.recipe for one in study.variants)
    assert isinstance(published.model, VimConfig)
    assert (published.model.norm, published.model.initialization) == ("rmsnorm", "published")
    assert published.optimizer.decay_a_log
    model, optimizer = published.model, published.optimizer
    assert others == [
        replace(published, model=replace(model, norm="layernorm")),
        replace(published, model=replace(model, initialization="symmetric")),
        replace(published, optimizer=replace(optimizer, decay_a_log=False)),
        replace(published, model=replace(model, readout="registers", num_registers=12)),
    ]
    assert [one.compared_with for one in study.variants] == [None, *["As published"] * 4]


def test_command_is_repeatable_from_what_it_says(tmp_path: Path) -> None:
    chosen = BidirectionalAblation(rows=("none", "ssm"), seeds=(3,), jobs=4, cuda_graphs=True)
    assert chosen.command == (
        "visionmamba ablate bidirectional --seeds 3 --jobs 4 --cuda-graphs --rows none ssm"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("bidirectional", "--rows"), "rows must be at least one"),
        (("bidirectional", "--epochs", "0"), "epochs must be at least 1; got 0"),
        (("bidirectional", "--batch-size", "0"), "batch_size must be at least 1; got 0"),
        (("bidirectional", "--epoch-steps", "3"), "epoch_steps is for --task segmentation"),
        (("bidirectional", "--data", "nowhere"), "there is no folder nowhere"),
        (("backbone", "--pretraining-data", "x"), "pretraining_data is for --task segmentation"),
        (("backbone", "--pretraining-minutes", "0"), "pretraining_minutes must be positive"),
        (("readout", "--rows"), "rows must be at least one of mean, max, head, double, middle"),
        (("backbone", "--pretrained-learning-rates", "1e-4"), "give that, too"),
        (("choices", "--pretrained-learning-rates", "1e-4"), "--pretrained-learning-rates"),
        (("choices", "--rows"), "rows must be at least one of published, layernorm, symmetric, no"),
        (("choices", "--task", "detection"), "choices is for --task classification"),
        (("readout", "--task", "segmentation"), "readout is for --task classification"),
        (("readout", "--recipe", "deit_tiny_cifar10"), "recipe must be one of a Vim for classific"),
        (("readout", "--recipe", "digits_vim", "--data", "."), "digits_vim has its own data"),
        (("readout", "--recipe", "folder_vim", "--data", "nowhere"), "there is no folder nowhere"),
        (("token",), "there is no study token"),
    ],
)
def test_mistakes_end_in_one_sentence(
    given: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablate", *given]) == 2
    assert message in capsys.readouterr().err
