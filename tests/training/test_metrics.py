"""metrics.csv after interruptions."""

from pathlib import Path

import pytest

from visionmamba.training import read_metrics
from visionmamba.training.metrics import MetricsFile

pytestmark = pytest.mark.once

NAMES = ("val_loss", "val_accuracy")
ROWS = [
    {"step": 2.0, "epoch": 1.0, "lr": 0.1, "train_loss": 2.5, "gradient_norm": 1.0},
    {"step": 3.0, "epoch": 1.0, "val_loss": 2.0, "val_accuracy": 0.5},
    {"step": 4.0, "epoch": 2.0, "lr": 0.2, "train_loss": 1.5, "gradient_norm": 3.0},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = MetricsFile(tmp_path / "metrics.csv", metric_names=NAMES, last_step=0)
    for row in ROWS:
        file.append(row)
    return tmp_path / "metrics.csv"


def test_rows_come_back_without_empty_cells(path: Path) -> None:
    assert read_metrics(path) == ROWS


def test_every_row_is_on_disk_at_once(path: Path) -> None:
    assert path.read_text().splitlines() == [
        "step,epoch,lr,train_loss,gradient_norm,val_loss,val_accuracy",
        "2,1,0.1,2.5,1,,",
        "3,1,,,,2,0.5",
        "4,2,0.2,1.5,3,,",
    ]


def test_rows_after_the_checkpoint_are_dropped(path: Path) -> None:
    MetricsFile(path, metric_names=NAMES, last_step=3)
    assert read_metrics(path) == ROWS[:2]


def test_half_written_row_is_left_out(path: Path) -> None:
    whole = path.read_text()
    path.write_text(whole[:-4])
    assert read_metrics(path) == ROWS[:2]


def test_new_run_begins_an_empty_file(path: Path) -> None:
    MetricsFile(path, metric_names=NAMES, last_step=0)
    assert read_metrics(path) == []
