"""The ops one by one: milliseconds and GB/s of every backend at the shapes of Vim-Ti.

On a CPU the backends take turns at 1248 px, and each is compared with the PyTorch path; the GPU's
kernels are measured by gpu_kernels.py. No fast wrong answer counts.
"""

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from visionmamba.bench.gpu_kernels import time_on_gpu
from visionmamba.bench.kernel_results import KernelsResult, KernelTiming
from visionmamba.bench.machine import choose_device, command_of, describe_machine
from visionmamba.bench.op_cases import Backend, OpCase, Pass, op_cases
from visionmamba.bench.passes import MOST_PASSES, TURN_SECONDS, cpu_seconds

if TYPE_CHECKING:
    import torch

_LENGTH, _QUICK_LENGTH = 6085, 1025
_PASSES: tuple[Pass, Pass] = ("forward", "forward + backward")


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Time every op with every backend at the shapes of Vim-Ti and print a table."""

    quick: bool = False
    """Short sequences only and, on a CPU, no reference: seconds instead of a minute."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one."""
    threads: int | None = None
    """PyTorch's threads on the CPU; None leaves PyTorch's own choice."""
    repeats: int = 7
    """Timed passes of each backend; the median counts."""
    out: Path = Path("runs/bench")
    """Folder for the CSV and JSON files."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1; got {self.repeats}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1; got {self.threads}")

    @property
    def command(self) -> str:
        """The command that repeats this measurement."""
        return command_of(self, "bench", "kernels")

    def run(self) -> KernelsResult:
        """Measure, print the table and write the files into `out`.

        Raises:
            ValueError: device "cuda" without a CUDA device.
        """
        import torch
        from rich.console import Console

        device = choose_device(self.device)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        console = Console()
        machine = describe_machine(device, command=self.command)
        ceilings = None
        timings: list[KernelTiming] = []
        with console.status("preparing") as status:
            if device == "cuda":
                ceilings, timings = time_on_gpu(
                    quick=self.quick, repeats=self.repeats, say=status.update
                )
            else:
                length = _QUICK_LENGTH if self.quick else _LENGTH
                for case in op_cases(batch=1, length=length, device="cpu"):
                    status.update(f"timing {case.op}")
                    timings += self._time(case, _backends(case, quick=self.quick))
        result = KernelsResult(machine=machine, ceilings=ceilings, timings=tuple(timings))
        console.print(result.table())
        paths = result.save(self.out)
        console.print(f"wrote {len(paths)} files: {self.out}/{paths[0].stem}*", highlight=False)
        return result

    def _time(self, case: "OpCase", backends: tuple[Backend, ...]) -> list[KernelTiming]:
        rows = []
        outputs: dict[Backend, torch.Tensor] = {}
        for direction in _PASSES:
            taking_part = [b for b in backends if (b, direction) != ("reference", _PASSES[1])]
            passes = {}
            for backend in taking_part:
                with _forced(backend):
                    outputs[backend] = case.forward(backend)[0]
                    passes[backend] = _passes_in_a_turn(case, direction, backend)
            seconds: dict[Backend, list[float]] = {backend: [] for backend in taking_part}
            for _ in range(self.repeats):
                for backend in taking_part:
                    with _forced(backend):
                        seconds[backend].append(_turn(case, direction, backend, passes[backend]))
            for backend in taking_part:
                median = statistics.median(seconds[backend])
                rows.append(
                    KernelTiming(
                        op=case.op,
                        shape=case.shape,
                        dtype="float32",
                        direction=direction,
                        backend=backend,
                        launch="eager",
                        milliseconds=median * 1e3,
                        milliseconds_low=min(seconds[backend]) * 1e3,
                        milliseconds_high=max(seconds[backend]) * 1e3,
                        gigabytes_per_second=case.num_bytes(direction) / median / 1e9,
                        floor_milliseconds=None,
                        difference=None
                        if backend == "torch"
                        else _difference(outputs[backend], outputs["torch"]),
                    )
                )
        return rows


def _backends(case: OpCase, *, quick: bool) -> tuple[Backend, ...]:
    from visionmamba.ops import backends

    chosen = {
        status.name for status in backends() if (status.op, status.device) == (case.op, "cpu")
    }
    kernels: tuple[Backend, ...] = ("cpp",) if "cpp" in chosen else ()
    slow: tuple[Backend, ...] = ("reference",) if case.reference and not quick else ()
    return (*kernels, "torch", *slow)


@contextmanager
def _forced(backend: Backend) -> Iterator[None]:
    """Let the CPU's ops run with one backend inside the block."""
    from visionmamba.ops.cpu import ENVIRONMENT_VARIABLE, forget_choice

    before = os.environ.get(ENVIRONMENT_VARIABLE)
    if backend in ("cpp", "torch"):
        os.environ[ENVIRONMENT_VARIABLE] = backend
        forget_choice()
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT_VARIABLE, None)
        if before is not None:
            os.environ[ENVIRONMENT_VARIABLE] = before
        forget_choice()


def _passes_in_a_turn(case: OpCase, direction: Pass, backend: Backend) -> int:
    """How many passes fill a turn; the first two runs warm up."""
    _turn(case, direction, backend, 1)
    seconds = _turn(case, direction, backend, 1)
    return max(1, min(MOST_PASSES, round(TURN_SECONDS / seconds)))


def _turn(case: OpCase, direction: Pass, backend: Backend, passes: int) -> float:
    """Return the seconds of one pass, the mean over a turn."""
    if direction == "forward":
        return cpu_seconds(lambda: case.forward(backend), passes)
    return cpu_seconds(case.train, passes)


def _difference(actual: "torch.Tensor", expected: "torch.Tensor") -> float:
    return float((actual - expected).norm() / expected.norm())
