"""Python's structures and sizes are those of scan.cu; checked by the compiler, without a GPU."""

import ctypes

from visionmamba.ops.cuda import build, scan_launch


def test_structures_and_shared_memory_have_the_sizes_of_the_source():
    source = build.source_text("scan")
    sizes = {
        "Direction": ctypes.sizeof(scan_launch.DirectionStructure),
        "Problem": ctypes.sizeof(scan_launch.ProblemStructure),
        **{f"BackwardWarp<{k}>": scan_launch.backward_shared_bytes(k) for k in range(4)},
    }
    checks = "".join(
        f'\nstatic_assert(sizeof({name}) == {size}, "{name}");' for name, size in sizes.items()
    )
    without_kernels = source[: source.index(b"#define FORWARD(")]
    nothing = b'\nextern "C" __global__ void nothing_kernel() {}'
    assert build.compile_kernels(without_kernels + checks.encode() + nothing, "sm_80")
