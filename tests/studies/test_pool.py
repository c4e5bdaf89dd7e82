"""Processes that train: as the caller does, stopped with a checkpoint, told of when they die."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.small import small_recipe
from visionmamba.cli import main, study
from visionmamba.data import BatchTooLargeError
from visionmamba.studies.jobs import Job, run_job
from visionmamba.studies.pool import TrainingPool, TrainingProcessError

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 240  # for a process to import torch beside everything else


def job_in(folder: Path, **changes: object) -> Job:
    recipe = small_recipe(batch_size=512, **changes)
    return Job(recipe=recipe, out=folder, log=folder.with_suffix(".txt"), command="x", device="cpu")


def test_a_process_trains_as_the_caller_does_and_stops_with_a_checkpoint(tmp_path: Path) -> None:
    endless = job_in(tmp_path / "endless", epochs=10_000)
    with TrainingPool(2) as pool:
        pool.submit(job_in(tmp_path / "there"))
        job, outcome = pool.next_outcome()
        assert job.out == tmp_path / "there"
        here = run_job(job_in(tmp_path / "here"))
        assert outcome.metrics == here.metrics

        (tmp_path / "file").write_text("no folder")
        pool.submit(job_in(tmp_path / "file"))
        with pytest.raises(ValueError, match="is a file, wanted a folder for the run"):
            pool.next_outcome()

        pool.submit(endless)
        until = time.monotonic() + PATIENCE_SECONDS
        while not (endless.out / "last.ckpt").exists() and time.monotonic() < until:
            time.sleep(0.1)
    assert pool.num_unfinished == 1
    assert (endless.out / "last.ckpt").is_file()
    assert not (endless.out / "results.json").exists()
    assert "Traceback" not in endless.log.read_text()


def test_a_process_that_dies_is_told_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexit 7\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with TrainingPool(2) as pool:
        pool.submit(job_in(tmp_path / "run"))
        with pytest.raises(TrainingProcessError, match=r"ended with code 7; .*run\.txt tells why"):
            pool.next_outcome()


def test_runs_that_fail_end_their_processes_with_a_traceback_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd.py").write_text(
        "class Odd(ValueError):\n"
        "    def __init__(self, first, second):\n"
        "        super().__init__('one')\n"  # pickle builds it anew with one argument, and fails
    )
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        f"sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "from odd import Odd\n"
        "from visionmamba.studies import worker\n"
        "def run(job):\n"
        "    raise Odd(1, 2) if job.out.name == 'odd' else RuntimeError('unforeseen')\n"
        "worker.run_job = run\n"
        "worker._serve()\n"
    )
    program.chmod(0o755)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "executable", str(program))
    odd, plain = job_in(tmp_path / "odd"), job_in(tmp_path / "plain")
    said = []
    with TrainingPool(2) as pool:
        for job in (odd, plain):
            pool.submit(job)
        for _ in (odd, plain):
            with pytest.raises(TrainingProcessError) as caught:
                pool.next_outcome()
            said.append(str(caught.value))
    assert sorted(said) == [
        f"a training ended with an unreadable answer; {odd.log} tells why",
        f"a training ended with code 1; {plain.log} tells why",
    ]
    assert "Odd: one" in odd.log.read_text()
    assert plain.log.read_text().endswith("RuntimeError: unforeseen\n")


def test_command_tells_of_a_failed_process_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(given: list[str]) -> int:
        raise TrainingProcessError("a training ended with code 7; run.txt tells why")

    monkeypatch.setattr(study, "ablate", fail)
    assert main(["ablate"]) == 1
    assert capsys.readouterr().err == (
        "visionmamba: a training ended with code 7; run.txt tells why\n"
    )


def test_lack_of_memory_names_fewer_jobs_as_a_remedy(tmp_path: Path) -> None:
    job = job_in(tmp_path / "run")
    with TrainingPool(2) as pool:
        worker = type("Worker", (), {"job": job, "dismiss": lambda self: None})()
        pool._answers.put((worker, BatchTooLargeError("a batch of 512 images does not fit")))
        with pytest.raises(BatchTooLargeError, match="does not fit, or train fewer at once with"):
            pool.next_outcome()


def test_a_second_outcome_is_judged_by_the_weights_asked_for(tmp_path: Path) -> None:
    job = job_in(tmp_path / "run", epochs=3)
    last = run_job(job)
    best = run_job(replace(job, judged="best"))
    assert best.metrics["epoch"] in (1, 2, 3)
    assert best.metrics["val_accuracy"] >= last.metrics["val_accuracy"]


@pytest.mark.gpu
def test_two_processes_train_on_one_gpu_from_graphs(tmp_path: Path) -> None:
    jobs = [
        replace(job_in(tmp_path / name, epochs=2), device="cuda", cuda_graphs=True)
        for name in ("one", "two")
    ]
    with TrainingPool(2) as pool:
        for job in jobs:
            pool.submit(job)
        outcomes = [pool.next_outcome()[1] for _ in jobs]
    assert all(0 < outcome.metrics["val_accuracy"] <= 1 for outcome in outcomes)
    assert not any("Traceback" in job.log.read_text() for job in jobs)
