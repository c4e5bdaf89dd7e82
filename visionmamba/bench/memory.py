"""Peak memory of one pass: weights, input and everything the pass allocates.

On a GPU PyTorch's allocator knows it; a pass is prepared with its counter set back, and what other
passes hold is subtracted. On the CPU every case runs in a process of its own and the operating
system is asked for the growth of the resident set over its size just before the pass; the bytes of
weights and input, resident by then, are added. Python and the libraries are left out.
"""

import ctypes
import functools
import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from visionmamba.bench.cases import Case, OutOfMemory, telling_out_of_memory
from visionmamba.bench.passes import Pass

_WARM_UP_PX = 64
_NUM_STREAMS = 32
"""Streams that PyTorch hands out in turn; captures and their warm-ups run on them."""
_OUT_OF_MEMORY = "out of memory"


def prepare_on_gpu(case: Case) -> tuple[Pass, int]:
    """Return a pass ready to be timed and its peak memory in bytes.

    Counted from the moment weights and input are there to the end of the first replay: warm-up,
    capture, the graph's own memory. Workspaces of cuBLAS, equal for all models, are left out.

    Raises:
        OutOfMemory: it needs more than there is.
    """
    import torch

    _allocate_workspaces(torch.cuda.current_device())
    free_gpu_memory()
    elsewhere = torch.cuda.memory_allocated()
    with telling_out_of_memory():
        ready = Pass(case)
        torch.cuda.reset_peak_memory_stats()
        ready.prepare()
        ready.run()
        torch.cuda.synchronize()
    return ready, torch.cuda.max_memory_allocated() - elsewhere


def free_gpu_memory() -> None:
    """Give back what nothing refers to any more."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


@functools.cache
def _allocate_workspaces(device: int) -> None:
    """Let cuBLAS take its workspaces, one a stream and thread, before anything is counted.

    They stay as long as the process, so that recorded graphs may go on using them.
    """
    import torch

    streams = [torch.cuda.Stream(device) for _ in range(_NUM_STREAMS)]  # type: ignore[no-untyped-call]
    for stream in (torch.cuda.current_stream(), *streams):
        with torch.cuda.stream(stream):
            x = torch.ones(64, 64, device="cuda", requires_grad=True)
            torch.autograd.backward((x @ x).sum())
    torch.cuda.synchronize()


def peak_bytes_on_cpu(case: Case, *, threads: int, limit_gb: float | None = None) -> int | None:
    """Return the peak memory of one pass in bytes; None where the system does not tell it.

    Args:
        case: what is run.
        threads: PyTorch's threads; more threads need more buffers.
        limit_gb: refuse to grow by more than this many 10^9 bytes; None leaves it to the machine.

    Raises:
        OutOfMemory: the pass needs more than there is, or more than the limit.
        RuntimeError: the pass failed for another reason; its last words are in the message.
    """
    if not Path("/proc/self/clear_refs").exists():  # the peak cannot be reset outside Linux
        return None
    request = {"case": case.to_json(), "threads": threads, "limit_gb": limit_gb}
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
    return int(last_line)


def _peak_bytes_here(case: Case, limit_gb: float | None) -> int:
    Path("/proc/self/oom_score_adj").write_text("1000")  # end this process first, not the caller
    Pass(replace(case, resolution=_WARM_UP_PX)).run()  # libraries, kernels, thread pool
    loaded = Pass(case)
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # else the pass would reuse freed pages that count as resident already
    if limit_gb is not None:
        _limit_growth(limit_gb)
    before = _process_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    loaded.run()
    growth = _process_bytes("VmHWM") - before
    if limit_gb is not None and growth > limit_gb * 1e9:  # it came from pages mapped before
        raise OutOfMemory
    return growth + loaded.num_bytes


def _limit_growth(limit_gb: float) -> None:
    import resource

    most = _process_bytes("VmSize") + int(limit_gb * 1e9)
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
    try:
        with telling_out_of_memory():
            print(_peak_bytes_here(Case.from_json(request["case"]), request["limit_gb"]))
    except OutOfMemory:
        print(_OUT_OF_MEMORY)


if __name__ == "__main__":
    _answer()
