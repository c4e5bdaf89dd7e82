"""Runs interpreted.py in a process of its own, with Triton's interpreter for its compiler."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

INTERPRETED = Path(__file__).with_name("interpreted.py")


def release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


@pytest.mark.once
@pytest.mark.timeout(300)
def test_kernels_in_the_interpreter_on_the_cpu():
    try:
        if release("triton") < (3, 9) and release("numpy") >= (2, 4):
            pytest.skip("the interpreter of triton before 3.9 needs numpy before 2.4")
    except PackageNotFoundError:
        pytest.skip("triton is not installed here; torch's Linux wheels for CUDA bring it")
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-2000:]
