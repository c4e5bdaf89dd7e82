"""The kernels' cache and the choice of backend: races, kills, no compiler, unsafe folders."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import visionmamba
from visionmamba.ops import backends, cpu, rms_norm
from visionmamba.ops.cpu.build import compiled_library
from visionmamba.ops.kernel_cache import UnavailableError

USE_AN_OP = """
import warnings
warnings.simplefilter("error")
import torch
from visionmamba.ops import backends, rms_norm
rms_norm(torch.ones(3, 4), torch.ones(4))
print(backends()[0].name)
"""
PRINT_OPENMP_RUNTIMES = """
mapped = open("/proc/self/maps").read().splitlines()
print(len({line.split()[-1] for line in mapped if "libgomp" in line or "libiomp" in line}))
"""
STALE_SECONDS = 2 * 3600

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on PATH"
)


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.delenv(cpu.ENVIRONMENT_VARIABLE, raising=False)
    cpu.forget_choice()
    yield
    cpu.forget_choice()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "visionmamba"


def start_process(program=USE_AN_OP):
    root = str(Path(visionmamba.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def libraries(cache):
    return sorted(cache.glob("*.so"))


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """A library compiled for real, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("built")))
        return compiled_library()


@pytest.fixture
def quick_compiler(built, cache, tmp_path, monkeypatch) -> Path:
    """A compiler that takes half a second and writes its output in two parts."""
    program = tmp_path / "quick-c++"
    program.write_text(
        f"""#!/bin/sh
while [ $# -gt 0 ] && [ "$1" != -o ]; do shift; done
[ "$1" = -o ] || exit 0
head -c 1000 {built} > "$2" && sleep 0.5 && cat {built} > "$2"
"""
    )
    program.chmod(0o700)
    monkeypatch.setenv("CXX", str(program))
    return program


@needs_compiler
def test_many_processes_start_on_an_empty_cache(cache, quick_compiler):
    processes = [start_process() for _ in range(3)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [output.strip() for output, _ in answers] == ["cpp"] * 3, answers
    assert libraries(cache)
    assert not list(cache.glob(".compiling-*"))


@needs_compiler
def test_a_killed_compilation_harms_nobody(cache, quick_compiler):
    process = start_process()
    deadline = time.monotonic() + 60
    while not list(cache.glob(".compiling-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not libraries(cache)
    assert list(cache.glob(".compiling-*"))
    assert compiled_library().exists()


@needs_compiler
def test_half_written_leftovers_are_ignored_and_old_ones_removed(cache, quick_compiler):
    cache.mkdir(mode=0o700)
    fresh, old = cache / ".compiling-fresh", cache / ".compiling-old"
    for path in (fresh, old):
        path.write_bytes(b"\x7fELF half")
    past = time.time() - STALE_SECONDS
    os.utime(old, (past, past))
    assert compiled_library().exists()
    assert fresh.exists()
    assert not old.exists()


@needs_compiler
def test_a_truncated_library_is_compiled_again(cache, quick_compiler):
    path = compiled_library()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert compiled_library().read_bytes() == whole
    assert backends()[0].name == "cpp"


@needs_compiler
def test_cache_is_private_and_reused(cache, quick_compiler):
    path = compiled_library()
    written = path.stat().st_mtime_ns
    assert cache.stat().st_mode & 0o777 == 0o700
    assert compiled_library() == path
    assert path.stat().st_mtime_ns == written


@needs_compiler
def test_cache_that_others_can_write_is_refused(cache):
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(UnavailableError, match="can be written by other users; delete it, or set"):
        compiled_library()


@needs_compiler
def test_cache_of_another_user_is_refused(cache, monkeypatch):
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(UnavailableError, match="belongs to another user; set XDG_CACHE_HOME"):
        compiled_library()


@needs_compiler
def test_link_in_place_of_the_cache_is_refused(cache, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnavailableError, match="is not a plain directory"):
        compiled_library()


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_threads_are_those_of_torch():
    output, errors = start_process(program=USE_AN_OP + PRINT_OPENMP_RUNTIMES).communicate()
    assert output.split() == ["cpp", "1"], errors


def test_without_a_compiler_one_warning_and_plain_pytorch(cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(UserWarning, match=r"plain PyTorch, .* no C\+\+ compiler .*; install g\+\+"):
        rms_norm(torch.ones(3, 4), torch.ones(4))
    rms_norm(torch.ones(3, 4), torch.ones(4))  # a second warning would be an error
    assert {status.name for status in backends()} == {"torch"}
    assert "no C++ compiler" in backends()[0].reason


def test_a_compiler_that_fails_is_named(cache, tmp_path, monkeypatch):
    program = tmp_path / "broken-c++"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o700)
    monkeypatch.setenv("CXX", str(program))
    with pytest.warns(UserWarning, match=r"the compiler .*broken-c\+\+ failed: no message"):
        assert backends()[0].name == "torch"


def test_a_missing_compiler_of_choice_is_named(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="CXX=no-such-compiler is not on PATH; unset CXX or"):
        assert backends()[0].name == "torch"


def test_forcing_pytorch_is_silent_and_visible(monkeypatch):
    monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, "torch")
    assert {status.name for status in backends()} == {"torch"}
    assert backends()[0].reason == "VISIONMAMBA_CPU_BACKEND=torch"


def test_forcing_what_cannot_be_had_fails(cache, monkeypatch):
    monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, "cpp")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"VISIONMAMBA_CPU_BACKEND=cpp, but no C\+\+ compiler"):
        rms_norm(torch.ones(3, 4), torch.ones(4))


def test_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, "fortran")
    with pytest.raises(ValueError, match="must be 'cpp' or 'torch', got 'fortran'; unset it"):
        backends()
