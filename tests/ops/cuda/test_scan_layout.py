"""Python's structures and sizes are those of scan.cu; checked by the compiler, without a GPU."""

import ctypes

from visionmamba.ops.cuda import build, scan


def test_structures_and_shared_memory_have_the_sizes_of_the_source():
    source = build.source_text("scan")
    sizes = {
        "Direction": ctypes.sizeof(scan._Direction),
        "Problem": ctypes.sizeof(scan._Problem),
        **{f"BackwardWarp<{k}>": scan._backward_shared_bytes(k) for k in range(4)},
    }
    checks = "".join(
        f'\nstatic_assert(sizeof({name}) == {size}, "{name}");' for name, size in sizes.items()
    )
    without_kernels = source[: source.index(b"#define FORWARD(")]
    nothing = b'\nextern "C" __global__ void nothing_kernel() {}'
    assert build.compile_kernels(without_kernels + checks.encode() + nothing, "sm_80")
