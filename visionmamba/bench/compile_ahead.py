"""Compiles the cases of a run side by side, into the cache on disk that torch.compile reads first.

One compilation keeps one core busy for 6 to 18 seconds; a table of ten has better things to do.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from visionmamba.bench.cases import Case
from visionmamba.bench.passes import Pass

_CORES_OF_ONE, _LONGEST_SECONDS = 2, 120


def compile_ahead(cases: Sequence[Case]) -> None:
    """Compile every case in a process of its own.

    One that fails or takes two minutes says nothing: it is compiled again when it is measured, and
    fails again.
    """
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(max_workers=max(1, cores // _CORES_OF_ONE)) as pool:
        list(pool.map(_compile_elsewhere, cases))


def _compile_elsewhere(case: Case) -> None:
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-m", "visionmamba.bench.compile_ahead"],
            input=replace(case, cuda_graphs=False).to_json(),
            env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(_CORES_OF_ONE)},
            capture_output=True,
            text=True,
            timeout=_LONGEST_SECONDS,
        )


if __name__ == "__main__":
    Pass(Case.from_json(sys.stdin.read())).run()
