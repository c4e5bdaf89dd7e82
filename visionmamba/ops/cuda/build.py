"""Compile the CUDA kernels with NVRTC, once per user and GPU architecture, into the kernel cache.

NVRTC comes with torch's CUDA wheels; no CUDA toolkit, host compiler or header is needed.
"""

import hashlib
import importlib
from pathlib import Path
from typing import Any

from visionmamba.ops.kernel_cache import UnavailableError, cached_file

FOLDER = Path(__file__).parent
SOURCES = tuple(sorted(path.stem for path in FOLDER.glob("*.cu")))
"""Names of the sources, one module of kernels each."""
OPTIONS = ("--std=c++17", "--ftz=true", "--prec-div=true", "--device-as-default-execution-space")


def source_text(name: str) -> bytes:
    """Return the CUDA C++ of one of SOURCES, with what all of them share in front."""
    return (FOLDER / "activations.cuh").read_bytes() + (FOLDER / f"{name}.cu").read_bytes()


def compiled_kernels(name: str, architecture: str) -> bytes:
    """Return the machine code of one of SOURCES for an architecture such as "sm_90".

    It comes from the cache, or is compiled (some seconds) and stored there.

    Raises:
        UnavailableError: NVRTC is missing or fails, or the cache directory is unusable or unsafe.
    """
    source = source_text(name)
    nvrtc = _nvrtc()
    _, major, minor = nvrtc.nvrtcVersion()
    digest = hashlib.sha256()
    for part in (source, *(option.encode() for option in OPTIONS), f"{major}.{minor}".encode()):
        digest.update(hashlib.sha256(part).digest())
    key = f"{name}-{architecture}-{digest.hexdigest()[:24]}"
    return cached_file(
        key, ".cubin", lambda path: path.write_bytes(compile_kernels(source, architecture))
    ).read_bytes()


def compile_kernels(source: bytes, architecture: str) -> bytes:
    """Return the machine code of CUDA C++ source; needs no GPU.

    Raises:
        UnavailableError: NVRTC is missing, or rejects the source; the message ends with its log.
    """
    nvrtc = _nvrtc()
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source, b"kernels.cu", 0, [], []))
    options = [option.encode() for option in (f"--gpu-architecture={architecture}", *OPTIONS)]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.decode(errors="replace").strip("\0 ")
        raise UnavailableError(f"NVRTC does not compile the kernels for {architecture}: {text}")
    code: bytes = b" " * _checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    return code


def _nvrtc() -> Any:
    try:
        return importlib.import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise UnavailableError(
            f"cuda-bindings is missing ({error}); install it, or a CUDA build of torch"
        ) from error


def _checked(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise UnavailableError(f"NVRTC fails with {status}")
    return values[0]
