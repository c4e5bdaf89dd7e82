"""Compile the C++ kernels once per user and machine, and find them again: the cache and its safety.

The library's file name holds a key (sources, torch version, compiler, flags, CPU features) and the
digest of its own bytes, so a stale or damaged file is never loaded. It is compiled under a
temporary name and renamed, so processes may start together or die half-way without harm.
"""

import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SOURCES = ("simd.h", "selective_scan.cpp", "causal_conv1d.cpp", "rms_norm.cpp")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
)
_COMPILE_SECONDS = 300
_ABANDONED_SECONDS = 3600


class UnavailableError(Exception):
    """The compiled kernels cannot be had here; the message says why and what would help."""


def compiled_library() -> Path:
    """Return the compiled library for this machine, from the cache or freshly compiled.

    Raises:
        UnavailableError: no compiler, one that fails, or a cache that is unusable or unsafe.
    """
    if sys.platform not in ("linux", "darwin"):
        raise UnavailableError(f"the C++ kernels are not built on {sys.platform}")
    compiler = _find_compiler()
    directory = _cache_directory()
    key = _key(compiler)
    for path in directory.glob(f"{key}-*.so"):
        if path.name == _name(key, path.read_bytes()):
            return path
        path.unlink(missing_ok=True)
    return _compile(compiler, directory, key)


def _find_compiler() -> list[str]:
    """Return the compiler's command: $CXX, else the first of c++, g++ and clang++ on PATH."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        program = shutil.which(command[0])
        if program is not None:
            return [program, *command[1:]]
    if chosen:
        raise UnavailableError(f"the compiler CXX={chosen[0]} is not on PATH; unset CXX or mend it")
    raise UnavailableError("no C++ compiler (c++, g++, clang++) is on PATH; install g++")


def _cache_directory() -> Path:
    """Return the per-user cache, of mode 0700; refuse one that others own or can write to."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    parent = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    directory = parent / "visionmamba"
    remedy = "set XDG_CACHE_HOME to a directory of your own"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise UnavailableError(f"the cache {directory} is not a plain directory; {remedy}")
        if found.st_uid != os.getuid():
            raise UnavailableError(f"the cache {directory} belongs to another user; {remedy}")
        if found.st_mode & 0o022:
            raise UnavailableError(
                f"the cache {directory} can be written by other users; delete it, or {remedy}"
            )
        if stat.S_IMODE(found.st_mode) != 0o700:
            directory.chmod(0o700)
    except OSError as error:
        raise UnavailableError(
            f"the cache {directory} cannot be used ({error}); {remedy}"
        ) from error
    return directory


def _key(compiler: list[str]) -> str:
    """Return what decides the machine code: sources, torch, flags, the compiler and its CPU."""
    digest = hashlib.sha256()
    for part in (torch.__version__, *compiler, *FLAGS):
        digest.update(part.encode() + b"\0")
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    digest.update(_run([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]))
    return digest.hexdigest()[:24]


def _name(key: str, library: bytes) -> str:
    return f"{key}-{hashlib.sha256(library).hexdigest()[:16]}.so"


def _compile(compiler: list[str], directory: Path, key: str) -> Path:
    try:
        _remove_abandoned(directory)
        handle, name = tempfile.mkstemp(prefix=".compiling-", dir=directory)
        os.close(handle)
        temporary = Path(name)
        try:
            sources = [str(Path(__file__).with_name(name)) for name in SOURCES if name[-2:] != ".h"]
            _run([*compiler, *FLAGS, "-o", str(temporary), *sources])
            path = directory / _name(key, temporary.read_bytes())
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UnavailableError(
            f"the kernels could not be stored in {directory} ({error})"
        ) from error
    return path


def _remove_abandoned(directory: Path) -> None:
    """Delete what compilations that were killed left behind."""
    for path in directory.glob(".compiling-*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            path.unlink(missing_ok=True)


def _run(command: list[str]) -> bytes:
    try:
        finished = subprocess.run(
            command, capture_output=True, timeout=_COMPILE_SECONDS, check=True
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        complaint = next((line for line in lines if "error" in line), lines[0])
        raise UnavailableError(f"the compiler {command[0]} failed: {complaint}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"the compiler {command[0]} could not run: {error}") from error
    return finished.stdout
