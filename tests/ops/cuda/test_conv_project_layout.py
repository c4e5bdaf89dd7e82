"""Python's structure and sizes are those of conv_project.cu; checked by the compiler, no GPU."""

import ctypes

import pytest

from visionmamba.ops.cuda import build, conv_project


def test_structure_and_shared_memory_have_the_sizes_of_the_source():
    structure = ctypes.sizeof(conv_project._ConvProject)
    checks = f"""
static_assert(sizeof(ConvProject) == {structure}, "ConvProject");
static_assert(sizeof(Shared) == {conv_project._SHARED_BYTES}, "Shared");
static_assert(32 * WARPS == {conv_project._THREADS} && GROUPS == {conv_project._GROUPS}, "block");
"""
    assert build.compile_kernels(build.source_text("conv_project") + checks.encode(), "sm_90")


@pytest.mark.parametrize("batch", [1, 2, 8, 64, 527, 529, 1000])
@pytest.mark.parametrize("length", [1, 5, 8, 9, 197, 6085])
def test_runs_cover_every_token_and_short_ones_come_alone(batch, length):
    runs, run, blocks = conv_project._plan(batch, length, 132)
    assert (runs - 1) * run < length <= runs * run
    assert 1 <= blocks <= 132
    assert run % 16 == 0 or (run == 8 and batch * runs <= 4 * 132)
