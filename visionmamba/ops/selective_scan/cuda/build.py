"""Compile the CUDA kernels with NVRTC, once per user and GPU architecture, and find them again.

NVRTC comes with torch's CUDA wheels; no CUDA toolkit, host compiler or header is needed. A binary's
file name holds a key (source, options, architecture, NVRTC version) and the digest of its own
bytes, so a stale or damaged file is never loaded. It is written under a temporary name and renamed,
so processes may start together or die half-way without harm.
"""

import hashlib
import importlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("scan.cu")
OPTIONS = ("--std=c++17", "--ftz=true", "--prec-div=true")


class UnavailableError(Exception):
    """The CUDA kernels cannot be had here; the message says why and what would help."""


def compiled_kernels(architecture: str) -> bytes:
    """Return the machine code for an architecture such as "sm_90", cached or freshly compiled.

    Raises:
        UnavailableError: NVRTC is missing or fails, or the cache directory is unusable or unsafe.
    """
    nvrtc = _nvrtc()
    source = SOURCE.read_bytes()
    directory = _cache_directory()
    _, major, minor = nvrtc.nvrtcVersion()
    digest = hashlib.sha256()
    for part in (source, *(option.encode() for option in OPTIONS), f"{major}.{minor}".encode()):
        digest.update(hashlib.sha256(part).digest())
    key = f"scan-{architecture}-{digest.hexdigest()[:24]}"
    for path in directory.glob(f"{key}-*.cubin"):
        code = path.read_bytes()
        if path.name == _name(key, code):
            return code
        path.unlink(missing_ok=True)
    code = compile_kernels(source, architecture)
    _store(directory / _name(key, code), code)
    return code


def compile_kernels(source: bytes, architecture: str) -> bytes:
    """Return the machine code of CUDA C++ source; needs no GPU.

    Raises:
        UnavailableError: NVRTC is missing, or rejects the source; the message ends with its log.
    """
    nvrtc = _nvrtc()
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source, b"scan.cu", 0, [], []))
    options = [option.encode() for option in (f"--gpu-architecture={architecture}", *OPTIONS)]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.decode(errors="replace").strip("\0 ")
        raise UnavailableError(f"NVRTC does not compile the scan for {architecture}: {text}")
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


def _name(key: str, code: bytes) -> str:
    return f"{key}-{hashlib.sha256(code).hexdigest()[:16]}.cubin"


def _store(path: Path, code: bytes) -> None:
    try:
        handle, temporary = tempfile.mkstemp(prefix=".compiling-", suffix=".cubin", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(code)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UnavailableError(f"the kernels cannot be stored in {path.parent}: {error}") from error


def _cache_directory() -> Path:
    """Return the per-user cache, made with mode 0700; refuse one that others can write to."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    parent = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    directory = parent / "visionmamba"
    remedy = "set XDG_CACHE_HOME to a directory of your own"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise UnavailableError(
            f"the cache {directory} cannot be used ({error}); {remedy}"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UnavailableError(
            f"the cache {directory} is not a directory that only you can write to; {remedy}"
        )
    return directory
