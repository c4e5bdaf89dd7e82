"""Several processes train as one does: same steps, same files, one end for all."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.recipes.detectors import small_recipe
from tests.training.detectors import knowing_recipe
from tests.training.ranks import (
    NOT_FINITE,
    STOPPED,
    shared_recipe,
    shared_segmentation,
    train_in_ranks,
)
from tests.training.small import STEPS_PER_EPOCH
from visionmamba.models import load
from visionmamba.models.weights import read_tensors
from visionmamba.training import fit, read_metrics

ROUNDING = 1e-3  # of float32 sums in another order, over 22 steps
WEIGHTS = ("last", "best", "last_ema", "best_ema")

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(
        sys.platform == "win32", reason="gloo and signals are tested on POSIX systems"
    ),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that one process makes."""
    out = tmp_path_factory.mktemp("alone") / "run"
    fit(shared_recipe(), out, device="cpu", progress=False)
    return out


def assert_same_run(out: Path, expected: Path) -> None:
    rows, expected_rows = read_metrics(out / "metrics.csv"), read_metrics(expected / "metrics.csv")
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected_row, rel=ROUNDING, abs=ROUNDING)
    for name in WEIGHTS:
        tensors = read_tensors(expected / f"{name}.safetensors")
        for key, tensor in read_tensors(out / f"{name}.safetensors").items():
            torch.testing.assert_close(tensor, tensors[key], rtol=0.02, atol=2e-4, msg=key)


@pytest.mark.parametrize(
    ("strategy", "recompute"),
    [("ddp", False), ("fsdp", False), ("fsdp", True)],
    ids=["ddp", "fsdp", "fsdp-activation-checkpointing"],
)
def test_two_processes_follow_one(
    alone: Path, tmp_path: Path, strategy: str, recompute: bool
) -> None:
    model = replace(shared_recipe().model, activation_checkpointing=recompute)
    codes = train_in_ranks(tmp_path / "run", ranks=2, strategy=strategy, model=model)
    assert codes == [0, 0]
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_follow_one(tmp_path: Path, strategy: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert train_in_ranks(one, ranks=1, strategy="auto", device="cuda") == [0]
    assert train_in_ranks(two, ranks=2, strategy=strategy, device="cuda") == [0, 0]
    assert_same_run(two, one)


@pytest.mark.slow
def test_two_processes_share_a_segmenters_blocks_and_follow_one(tmp_path: Path) -> None:
    fit(shared_segmentation(), tmp_path / "one", device="cpu", progress=False)
    codes = train_in_ranks(tmp_path / "two", ranks=2, make=shared_segmentation, strategy="fsdp")
    assert codes == [0, 0]
    assert_same_run(tmp_path / "two", tmp_path / "one")
    for name in ("classes.csv", "pictures/epoch_0002.png"):
        assert (tmp_path / "two" / name).exists()


def average_precisions(out: Path) -> list[dict[str, float]]:
    rows = read_metrics(out / "metrics.csv")
    return [{k: v for k, v in row.items() if k.startswith("val_")} for row in rows]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_put_their_detections_together(tmp_path: Path, strategy: str) -> None:
    fit(knowing_recipe(), tmp_path / "one", device="cpu", progress=False)
    codes = train_in_ranks(tmp_path / "two", ranks=2, make=knowing_recipe, strategy=strategy)
    assert codes == [0, 0]
    expected = average_precisions(tmp_path / "one")
    assert average_precisions(tmp_path / "two") == expected
    assert 0 < expected[-1]["val_mask_ap_ema"] < 1
    classes = [(tmp_path / name / "classes.csv").read_text() for name in ("one", "two")]
    assert classes[0] == classes[1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_train_a_detector(tmp_path: Path, strategy: str) -> None:
    out = tmp_path / "run"
    codes = train_in_ranks(
        out, ranks=2, make=small_recipe, strategy=strategy, device="cuda", precision="bfloat16"
    )
    assert codes == [0, 0]
    assert "val_mask_ap" in average_precisions(out)[-1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_synchronise_batch_norms(tmp_path: Path, strategy: str) -> None:
    for ranks in (1, 2):
        codes = train_in_ranks(
            tmp_path / str(ranks),
            ranks=ranks,
            make=shared_segmentation,
            strategy=strategy if ranks == 2 else "auto",
            device="cuda",
            head="upernet",
        )
        assert codes == [0] * ranks
    assert_same_run(tmp_path / "2", tmp_path / "1")


@pytest.mark.slow
def test_run_killed_three_times_goes_on_with_other_numbers_of_processes(
    alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first = train_in_ranks(out, ranks=1, strategy="auto", rank_1="killed", at_step=6)
    second = train_in_ranks(out, ranks=2, strategy="fsdp", rank_1="killed", at_step=13)
    third = train_in_ranks(out, ranks=2, rank_1="killed", at_step=18, device_batch_size=16)
    assert [first[-1], second[-1], third[-1]] == [-signal.SIGKILL] * 3
    assert train_in_ranks(out, ranks=1, strategy="auto") == [0]
    assert_same_run(out, alone)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_value_not_finite_on_one_process_stops_all(tmp_path: Path, strategy: str) -> None:
    codes = train_in_ranks(tmp_path / "run", ranks=2, strategy=strategy, rank_1="not finite")
    assert codes == [NOT_FINITE, NOT_FINITE]
    messages = {path.read_text() for path in tmp_path.glob("error-*.txt")}
    (message,) = messages
    assert message.startswith("training stopped at step 1 with learning rate")
    assert "it first appears in layer norm" in message
    assert not (tmp_path / "run").exists()


def test_signal_to_one_process_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    codes = train_in_ranks(out, ranks=2, rank_1="asked to stop", at_step=6)
    assert codes == [STOPPED, STOPPED]
    state = torch.load(out / "last.ckpt", weights_only=True)["visionmamba"]
    assert state["step"] == 7  # all learn of it in the step that follows


@pytest.mark.parametrize(
    ("launcher", "nodes"), [("torchrun on machines of one process each", 2), ("srun", 1)]
)
def test_processes_of_other_launchers_find_each_other(
    tmp_path: Path, launcher: str, nodes: int
) -> None:
    out = tmp_path / "run"
    assert train_in_ranks(out, ranks=2, launcher=launcher, epochs=1) == [0, 0]
    results = json.loads((out / "results.json").read_text())
    assert (results["world_size"], results["nodes"]) == (2, nodes)


def run_program(*command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], check=True, env=environment, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "fit"])
def test_launchers_start_the_processes(tmp_path: Path, launcher: str) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    commands = {
        "torchrun": (*torchrun, "-m", "tests.training.ranks", str(tmp_path / "run"), "1"),
        "fit": ("-m", "tests.training.ranks", str(tmp_path / "run"), "2"),
    }
    run_program(*commands[launcher])
    assert len(read_metrics(tmp_path / "run" / "metrics.csv")) == STEPS_PER_EPOCH + 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["world_size"], results["strategy"]) == (2, "ddp")
    assert load(tmp_path / "run" / "last_ema.safetensors", device="cpu").config.num_classes == 10
