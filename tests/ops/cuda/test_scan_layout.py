"""Python's structures and sizes are those of scan.cu; checked by the compiler, without a GPU."""

import ctypes
import itertools

from visionmamba.ops.cuda import build, scan_launch


def test_chunks_cover_a_sequence_and_find_their_rings_free():
    assert scan_launch.chunks_of(6085, 8) == (456, 704, 8)
    assert scan_launch.chunks_of(6085, 3) is None
    assert scan_launch.chunks_of(511, 99) is None
    lengths = [*range(512, 1200), 6085, 65_537, 1_048_577]
    for num_tokens, at_once in itertools.product(lengths, (4, 5, 8, 13, 66, 396)):
        first, length, following = scan_launch.chunks_of(num_tokens, at_once)
        assert first % scan_launch.GROUP == length % scan_launch.GROUP == 0
        assert 0 < first <= length
        assert 1 <= following <= at_once
        last = num_tokens - first - (following - 1) * length
        assert 0 < last <= length


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
