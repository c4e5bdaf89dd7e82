"""The ops one by one: milliseconds and GB/s of every backend at the shapes of Vim-Ti on 1248 px.

Backends take turns, and each is compared with the PyTorch path: no fast wrong answer counts.
"""

import csv
import json
import os
import shlex
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from visionmamba.bench.machine import Machine, describe_machine
from visionmamba.bench.op_cases import Backend, OpCase, Pass, op_cases

if TYPE_CHECKING:
    import torch
    from rich.table import Table

_LENGTH, _QUICK_LENGTH = 6085, 1025
_TURN_SECONDS = 0.05
_MOST_PASSES = 1000
_SHORT: dict[Pass, str] = {"forward": "forward", "forward + backward": "+ backward"}
_PASSES: tuple[Pass, Pass] = ("forward", "forward + backward")


@dataclass(frozen=True, kw_only=True)
class KernelTiming:
    """One op with one backend."""

    op: str
    """Name in visionmamba.ops."""
    shape: str
    """What it ran on."""
    direction: Pass
    """forward, without gradients; or with the gradients of every input."""
    backend: Backend
    """cpp and cuda: kernels of this package; torch: PyTorch operations; reference: one token at a
    time."""
    milliseconds: float
    """Median of the repeats."""
    milliseconds_low: float
    """Fastest repeat."""
    milliseconds_high: float
    """Slowest repeat."""
    gigabytes_per_second: float
    """Bytes of inputs and outputs (and their gradients), each counted once, over the median."""
    difference: float | None
    """Relative root-mean-square difference of the output from the PyTorch path; None for itself."""


@dataclass(frozen=True, kw_only=True)
class KernelsResult:
    """All timings of one run."""

    machine: Machine
    """Where it ran."""
    num_tokens: int
    """Length of the sequences."""
    timings: tuple[KernelTiming, ...]
    """By op, pass and backend."""

    def table(self) -> "Table":
        """Return the timings as a table for the terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        machine = self.machine
        table = Table(
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
            title=f"The ops of Vim-Ti, batch 1, {self.num_tokens} tokens",
            caption=f"{machine.accelerator or machine.processor}, {machine.num_threads} threads, "
            f"torch {machine.versions['torch']}, {machine.date}",
        )
        for heading in ("op", "pass", "backend"):
            table.add_column(heading, no_wrap=True)
        for heading in ("ms", "GB/s", "difference"):
            table.add_column(heading, justify="right", no_wrap=True)
        previous = ("", "")
        for row in self.timings:
            spread = (row.milliseconds_high - row.milliseconds_low) / 2
            digits = 2 if row.milliseconds < 100 else 0
            table.add_row(
                row.op if row.op != previous[0] else "",
                _SHORT[row.direction] if (row.op, row.direction) != previous else "",
                row.backend,
                f"{row.milliseconds:.{digits}f} ±{spread:.{digits}f}",
                f"{row.gigabytes_per_second:.1f}",
                "" if row.difference is None else f"{row.difference:.0e}",
            )
            previous = (row.op, row.direction)
        return table

    def to_markdown(self) -> str:
        """Return the timings as a table for a document, with their circumstances below."""
        lines = [
            "| op | shape | pass | backend | ms | GB/s | difference |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.timings:
            spread = (row.milliseconds_high - row.milliseconds_low) / 2
            cells = (
                row.op,
                row.shape,
                row.direction,
                row.backend,
                f"{row.milliseconds:.2f} ±{spread:.2f}",
                f"{row.gigabytes_per_second:.1f}",
                "" if row.difference is None else f"{row.difference:.0e}",
            )
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join((*lines, "", self.machine.sentence(), ""))

    def save(self, folder: Path) -> list[Path]:
        """Write CSV, JSON and Markdown into a folder and return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"kernels_{'cuda' if self.machine.accelerator else 'cpu'}"
        table, record = folder / f"{stem}.csv", folder / f"{stem}.json"
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(KernelTiming)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.timings)
        record.write_text(json.dumps(asdict(self), indent=2) + "\n")
        summary = folder / f"{stem}.md"
        summary.write_text(self.to_markdown(), encoding="utf-8")
        return [table, record, summary]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Time every op with every backend at the shapes of Vim-Ti on 1248 px and print a table."""

    quick: bool = False
    """Six times shorter sequences and no reference: seconds instead of a minute."""
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
        words = ["visionmamba", "bench", "kernels"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                words += [f"--{field.name}"] if value is True else [f"--{field.name}", str(value)]
        return shlex.join(words)

    def run(self) -> KernelsResult:
        """Measure, print the table and write the files into `out`.

        Raises:
            ValueError: device "cuda" without a CUDA device.
        """
        import torch
        from rich.console import Console

        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "device 'cuda' was asked for, but torch finds no CUDA device; use 'cpu'"
            )
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        console = Console()
        length = _QUICK_LENGTH if self.quick else _LENGTH
        machine = describe_machine(device, command=self.command)
        timings: list[KernelTiming] = []
        with console.status("preparing") as status:
            for case in op_cases(length, device):
                status.update(f"timing {case.op}")
                timings += self._time(case, _backends(case, device, quick=self.quick))
        result = KernelsResult(machine=machine, num_tokens=length, timings=tuple(timings))
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
                        direction=direction,
                        backend=backend,
                        milliseconds=median * 1e3,
                        milliseconds_low=min(seconds[backend]) * 1e3,
                        milliseconds_high=max(seconds[backend]) * 1e3,
                        gigabytes_per_second=case.num_bytes(direction) / median / 1e9,
                        difference=None
                        if backend == "torch" or "torch" not in outputs
                        else _difference(outputs[backend], outputs["torch"]),
                    )
                )
        return rows


def _backends(case: OpCase, device: str, *, quick: bool) -> tuple[Backend, ...]:
    from visionmamba.ops import backends

    chosen = {
        status.name for status in backends() if (status.op, status.device) == (case.op, device)
    }
    kernels: tuple[Backend, ...] = ("cpp",) if "cpp" in chosen else ()
    if "cuda" in chosen:
        return ("cuda",)
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
    return max(1, min(_MOST_PASSES, round(_TURN_SECONDS / seconds)))


def _turn(case: OpCase, direction: Pass, backend: Backend, passes: int) -> float:
    """Return the seconds of one pass, the mean over a turn."""
    _synchronize(case)
    begin = time.perf_counter()
    for _ in range(passes):
        if direction == "forward":
            case.forward(backend)
        else:
            case.train()
    _synchronize(case)
    return (time.perf_counter() - begin) / passes


def _synchronize(case: OpCase) -> None:
    import torch

    if case.inputs[0].is_cuda:
        torch.cuda.synchronize()


def _difference(actual: "torch.Tensor", expected: "torch.Tensor") -> float:
    return float((actual - expected).norm() / expected.norm())
