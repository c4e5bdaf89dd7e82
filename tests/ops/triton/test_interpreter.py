"""Runs interpreted.py in a process of its own, with Triton's interpreter for its compiler."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = Path(__file__).with_name("interpreted.py")


@pytest.mark.timeout(300)
def test_kernels_in_the_interpreter_on_the_cpu():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed here; torch's Linux wheels for CUDA bring it")
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-2000:]
