"""One run from beginning to end: what it leaves, what it refuses, how it stops."""

import json
import os
import shutil
import signal
import threading
import time
import warnings
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.training.small import STEPS_PER_EPOCH, small_recipe
from visionmamba.data import BatchTooLargeError, ImageFolder
from visionmamba.models import load, read_header
from visionmamba.models.weights import read_tensors
from visionmamba.recipes import Recipe
from visionmamba.training import Experiment, FitResult, NonFiniteError, fit, read_metrics
from visionmamba.training.graphs import launch_text

ROUNDING = 1e-4  # of float32 sums in another order, over eleven steps


def steps_of(result: FitResult) -> list[dict[str, float]]:
    return [row for row in read_metrics(result.out / "metrics.csv") if "train_loss" in row]


def train(recipe: Recipe, out: Path, **options: Any) -> FitResult:
    return fit(recipe, out, device="cpu", **{"progress": False, **options})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    return train(small_recipe(), tmp_path_factory.mktemp("fit") / "run")


def test_run_leaves_all_its_files(finished: FitResult) -> None:
    assert sorted(path.name for path in finished.out.iterdir()) == [
        "best.safetensors",
        "curves.png",
        "last.ckpt",
        "last.safetensors",
        "metrics.csv",
        "recipe.json",
        "results.json",
        "tensorboard",
    ]
    assert any((finished.out / "tensorboard").iterdir())


@pytest.mark.once
def test_results_say_what_was_done(finished: FitResult) -> None:
    results = json.loads((finished.out / "results.json").read_text())
    assert results["name"] == "digits_vim"
    assert results["metrics"] == finished.metrics
    assert results["steps"] == 2 * STEPS_PER_EPOCH
    assert results["data"]["train_images"] == 1437
    assert results["recipe"]["model"]["d_model"] == 16
    assert results["versions"]["torch"]
    assert (results["world_size"], results["strategy"]) == (1, "single")
    assert results["unreadable"] == {"train": [], "val": []}
    assert results["loader"]["images_per_second"] > 0
    assert 0 <= results["loader"]["waiting_share"] <= 1
    assert results["cuda_graphs"] == {"used": False, "why_not": "the model is on the cpu"}
    assert results["parameters"] == sum(
        p.numel() for p in load(finished.out / "last.safetensors").parameters()
    )


@pytest.mark.once
def test_rows_are_the_chosen_steps_and_every_validation(finished: FitResult) -> None:
    rows = read_metrics(finished.out / "metrics.csv")
    assert [int(row["step"]) for row in rows if "train_loss" in row] == [3, 6, 9, 12, 15, 18, 21]
    assert [int(row["step"]) for row in rows if "val_loss" in row] == [11, 22]
    assert rows[-1]["val_accuracy"] == pytest.approx(finished.metrics["val_accuracy"])


@pytest.mark.once
def test_weights_say_how_to_use_them(finished: FitResult) -> None:
    header = read_header(finished.out / "best.safetensors")
    assert header.class_names == tuple("0123456789")
    assert header.preprocessing["channels"] == "L"
    assert header.config["num_classes"] == 10


def test_same_seed_gives_the_same_bytes(finished: FitResult, tmp_path: Path) -> None:
    torch.manual_seed(99)  # what was drawn before does not matter
    again = train(small_recipe(), tmp_path / "run")
    for name in ("last.safetensors", "metrics.csv"):
        assert (again.out / name).read_bytes() == (finished.out / name).read_bytes()


@pytest.mark.once
def test_other_seed_gives_other_weights(finished: FitResult, tmp_path: Path) -> None:
    other = train(small_recipe(seed=1, epochs=1), tmp_path / "run")
    first = read_metrics(finished.out / "metrics.csv")[0]["train_loss"]
    assert read_metrics(other.out / "metrics.csv")[0]["train_loss"] != first


