"""The CPU's choice between the compiled C++ kernels and plain PyTorch, made once at the first use.

VISIONMAMBA_CPU_BACKEND=cpp or =torch forces it; otherwise C++ wherever a compiler and a safe cache
are found.
"""

import functools
import os
import threading
import warnings
from dataclasses import dataclass

from visionmamba.ops.cpu.build import compiled_library
from visionmamba.ops.cpu.library import Kernels
from visionmamba.ops.kernel_cache import UnavailableError

ENVIRONMENT_VARIABLE = "VISIONMAMBA_CPU_BACKEND"
CHECKPOINT_LENGTH = 64
"""Tokens between the states a scan stores for its backward; TILE in selective_scan.cpp."""

_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class CpuBackend:
    """What runs the ops on the CPU."""

    kernels: Kernels | None
    """The compiled kernels; None for plain PyTorch."""
    reason: str
    """One sentence: why this one."""


def cpu_backend() -> CpuBackend:
    """Return the backend of the CPU, choosing (and compiling) at the first call.

    Raises:
        ValueError: VISIONMAMBA_CPU_BACKEND holds an unknown name.
        RuntimeError: it asks for "cpp" and the kernels cannot be had.
    """
    with _lock:
        return _choose()


def forget_choice() -> None:
    """Choose again at the next use; for tests that change the environment."""
    _choose.cache_clear()


@functools.cache
def _choose() -> CpuBackend:
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if wanted not in ("", "cpp", "torch"):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} must be 'cpp' or 'torch', got {wanted!r}; unset it to choose "
            "automatically"
        )
    if wanted == "torch":
        return CpuBackend(kernels=None, reason=f"{ENVIRONMENT_VARIABLE}=torch")
    try:
        path = compiled_library()
        kernels = Kernels(path, CHECKPOINT_LENGTH)
    except UnavailableError as error:
        if wanted == "cpp":
            raise RuntimeError(f"{ENVIRONMENT_VARIABLE}=cpp, but {error}") from error
        warnings.warn(
            f"visionmamba runs its CPU ops in plain PyTorch, several times slower: {error} "
            f"({ENVIRONMENT_VARIABLE}=torch silences this).",
            UserWarning,
            stacklevel=2,
        )
        return CpuBackend(kernels=None, reason=str(error))
    vectors = f"{kernels.vector_width} floats a vector"
    return CpuBackend(kernels=kernels, reason=f"compiled at first use, {vectors}, {path}")
