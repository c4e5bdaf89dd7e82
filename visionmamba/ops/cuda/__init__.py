"""The GPU's choice between this package's CUDA kernels and plain PyTorch, made once a GPU.

VISIONMAMBA_CUDA_BACKEND=cuda or =torch forces it; otherwise the kernels run wherever NVRTC and a
safe cache are found.
"""

import functools
import os
import warnings
from dataclasses import dataclass

import torch

from visionmamba.ops.cuda.driver import check_available
from visionmamba.ops.kernel_cache import UnavailableError

ENVIRONMENT_VARIABLE = "VISIONMAMBA_CUDA_BACKEND"
_REASON = "compiled by NVRTC at first use; gradients of float32 and float16 in plain PyTorch"


@dataclass(frozen=True, kw_only=True)
class CudaBackend:
    """What runs the scans on one GPU."""

    has_kernels: bool
    """Whether the compiled kernels run; plain PyTorch otherwise."""
    reason: str
    """One sentence: why this one."""


def cuda_backend(device: torch.device) -> CudaBackend:
    """Return the backend of a GPU, choosing (and compiling) at the first call.

    Raises:
        ValueError: VISIONMAMBA_CUDA_BACKEND holds an unknown name.
        RuntimeError: it asks for "cuda" and the kernels cannot be had.
    """
    return _choose(torch.cuda.current_device() if device.index is None else device.index)


def forget_choice() -> None:
    """Choose again at the next use; for tests that change the environment."""
    _choose.cache_clear()


@functools.cache
def _choose(index: int) -> CudaBackend:
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if wanted not in ("", "cuda", "torch"):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} must be 'cuda' or 'torch', got {wanted!r}; unset it to choose "
            "automatically"
        )
    if wanted == "torch":
        return CudaBackend(has_kernels=False, reason=f"{ENVIRONMENT_VARIABLE}=torch")
    try:
        check_available(torch.device("cuda", index))
    except UnavailableError as error:
        if wanted == "cuda":
            raise RuntimeError(f"{ENVIRONMENT_VARIABLE}=cuda, but {error}") from error
        warnings.warn(
            f"visionmamba runs its scans on GPU {index} in plain PyTorch: {error}", stacklevel=2
        )
        return CudaBackend(has_kernels=False, reason=str(error))
    return CudaBackend(has_kernels=True, reason=_REASON)