@pytest.mark.once
def test_finished_run_is_left_as_it_is(finished: FitResult) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")}
    again = train(small_recipe(), finished.out)
    assert again == replace(finished, was_finished=True)
    assert {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")} == before


@pytest.mark.once
def test_run_that_died_after_its_last_epoch_is_completed(
    finished: FitResult, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    expected = (out / "last.safetensors").read_bytes()
    for name in ("results.json", "last.safetensors", "curves.png"):
        (out / name).unlink()
    result = train(small_recipe(), out)
    assert result.metrics == finished.metrics
    assert result.steps == finished.steps
    assert (out / "last.safetensors").read_bytes() == expected
    assert (out / "results.json").exists()


@pytest.mark.once
def test_random_state_of_the_caller_is_kept(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(small_recipe(epochs=1), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.once
def test_finished_run_of_another_recipe_is_refused(finished: FitResult) -> None:
    recipe = small_recipe(epochs=5)
    with pytest.raises(ValueError, match=r"epochs is 2 there and 5 here\); repeat its options"):
        train(recipe, finished.out)


class _Stop:
    """Sends a signal to this process once a checkpoint or any other file is there."""

    def __init__(self, path: Path, number: signal.Signals) -> None:
        self._path = path
        self._number = number

    def __enter__(self) -> None:
        threading.Thread(target=self._send, daemon=True).start()

    def __exit__(self, *error: Any) -> None:
        return None

    def _send(self) -> None:
        while not self._path.exists():
            time.sleep(0.001)
        for process in active_children():
            os.kill(process.pid or 0, self._number)
        signal.raise_signal(self._number)


@pytest.mark.once
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_signal_stops_with_a_checkpoint_and_the_same_command_goes_on(
    finished: FitResult, tmp_path: Path, number: signal.Signals, num_workers: int
) -> None:
    out = tmp_path / "run"
    handler = signal.getsignal(number)
    with (
        _Stop(out / "last.ckpt", number),
        pytest.raises(
            KeyboardInterrupt, match=r"stopped; the same command goes on from step \d+ of"
        ),
    ):
        train(small_recipe(), out, checkpoint_every_steps=1, num_workers=num_workers)
    assert signal.getsignal(number) == handler
    assert not active_children()
    assert not (out / "results.json").exists()
    train(small_recipe(), out)
    for name in ("last.safetensors", "best.safetensors", "metrics.csv"):
        assert (out / name).read_bytes() == (finished.out / name).read_bytes()


@pytest.mark.once
def test_resume_with_another_recipe_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with _Stop(out / "last.ckpt", signal.SIGINT), pytest.raises(KeyboardInterrupt):
        train(small_recipe(), out, checkpoint_every_steps=1)
    before = {path: path.read_bytes() for path in out.glob("*.*")}
    recipe = small_recipe()
    other = replace(recipe, seed=4, optimizer=replace(recipe.optimizer, lr=0.5))
    with pytest.raises(ValueError) as caught:
        train(other, out)
    assert "optimizer.lr is 0.002 there and 0.5 here; seed is 0 there and 4 here" in str(
        caught.value
    )
    assert {path: path.read_bytes() for path in out.glob("*.*")} == before


@pytest.mark.once
def test_other_classes_at_a_resume_are_named(finished: FitResult, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    results = json.loads((out / "results.json").read_text())
    results["data"]["class_names"][3] = "three"
    (out / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"data\.class_names\[3\] is three there and 3 here\)"):
        train(small_recipe(), out)


@pytest.mark.once
def test_run_goes_on_with_another_device_batch_size(finished: FitResult) -> None:
    assert train(small_recipe(device_batch_size=64), finished.out).was_finished


@pytest.mark.once
def test_moving_average_is_judged_and_kept_beside_the_weights(tmp_path: Path) -> None:
    result = train(small_recipe(ema_decay=0.5), tmp_path / "run")
    assert {"val_loss", "val_loss_ema", "val_accuracy_ema"} <= result.metrics.keys()
    assert result.metrics["val_loss"] != result.metrics["val_loss_ema"]
    assert result.best_ema["epoch"] == 2
    own, average = (
        read_tensors(result.out / name) for name in ("last.safetensors", "last_ema.safetensors")
    )
    assert own.keys() == average.keys()
    assert not torch.equal(own["head.weight"], average["head.weight"])


@pytest.mark.once
def test_moving_average_changes_nothing_else(finished: FitResult, tmp_path: Path) -> None:
    result = train(small_recipe(ema_decay=0.999), tmp_path / "run")
    expected = (finished.out / "last.safetensors").read_bytes()
    assert (result.out / "last.safetensors").read_bytes() == expected


@pytest.mark.once
def test_files_left_out_are_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                Image.new("L", (8, 8), 40 * number).save(folder / f"{number}.png")
    (tmp_path / "data/train/dog/1.png").write_bytes(b"no picture")
    data = ImageFolder(root=tmp_path / "data", on_unreadable="skip")
    result = train(small_recipe(data=data, epochs=1, batch_size=2), tmp_path / "run")
    (line,) = (result.out / "unreadable.txt").read_text().splitlines()
    assert line.startswith("train: ")
    assert "dog/1.png" in line
    results = json.loads((result.out / "results.json").read_text())
    assert len(results["unreadable"]["train"]) == 1


@pytest.mark.slow
@pytest.mark.once  # torch.compile needs a C++ compiler of its own
def test_compiled_blocks_take_the_same_steps(tmp_path: Path) -> None:
    recipe = small_recipe(epochs=1, log_every_steps=1)
    recipe = replace(recipe, model=replace(recipe.model, depth=1, drop_path=0.0, dropout=0.0))
    eager = train(recipe, tmp_path / "eager")
    torch.compiler.reset()
    with warnings.catch_warnings():  # of the compiler's own
        warnings.simplefilter("ignore")
        compiled = train(replace(recipe, compile=True), tmp_path / "compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for expected, actual in zip(steps_of(eager), steps_of(compiled), strict=True):
        assert actual == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.once
@pytest.mark.gpu
@pytest.mark.parametrize("device_batch_size", [None, 32])
def test_graphs_take_the_same_steps_on_a_gpu(tmp_path: Path, device_batch_size: int | None) -> None:
    recipe = small_recipe(epochs=1, log_every_steps=1, ema_decay=0.9)
    recipe = replace(
        recipe,
        model=replace(recipe.model, drop_path=0.0, dropout=0.0),
        device_batch_size=device_batch_size,
    )
    eager = fit(recipe, tmp_path / "eager", device="cuda", cuda_graphs=False, progress=False)
    graphs = fit(recipe, tmp_path / "graphs", device="cuda", cuda_graphs=True, progress=False)
    for expected, actual in zip(steps_of(eager), steps_of(graphs), strict=True):
        assert actual == pytest.approx(expected, rel=ROUNDING)
    assert graphs.metrics["val_loss_ema"] == pytest.approx(eager.metrics["val_loss_ema"], rel=1e-3)


@pytest.mark.once
@pytest.mark.gpu
def test_graphs_are_taken_on_a_gpu_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, model, reason in (
        ("graphs", {}, None),
        ("checkpointed", {"activation_checkpointing": True}, "activation checkpointing restores"),
    ):
        recipe = small_recipe(epochs=1)
        recipe = replace(recipe, model=replace(recipe.model, **model))
        fit(recipe, tmp_path / name, device="cuda")
        noted = json.loads((tmp_path / name / "results.json").read_text())["cuda_graphs"]
        assert noted["used"] is (reason is None)
        assert (noted["why_not"] or "").startswith(reason or "")
        assert launch_text(noted["why_not"]) in " ".join(capsys.readouterr().err.split())


@pytest.mark.once
@pytest.mark.gpu
def test_run_on_a_gpu_goes_on_after_a_signal(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with _Stop(out / "last.ckpt", signal.SIGINT), pytest.raises(KeyboardInterrupt):
        fit(small_recipe(), out, device="cuda", checkpoint_every_steps=1, progress=False)
    assert fit(small_recipe(), out, device="cuda", progress=False).steps == 2 * STEPS_PER_EPOCH


class _Broken(Recipe):
    """A recipe whose batches or model misbehave."""

    def build(self, *, num_workers: int = 0, rank: int = 0, num_ranks: int = 1) -> Experiment:
        experiment = super().build(num_workers=num_workers, rank=rank, num_ranks=num_ranks)
        _BREAK[self.name](experiment.task.model)
        return experiment


def _break_weight(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("head.weight")[0, 0] = float("nan")


def _break_output(model: torch.nn.Module) -> None:
    model.get_submodule("norm").register_forward_hook(
        lambda module, inputs, output: tuple(part * float("inf") for part in output)
    )


def _break_gradient(model: torch.nn.Module) -> None:
    model.get_parameter("head.bias").register_hook(lambda gradient: gradient * float("nan"))


def _break_memory(model: torch.nn.Module) -> None:
    model.register_forward_pre_hook(lambda module, inputs: torch.empty(1 << 60) and None)


_BREAK = {
    "weight": _break_weight,
    "output": _break_output,
    "gradient": _break_gradient,
    "memory": _break_memory,
}


def broken(name: str) -> Recipe:
    recipe = small_recipe(name=name)
    return _Broken(**{field: getattr(recipe, field) for field in recipe.__dataclass_fields__})


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weight", "the loss is nan; its first parameter that is not finite is head.weight"),
        ("output", "the loss is nan; it first appears in layer norm"),
        ("gradient", "the gradient is not finite, first in head.bias"),
    ],
)
def test_non_finite_value_stops_naming_step_rate_and_layer(
    tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(NonFiniteError) as caught:
        train(broken(name), tmp_path / "run")
    sentence = str(caught.value)
    assert sentence.startswith("training stopped at step 1 with learning rate 9.09e-05: ")
    assert message in sentence
    assert "lower optimizer.lr" in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.once
def test_batch_that_does_not_fit_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BatchTooLargeError, match="a batch of 128 images does not fit into"):
        train(broken("memory"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.once
def test_passes_of_a_smaller_device_batch_make_the_same_step(tmp_path: Path) -> None:
    recipe = small_recipe(epochs=1, log_every_steps=1)
    recipe = replace(recipe, model=replace(recipe.model, drop_path=0.0, dropout=0.0))
    whole = train(recipe, tmp_path / "whole")
    parts = train(replace(recipe, device_batch_size=32), tmp_path / "parts")
    assert parts.steps == whole.steps == STEPS_PER_EPOCH
    for expected, actual in zip(steps_of(whole), steps_of(parts), strict=True):
        assert actual == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.once
def test_bfloat16_trains(tmp_path: Path) -> None:
    result = train(small_recipe(epochs=1, precision="bfloat16"), tmp_path / "run")
    assert result.metrics["val_loss"] < 2.4  # ln 10 is 2.30; nan would fail too


@pytest.mark.once
def test_number_of_workers_changes_nothing(finished: FitResult, tmp_path: Path) -> None:
    result = train(small_recipe(), tmp_path / "run", num_workers=1)
    expected = (finished.out / "last.safetensors").read_bytes()
    assert (result.out / "last.safetensors").read_bytes() == expected


@pytest.mark.once
def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="is a file, wanted a folder for the run"):
        train(small_recipe(), tmp_path / "run")


@pytest.mark.once
def test_files_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("precious")
    with pytest.raises(ValueError, match=r"holds a metrics\.csv but no recipe\.json, so it is not"):
        train(small_recipe(), tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.once
def test_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device must be"):
        fit(small_recipe(), tmp_path / "run", device="tpu9")
    assert not (tmp_path / "run").exists()


@pytest.mark.once
def test_progress_without_a_terminal_is_a_line_an_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_recipe(epochs=1), tmp_path / "run", progress=True)
    assert capsys.readouterr().err.startswith("digits_vim  epoch 1/1  loss ")
