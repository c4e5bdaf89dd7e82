"""The GPU's kernels one by one, as CUDA graphs over inputs that no cache holds.

One graph runs an op on several sets of inputs, together larger than twice the L2 cache; its time is
divided by their number. A row's output is compared with the same op on the CPU in float32.
"""

import math
from collections.abc import Callable

from visionmamba.bench.ceilings import Ceilings, measure_ceilings
from visionmamba.bench.kernel_results import KernelTiming
from visionmamba.bench.op_cases import Backend, Dtype, OpCase, Pass, op_cases
from visionmamba.bench.passes import Launch, capture, seconds_in_turns

_SHAPES = ((64, 197), (8, 1025), (8, 6085), (1, 6085))
_QUICK_SHAPES = _SHAPES[:2]
_DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32")
_PASSES: tuple[Pass, Pass] = ("forward", "forward + backward")
_WITHOUT_FLOAT32_GRADIENTS = ("selective_scan", "bidirectional_scan")
"""Ops whose gradients in float32 come from plain PyTorch: correct, but nothing to time."""


def time_on_gpu(
    *, quick: bool, repeats: int, say: Callable[[str], object]
) -> tuple[Ceilings, list[KernelTiming]]:
    """Return the rates of the current GPU and the time of every op at every shape.

    Args:
        quick: the two shapes with short sequences only.
        repeats: timed turns of each; the median counts.
        say: told what is being done.
    """
    ceilings = measure_ceilings()
    timings: list[KernelTiming] = []
    for batch, length in _QUICK_SHAPES if quick else _SHAPES:
        for dtype in _DTYPES:
            sets = [
                op_cases(batch=batch, length=length, device="cuda", dtype=dtype, seed=seed)
                for seed in range(_num_sets(batch, length))
            ]
            for cases in zip(*sets, strict=True):
                say(f"timing {cases[0].op}, ({batch}, {length}), {dtype}")
                for direction in _PASSES:
                    is_slow = dtype == "float32" and cases[0].op in _WITHOUT_FLOAT32_GRADIENTS
                    if direction == "forward" or (cases[0].has_gradients and not is_slow):
                        timings.append(_time(cases, dtype, direction, repeats, ceilings))
    return ceilings, timings


def _num_sets(batch: int, length: int) -> int:
    """Return how many sets of inputs are together larger than twice the L2 cache."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    bytes_of_one = batch * length * 192 * 2  # the smallest input there is, the norm's
    return max(2, math.ceil(2 * properties.L2_cache_size / (2 * bytes_of_one)))


def _time(
    cases: tuple[OpCase, ...], dtype: Dtype, direction: Pass, repeats: int, ceilings: Ceilings
) -> KernelTiming:
    case = cases[0]
    backend = _backend(case.op)

    def run() -> None:
        for one in cases:
            if direction == "forward":
                one.forward(backend)
            else:
                one.train()

    launch: Launch = "graph"
    try:
        replay = capture(run)
    except RuntimeError:
        launch, replay = "eager", run
    spread = seconds_in_turns({0: replay}, repeats=repeats, warmup=1, is_on_gpu=True)[0]
    num_bytes = case.num_bytes(direction)
    times = 1 if direction == "forward" else 2
    floor = ceilings.floor_seconds(
        num_exponentials=times * case.num_exponentials, num_bytes=num_bytes
    )
    per_set = 1e3 / len(cases)
    return KernelTiming(
        op=case.op,
        shape=case.shape,
        dtype=dtype,
        direction=direction,
        backend=backend,
        launch=launch,
        milliseconds=spread.median * per_set,
        milliseconds_low=spread.low * per_set,
        milliseconds_high=spread.high * per_set,
        gigabytes_per_second=num_bytes / (spread.median / len(cases)) / 1e9,
        floor_milliseconds=floor * 1e3,
        difference=_difference(case) if direction == "forward" else None,
    )


def _backend(op: str) -> Backend:
    from visionmamba.ops import backends

    names = {status.op: status.name for status in backends() if status.device == "cuda"}
    name = names.get(op, "cuda")  # the steps of the fused mixer have kernels or are left out
    return "torch" if name == "torch" else "triton" if name == "triton" else "cuda"


def _difference(case: OpCase) -> float:
    actual = case.first_sample(case.forward("cuda")[0]).float().cpu()
    expected = case.first_sample_on_cpu()
    return float((actual - expected).norm() / expected.norm())
