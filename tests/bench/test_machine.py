"""The circumstances of a measurement: the commit of a copy, and devices that are not there."""

import pytest
import torch

from visionmamba.bench import machine
from visionmamba.bench.machine import choose_device, describe_machine


def test_commit_of_a_copy_is_what_the_environment_says(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "a" / "b" / "machine.py"))
    assert describe_machine("cpu", command="x").commit is None
    monkeypatch.setenv("VISIONMAMBA_COMMIT", "0123abc")
    assert describe_machine("cpu", command="x").commit == "0123abc"
    assert "commit 0123abc" in describe_machine("cpu", command="x").sentence()


def test_absent_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        choose_device("cuda")
