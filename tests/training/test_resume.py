"""A run that is killed, stopped or started twice."""

import signal
from pathlib import Path

import pytest

from tests.training.processes import Death, read_order, train_in_process
from tests.training.small import STEPS_PER_EPOCH

pytestmark = pytest.mark.once

KILLED = -signal.SIGKILL
COMPARED = ("last.safetensors", "best.safetensors", "metrics.csv")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert train_in_process(folder / "run", folder / "order") == 0
    return folder


def assert_equal_runs(folder: Path, expected: Path) -> None:
    assert read_order(folder / "order") == read_order(expected / "order")
    for name in COMPARED:
        actual_bytes = (folder / "run" / name).read_bytes()
        assert actual_bytes == (expected / "run" / name).read_bytes(), name


@pytest.mark.slow
def test_three_kills_inside_epochs_lose_nothing(unbroken: Path, tmp_path: Path) -> None:
    for batch in (2, 9, STEPS_PER_EPOCH + 7):
        death = Death(at_batch=batch)
        assert train_in_process(tmp_path / "run", tmp_path / "order", death) == KILLED
    assert train_in_process(tmp_path / "run", tmp_path / "order") == 0
    assert_equal_runs(tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])  # the first of all, inside an epoch, at its end
def test_kill_while_a_checkpoint_is_written_loses_nothing(
    unbroken: Path, tmp_path: Path, number: int
) -> None:
    death = Death(in_checkpoint=number)
    assert train_in_process(tmp_path / "run", tmp_path / "order", death) == KILLED
    assert (tmp_path / "run" / "last.ckpt.tmp").exists()
    assert train_in_process(tmp_path / "run", tmp_path / "order") == 0
    assert not (tmp_path / "run" / "last.ckpt.tmp").exists()
    assert_equal_runs(tmp_path, unbroken)
