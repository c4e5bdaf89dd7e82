"""Compile the C++ kernels once per user and machine, and find them again in the kernel cache."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from visionmamba.ops.kernel_cache import UnavailableError, cached_file

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


def compiled_library() -> Path:
    """Return the compiled library for this machine, from the cache or freshly compiled.

    Raises:
        UnavailableError: no compiler, one that fails, or a cache that is unusable or unsafe.
    """
    if sys.platform not in ("linux", "darwin"):
        raise UnavailableError(f"the C++ kernels are not built on {sys.platform}")
    compiler = _find_compiler()
    sources = [str(Path(__file__).with_name(name)) for name in SOURCES if not name.endswith(".h")]
    return cached_file(
        _key(compiler), ".so", lambda path: _run([*compiler, *FLAGS, "-o", str(path), *sources])
    )


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


def _key(compiler: list[str]) -> str:
    """Return what decides the machine code: sources, torch, flags, the compiler and its CPU."""
    digest = hashlib.sha256()
    for part in (torch.__version__, *compiler, *FLAGS):
        digest.update(part.encode() + b"\0")
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    digest.update(_run([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]))
    return digest.hexdigest()[:24]


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
