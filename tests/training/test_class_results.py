"""What a run leaves of a task that judges single classes and draws what it makes of pictures."""

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.training.small import STEPS_PER_EPOCH, small_recipe
from visionmamba.data import Batch
from visionmamba.recipes import Recipe
from visionmamba.tasks import ClassificationTask
from visionmamba.tasks.validation import ClassMetrics, SummedValidation
from visionmamba.training import Experiment, FitResult, fit
from visionmamba.training.engine import keeps_picture
from visionmamba.training.metrics import ClassesFile, ClassValues

pytestmark = pytest.mark.once


class DrawingTask(ClassificationTask):
    """Judges two classes, one of which never appears, and draws the first picture of a batch."""

    def begin_validation(self) -> SummedValidation[Batch]:
        return SummedValidation(
            self._sums_of, metrics_of=self._metrics_of, class_metrics_of=self._class_metrics_of
        )

    def _class_metrics_of(self, sums: Tensor) -> ClassMetrics:
        assert sums.dtype == torch.float64
        return {"road, wet": {"iou": 0.25, "accuracy": 0.5}, "bear": {"iou": None, "accuracy": 0.0}}

    def draw(self, batch: Batch) -> Image.Image:
        assert not self.model.training
        assert not torch.is_grad_enabled()
        return Image.new("L", (8, 6), round(255 * float(batch.images[0].mean().sigmoid())))


class DrawingRecipe(Recipe):
    """The same run with the other task."""

    def build(self, *, num_workers: int = 0, rank: int = 0, num_ranks: int = 1) -> Experiment:
        experiment = super().build(num_workers=num_workers, rank=rank, num_ranks=num_ranks)
        experiment.task.__class__ = DrawingTask
        return experiment


def drawing_recipe(**changes: Any) -> DrawingRecipe:
    recipe = small_recipe(**changes)
    return DrawingRecipe(**{name: getattr(recipe, name) for name in recipe.__dataclass_fields__})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    out = tmp_path_factory.mktemp("classes") / "run"
    return fit(drawing_recipe(ema_decay=0.9), out, device="cpu", progress=False)


def test_classes_have_a_row_a_validation(finished: FitResult) -> None:
    with open(finished.out / "classes.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "epoch", "class", "iou", "accuracy", "iou_ema", "accuracy_ema"]
    assert rows[1:3] == [
        [str(STEPS_PER_EPOCH), "1", "road, wet", "0.25", "0.5", "0.25", "0.5"],
        [str(STEPS_PER_EPOCH), "1", "bear", "", "0", "", "0"],
    ]
    assert [row[1] for row in rows[1:]] == ["1", "1", "2", "2"]


def test_pictures_lie_beside_the_weights_and_in_tensorboard(finished: FitResult) -> None:
    names = sorted(path.name for path in (finished.out / "pictures").iterdir())
    assert names == ["epoch_0001.png", "epoch_0002.png"]
    with Image.open(finished.out / "pictures" / "epoch_0001.png") as picture:
        assert (picture.size, picture.mode) == ((8, 6), "RGB")
    board = EventAccumulator(str(finished.out / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Images("predictions")] == [11, 22]


def test_long_run_keeps_a_few_pictures_and_the_last() -> None:
    assert [epoch for epoch in range(1, 24) if keeps_picture(epoch, 23)] == [*range(2, 23, 2), 23]
    assert sum(keeps_picture(epoch, 300) for epoch in range(1, 301)) == 20
    assert all(keeps_picture(epoch, 20) for epoch in range(1, 21))


def test_only_pictures_that_are_kept_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(DrawingTask, "draw", lambda *_: drawn.append(1))
    monkeypatch.setattr("visionmamba.training.engine.keeps_picture", lambda epoch, _: epoch == 2)
    fit(drawing_recipe(), tmp_path / "run", device="cpu", progress=False)
    assert len(drawn) == 1


def test_sharding_needs_a_validation_that_is_even(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DrawingTask, "validates_evenly", False)
    with pytest.raises(ValueError, match=r"--inference\.mode whole, or --strategy ddp"):
        fit(drawing_recipe(), tmp_path / "run", device="cpu", devices=2, strategy="fsdp")
    assert not (tmp_path / "run").exists()


def test_run_that_died_after_its_last_epoch_keeps_its_classes(
    finished: FitResult, tmp_path: Path
) -> None:
    shutil.copytree(finished.out, tmp_path / "run")
    expected = (finished.out / "classes.csv").read_bytes()
    (tmp_path / "run" / "results.json").unlink()
    fit(drawing_recipe(ema_decay=0.9), tmp_path / "run", device="cpu", progress=False)
    assert (tmp_path / "run" / "classes.csv").read_bytes() == expected


def test_folder_with_pictures_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match=r"holds a pictures but no recipe\.json"):
        fit(drawing_recipe(), tmp_path, device="cpu", progress=False)
    assert (tmp_path / "pictures").is_dir()


VALUES: ClassValues = {"sky": {"iou": 0.5}, "two\nlines": {"iou": None}}


def test_rows_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "classes.csv"
    file = ClassesFile(path, last_step=0)
    file.append(VALUES, step=3, epoch=1)
    first = path.read_text()
    file.append(VALUES, step=6, epoch=2)
    with open(path, "a") as half_written:
        half_written.write("9,3,sk")
    ClassesFile(path, last_step=5)
    assert path.read_text() == first == "step,epoch,class,iou\n3,1,sky,0.5\n3,1,two lines,\n"
    ClassesFile(path, last_step=2)
    assert not path.exists()
