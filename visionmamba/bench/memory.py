"""Peak memory of one pass: weights, input and everything the pass allocates.

On a GPU PyTorch's allocator knows it. On the CPU every case runs in a process of its own and the
operating system is asked for the growth of the resident set over its size just before the pass; the
bytes of weights and input, resident by then, are added. Python and the libraries are left out.
"""

import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from visionmamba.bench.cases import Case, OutOfMemory

_WARM_UP_PX = 64
_OUT_OF_MEMORY = "out of memory"


def peak_memory_gib(case: Case, *, threads: int, limit_gib: float | None = None) -> float | None:
    """Return the peak memory of one pass in GiB; None where the system does not tell it.

    Args:
        case: what is run.
        threads: PyTorch's threads; more threads need more buffers.
        limit_gib: on the CPU, refuse to grow by more than this; None leaves it to the machine.

    Raises:
        OutOfMemory: the pass needs more than there is, or more than the limit.
        RuntimeError: the pass failed for another reason; its last words are in the message.
    """
    if case.device.startswith("cuda"):
        return _cuda_peak_gib(case)
    if not Path("/proc/self/clear_refs").exists():  # the peak cannot be reset outside Linux
        return None
    request = {
        "case": asdict(case) | {"image": str(case.image) if case.image else None},
        "threads": threads,
        "limit_gib": limit_gib,
    }
    answer = subprocess.run(
        [sys.executable, "-m", "visionmamba.bench.memory"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    last_line = (answer.stdout.strip() or "null").splitlines()[-1]
    if answer.returncode == -9 or last_line == _OUT_OF_MEMORY:  # -9: the system's own killer
        raise OutOfMemory
    if answer.returncode != 0:
        reason = (answer.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"{case.model} at {case.resolution} px failed in its process: {reason}")
    return float(last_line)


def _cuda_peak_gib(case: Case) -> float:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    elsewhere = torch.cuda.memory_allocated(case.device)
    loaded = case.load()
    loaded.run()  # workspaces of cuBLAS and compiled kernels
    torch.cuda.reset_peak_memory_stats(case.device)
    loaded.run()
    return (torch.cuda.max_memory_allocated(case.device) - elsewhere) / 2**30


def _cpu_peak_gib(case: Case, limit_gib: float | None) -> float:
    Path("/proc/self/oom_score_adj").write_text("1000")  # end this process first, not the caller
    replace(case, resolution=_WARM_UP_PX).load().run()  # libraries, kernels, thread pool
    loaded = case.load()
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # else the pass would reuse freed pages that count as resident already
    if limit_gib is not None:
        _limit_growth(limit_gib)
    before = _process_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    loaded.run()
    return (_process_bytes("VmHWM") - before + loaded.num_bytes) / 2**30


def _limit_growth(limit_gib: float) -> None:
    import resource

    most = _process_bytes("VmSize") + int(limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def _process_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no line {name}")


def _answer() -> None:
    import torch

    request = json.loads(sys.stdin.read())
    torch.set_num_threads(request["threads"])
    image = request["case"].pop("image")
    case = Case(**request["case"], image=Path(image) if image else None)
    try:
        print(_cpu_peak_gib(case, request["limit_gib"]))
    except OutOfMemory:
        print(_OUT_OF_MEMORY)


if __name__ == "__main__":
    _answer()
