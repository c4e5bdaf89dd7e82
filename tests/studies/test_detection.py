"""Studies of detectors: what is trained, all columns of average precision, overlays by a rule."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.recipes.detectors import folder_in_coco_format, small_recipe
from tests.studies.plans import make_up
from tests.studies.test_ablations import folder_of_classes
from visionmamba.cli import main
from visionmamba.data import ArrayObjects, Coco, Objects
from visionmamba.models import DeiTConfig
from visionmamba.recipes import DetectionRecipe, vim_nuclei
from visionmamba.studies import Outcome, plots, settings
from visionmamba.studies.backbone import BackboneComparison, Lessons
from visionmamba.studies.jobs import Job
from visionmamba.studies.overlays import choose_largest

pytestmark = pytest.mark.once

QUIET = Console(quiet=True)


def test_twin_of_the_nuclei_is_deit_tiny_under_the_same_recipe(tmp_path: Path) -> None:
    study = BackboneComparison(task="detection", data=str(tmp_path), judged="last").plan()
    vim, deit = (variant.recipe for variant in study.variants)
    assert isinstance(vim, DetectionRecipe)
    assert isinstance(deit, DetectionRecipe)
    size, drop_path = vim.model.backbone.image_size, vim.model.backbone.drop_path
    assert deit.model.backbone == DeiTConfig.tiny(
        image_size=size, drop_path=drop_path, num_classes=0
    )
    assert replace(deit, name=vim.name, model=vim.model) == vim
    assert vim == replace(vim_nuclei(), data=Coco(root=tmp_path), ema_decay=None)
    assert study.score == "val_mask_ap"


def test_windows_are_deits_alone() -> None:
    chosen = BackboneComparison(task="detection", data="large-objects", window_size=14)
    vim, deit = (variant.recipe.model for variant in chosen.plan().variants)
    assert (vim.window_size, deit.window_size) == (None, 14)  # type: ignore[union-attr]
    assert deit.num_global == 4  # type: ignore[union-attr]
    deit.build()


def test_tables_have_every_column_of_every_seed_and_the_papers_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nuclei have no large object to judge, so that its column is empty."""

    def answer(job: Job) -> Outcome:
        score = 0.4 + 0.02 * job.recipe.seed
        return Outcome(
            metrics={"val_mask_ap": score, "val_box_ap": score, "val_box_small": score / 2}
        )

    make_up(monkeypatch, answer)
    lesson = Lessons(weights=tmp_path / "w.safetensors", epochs=1, minutes=1.0, accuracy=0.5)
    chosen = BackboneComparison(
        task="detection", data=str(tmp_path), learning_rates=(1e-3,), seeds=(0, 1), out=tmp_path
    )
    study = chosen.plan({"Vim-Ti": lesson, "DeiT-Ti": lesson})
    result = study.run(console=QUIET)
    page = result.to_markdown()
    boxes = page.partition("Boxes, validation:")[2].partition("Masks, validation:")[0]
    lines = [line for line in boxes.splitlines() if line.startswith("|")]
    assert lines[0] == "| variant | AP | AP50 | AP75 | small | medium | large |"
    assert lines[2] == ("| Vim-Ti, from scratch | 41.00 ± 1.41 | - | - | 20.50 ± 0.71 | - | - |")
    assert "| Vim-Ti, pretrained, paper | 45.7 | 63.9 | 49.6 | 26.1 | 49.0 | 63.2 |" in lines
    assert "from scratch, paper" not in page
    assert "paper, COCO mask AP" in page
    assert len(result.metric_tables()) == 2
    assert study.rates_of(study.variants[2]) == (2e-4,)


def picture_with(*sides: float) -> Objects:
    boxes = np.array([(0, 0, side, side) for side in sides], dtype=np.float64).reshape(-1, 4)
    return Objects(
        image_id=0,
        height=10,
        width=10,
        boxes=boxes,
        labels=np.ones(len(sides), dtype=np.int64),
        is_crowd=np.array([side == 9 for side in sides], dtype=np.bool_),
        areas=boxes[:, 2] ** 2,
        masks=None,
    )


def test_pictures_are_chosen_by_their_largest_object_alone() -> None:
    found = tuple(picture_with(*sides) for sides in ((2, 4), (), (8,), (9, 1), (3, 8), (5,)))
    pictures = ArrayObjects(
        pixels=np.zeros((6, 10, 10, 3), np.uint8), found=found, class_names=("thing",)
    )
    assert choose_largest(pictures, 4) == [2, 4, 5, 0]  # 9 is a crowd's
    assert choose_largest(pictures, 10) == [2, 4, 5, 0, 3]


def test_command_trains_lessons_and_detectors_and_draws_what_they_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "vim_nuclei", lambda: small_recipe(epochs=1, epoch_steps=1))
    for name in ("plot_curves", "plot_rates"):
        monkeypatch.setattr(plots, name, lambda result, theme: b"")
    out = tmp_path / "out"
    arguments = [
        *("ablate", "backbone", "--task", "detection", "--data"),
        *(str(folder_in_coco_format(tmp_path / "own")), "--pretraining-data"),
        *(str(folder_of_classes(tmp_path / "classes")), "--pretraining-epochs", "1"),
        *("--pretraining-image-size", "16", "--pretraining-batch-size", "4", "--overlays", "2"),
        *("--learning-rates", "1e-3", "--seeds", "0", "--device", "cpu", "--out", str(out)),
    ]
    assert main(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Vim, pretrained is" in said
    assert "Masks, validation" in said
    record = json.loads((out / "backbone_detection.json").read_text())
    assert len(record["runs"]) == 4
    assert all("val_box_ap50" in run["metrics"] for run in record["runs"])
    with Image.open(out / "backbone_detection_overlays.png") as sheet:
        assert sheet.width > 5 * 384
        assert sheet.height > 2 * 384


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("bidirectional", "--task", "detection"), "bidirectional is for --task classification"),
        (("backbone", "--task", "detection", "--cuda-graphs"), "cannot be recorded"),
        (("backbone", "--overlays", "3"), "are for --task detection"),
        (("backbone", "--window-size", "3"), "are for --task detection"),
        (("backbone", "--task", "detection", "--overlays", "-1"), "overlays must be at least 0"),
        (
            ("backbone", "--task", "detection", "--data", "nowhere"),
            "there is no folder nowhere to learn detection from; give --data a folder, or objects "
            "or large-objects",
        ),
    ],
)
def test_mistakes_end_in_one_sentence(
    given: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablate", *given]) == 2
    assert message in capsys.readouterr().err
