"""What `bench kernels` found: rows, their table and the files they go into."""

import csv
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from visionmamba.bench.ceilings import EXPONENTIALS_PER_CLOCK, Ceilings
from visionmamba.bench.machine import Machine
from visionmamba.bench.op_cases import Backend, Dtype, Pass
from visionmamba.bench.passes import Launch

if TYPE_CHECKING:
    from rich.table import Table

_SHORT: dict[Pass, str] = {"forward": "forward", "forward + backward": "+ backward"}


@dataclass(frozen=True, kw_only=True)
class KernelTiming:
    """One op with one backend."""

    op: str
    """Name in visionmamba.ops, or of a step inside a fused one."""
    shape: str
    """What it ran on."""
    dtype: Dtype
    """Of the activations."""
    direction: Pass
    """forward, without gradients; or with the gradients of every input."""
    backend: Backend
    """cpp, cuda and triton: kernels of this package; torch: PyTorch operations; reference: one
    token at a time."""
    launch: Launch
    """Whether Python launched every kernel, or a CUDA graph all of them."""
    milliseconds: float
    """Median of the repeats."""
    milliseconds_low: float
    """Fastest repeat."""
    milliseconds_high: float
    """Slowest repeat."""
    gigabytes_per_second: float
    """Bytes of inputs and outputs (and their gradients), each counted once, over the median."""
    floor_milliseconds: float | None
    """What the special-function units and the memory of the GPU need at least; None on a CPU."""
    difference: float | None
    """Relative root-mean-square difference of the first output: on a CPU from the PyTorch path, on
    a GPU, for one sequence, from the CPU in float32; None for the PyTorch path itself."""


@dataclass(frozen=True, kw_only=True)
class KernelsResult:
    """All timings of one run."""

    machine: Machine
    """Where it ran."""
    ceilings: Ceilings | None
    """What the floors come from; None on a CPU."""
    timings: tuple[KernelTiming, ...]
    """By shape, op, pass and backend."""

    def table(self) -> "Table":
        """Return the timings as a table for the terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        machine = self.machine
        table = Table(
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
            title="The ops of Vim-Ti",
            caption=f"{machine.accelerator or machine.processor}, {machine.num_threads} threads, "
            f"torch {machine.versions['torch']}, {machine.date}",
        )
        texts = len(_TEXT_HEADINGS)
        for i, heading in enumerate(self._headings()):
            table.add_column(heading, justify="left" if i < texts else "right", no_wrap=i != 1)
        for row in self.timings:
            cells = self._cells(row)
            table.add_row(*cells[:3], _SHORT[row.direction], *cells[4:])
        return table

    def to_markdown(self) -> str:
        """Return the timings as a table for a document, with their circumstances below."""
        headings = self._headings()
        lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
        lines += [f"| {' | '.join(self._cells(row))} |" for row in self.timings]
        return "\n".join((*lines, "", f"{self.machine.sentence()}{self._assumptions()}", ""))

    def _headings(self) -> tuple[str, ...]:
        floors = ("floor, ms", "share of floor") if self.ceilings else ()
        return (*_TEXT_HEADINGS, "ms", "GB/s", *floors, "difference")

    def _cells(self, row: KernelTiming) -> tuple[str, ...]:
        spread = (row.milliseconds_high - row.milliseconds_low) / 2
        digits = 3 if self.ceilings else 2
        floors: tuple[str, ...] = ()
        if row.floor_milliseconds is not None:
            share = row.floor_milliseconds / row.milliseconds
            floors = (f"{row.floor_milliseconds:.3f}", f"{share:.2f}")
        return (
            row.op,
            row.shape,
            row.dtype,
            row.direction,
            row.backend,
            f"{row.milliseconds:.{digits}f} ±{spread:.{digits}f}",
            f"{row.gigabytes_per_second:.1f}",
            *floors,
            "" if row.difference is None else f"{row.difference:.0e}",
        )

    def _assumptions(self) -> str:
        ceilings = self.ceilings
        if ceilings is None:
            return ""
        launched = sum(row.launch == "eager" for row in self.timings)
        return (
            f" Floor: {ceilings.num_multiprocessors} multiprocessors x {EXPONENTIALS_PER_CLOCK} "
            f"exponentials a clock at {ceilings.clock_ghz:.2f} GHz (a forward's again in the "
            f"backward), or every byte once at {ceilings.bytes_per_second / 1e12:.2f} TB/s, "
            f"whichever is longer. CUDA graphs over inputs larger than the L2 cache"
            f"{f'; {launched} rows launched one by one' if launched else ''}."
        )

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


_TEXT_HEADINGS = ("op", "shape", "dtype", "pass", "backend")
