"""The choice among the kernels for a GPU that torch calls "cuda" (NVIDIA, AMD), made once a GPU.

CUDA C++ where NVRTC and a safe cache are found, else Triton for the scans, else plain PyTorch.
VISIONMAMBA_CUDA_BACKEND=cuda, =triton or =torch forces it.
"""

import functools
import os
import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from visionmamba.ops import triton
from visionmamba.ops.cuda import driver
from visionmamba.ops.kernel_cache import UnavailableError

ENVIRONMENT_VARIABLE = "VISIONMAMBA_CUDA_BACKEND"
_KERNELS: tuple[tuple[Literal["cuda", "triton"], str], ...] = (
    ("cuda", "compiled by NVRTC at first use; gradients of float32 and float16 scans by Triton"),
    ("triton", "compiled by Triton at first use: the scans; the rest in plain PyTorch"),
)


@dataclass(frozen=True, kw_only=True)
class CudaBackend:
    """What runs the ops on one GPU."""

    name: Literal["cuda", "triton", "torch"]
    """cuda: this package's CUDA C++; triton: portable kernels of the scans; torch: PyTorch."""
    reason: str
    """One sentence: why this one."""

    @property
    def has_kernels(self) -> bool:
        """Whether the kernels in CUDA C++ run."""
        return self.name == "cuda"


def cuda_backend(device: torch.device) -> CudaBackend:
    """Return the backend of a GPU, choosing (and compiling) at the first call.

    Raises:
        ValueError: VISIONMAMBA_CUDA_BACKEND holds an unknown name.
        RuntimeError: it asks for kernels that cannot be had.
    """
    return _choose(torch.cuda.current_device() if device.index is None else device.index)


def forget_choice() -> None:
    """Choose again at the next use; for tests that change the environment."""
    _choose.cache_clear()


@functools.cache
def _choose(index: int) -> CudaBackend:
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if wanted not in ("", "cuda", "triton", "torch"):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} must be 'cuda', 'triton' or 'torch', got {wanted!r}; unset it "
            "to choose automatically"
        )
    if wanted == "torch":
        return CudaBackend(name="torch", reason=f"{ENVIRONMENT_VARIABLE}=torch")
    checks = {"cuda": driver.check_available, "triton": triton.check_available}
    problems: list[str] = []
    for name, reason in _KERNELS:
        if wanted not in ("", name):
            continue
        try:
            checks[name](torch.device("cuda", index))
        except UnavailableError as error:
            if wanted:
                raise RuntimeError(f"{ENVIRONMENT_VARIABLE}={wanted}, but {error}") from error
            problems.append(str(error))
            continue
        if problems and torch.version.cuda is not None:
            warnings.warn(
                f"visionmamba runs its scans on GPU {index} in Triton, slower than its CUDA "
                f"kernels: {problems[0]}",
                stacklevel=2,
            )
        return CudaBackend(name=name, reason=reason)
    problem = "; ".join(problems)
    warnings.warn(f"visionmamba runs on GPU {index} in plain PyTorch: {problem}", stacklevel=2)
    return CudaBackend(name="torch", reason=problem)
