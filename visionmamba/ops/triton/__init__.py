"""Whether the scans' Triton kernels run on a GPU; triton is imported at the first question.

They are the portable kernels: for GPUs without this package's CUDA kernels, and on NVIDIA GPUs for
what those leave out. Ask before importing scan.py or bidirectional.py, which need triton.
"""

import functools
import importlib.util
import subprocess

import torch

from visionmamba.ops.kernel_cache import UnavailableError


def check_available(device: torch.device) -> None:
    """Compile and run a scan of one token on a GPU, once.

    Raises:
        UnavailableError: triton is missing, or cannot compile for this GPU or run on it.
    """
    reason = _problem(device)
    if reason is not None:
        raise UnavailableError(reason)


@functools.cache
def _problem(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton, or a torch wheel that brings it"
    from visionmamba.ops.triton.scan import selective_scan_triton

    one = torch.ones(1, 1, 1, device=device)
    try:
        y, _ = selective_scan_triton(
            *(one, one, -one[0], one, one, None, None, None, None), False, False
        )
        works = bool(torch.equal(y, one))
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return f"triton does not run on {device} ({error}); it needs a driver and a C compiler"
    return None if works else f"triton computes a wrong result on {device}; update it"
