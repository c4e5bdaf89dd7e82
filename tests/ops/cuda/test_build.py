"""The CUDA kernels compile for every architecture, and their cache survives races and damage."""

import os
import stat

import pytest

from visionmamba.ops.cuda import build
from visionmamba.ops.cuda.build import compiled_kernels
from visionmamba.ops.kernel_cache import UnavailableError

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")
SMALL = b'extern "C" __global__ void nothing_kernel() {}'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "visionmamba"


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    (tmp_path / "activations.cuh").write_bytes(b"")
    source = tmp_path / "small.cu"
    source.write_bytes(SMALL)
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    return source


@pytest.mark.once
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", build.SOURCES)
def test_every_kernel_compiles(name, architecture):
    source = build.source_text(name)
    assert b"_kernel_" in build.compile_kernels(source, architecture)


def test_compiled_once_and_found_again(cache, small_source, monkeypatch):
    code = compiled_kernels("small", "sm_90")
    monkeypatch.setattr(build, "compile_kernels", None)
    assert compiled_kernels("small", "sm_90") == code


def test_another_source_is_another_binary(cache, small_source):
    compiled_kernels("small", "sm_90")
    small_source.write_bytes(SMALL.replace(b"nothing", b"something"))
    assert b"something_kernel" in compiled_kernels("small", "sm_90")


def test_a_damaged_binary_is_compiled_again(cache, small_source):
    code = compiled_kernels("small", "sm_90")
    (path,) = cache.glob("*.cubin")
    path.write_bytes(code[:-1])
    assert compiled_kernels("small", "sm_90") == code


def test_no_partial_file_is_left_when_storing_fails(cache, small_source, monkeypatch):
    monkeypatch.setattr(os, "replace", _fail)
    with pytest.raises(UnavailableError, match="could not be stored"):
        compiled_kernels("small", "sm_90")
    assert list(cache.iterdir()) == []


def test_a_cache_that_others_can_write_to_is_refused(cache, small_source):
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(UnavailableError, match="set XDG_CACHE_HOME"):
        compiled_kernels("small", "sm_90")


def test_the_cache_is_private(cache, small_source):
    compiled_kernels("small", "sm_90")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_mistake_in_the_source_is_shown():
    with pytest.raises(UnavailableError, match="expected"):
        build.compile_kernels(b"mistake", "sm_90")


def _fail(*_):
    raise OSError("no space")
