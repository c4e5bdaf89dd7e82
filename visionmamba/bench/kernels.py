"""The ops one by one: milliseconds and GB/s of every backend at the shapes of Vim-Ti on 1248 px.

Backends take turns, and each is compared with the PyTorch path: no fast wrong answer counts.
"""

import csv
import functools
import json
import os
import shlex
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from visionmamba.bench.machine import Machine, describe_machine

if TYPE_CHECKING:
    import torch
    from rich.table import Table

Backend = Literal["cpp", "cuda", "torch", "reference"]
Pass = Literal["forward", "forward + backward"]

_LENGTH, _QUICK_LENGTH = 6085, 1025
_D_MODEL, _D_INNER, _D_STATE, _DT_RANK, _D_CONV = 192, 384, 16, 12, 4
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

    def save(self, folder: Path) -> list[Path]:
        """Write CSV and JSON into a folder and return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"kernels_{'cuda' if self.machine.accelerator else 'cpu'}"
        table, record = folder / f"{stem}.csv", folder / f"{stem}.json"
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(KernelTiming)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.timings)
        record.write_text(json.dumps(asdict(self), indent=2) + "\n")
        return [table, record]


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
            for case in _cases(length, device):
                status.update(f"timing {case.op}")
                timings += self._time(case, _backends(case, device, quick=self.quick))
        result = KernelsResult(machine=machine, num_tokens=length, timings=tuple(timings))
        console.print(result.table())
        paths = result.save(self.out)
        console.print("wrote " + ", ".join(str(path) for path in paths), highlight=False)
        return result

    def _time(self, case: "_Case", backends: tuple[Backend, ...]) -> list[KernelTiming]:
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


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One op with its inputs; all of them get gradients."""

    op: str
    shape: str
    inputs: "tuple[torch.Tensor, ...]"
    call: "Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]"
    reference: "Callable[..., torch.Tensor] | None" = None

    @functools.cached_property
    def output_gradients(self) -> "tuple[torch.Tensor, ...]":
        """Ones for every output."""
        import torch

        return tuple(map(torch.ones_like, self.forward("torch")))

    def forward(self, backend: Backend) -> "tuple[torch.Tensor, ...]":
        import torch

        call = self.reference if backend == "reference" and self.reference else self.call
        with torch.inference_mode():
            return _as_tuple(call(*self.inputs))

    def train(self) -> None:
        import torch

        torch.autograd.grad(_as_tuple(self.call(*self.inputs)), self.inputs, self.output_gradients)

    def num_bytes(self, direction: Pass) -> int:
        """Bytes of inputs and outputs; the backward reads the inputs again and writes as much."""
        inputs = sum(tensor.numel() * tensor.element_size() for tensor in self.inputs)
        outputs = sum(t.numel() * t.element_size() for t in self.output_gradients)
        return inputs + outputs if direction == "forward" else 3 * inputs + 2 * outputs


def _cases(length: int, device: str) -> "Iterator[_Case]":
    import torch

    from visionmamba.ops import (
        bidirectional_conv1d,
        bidirectional_scan,
        causal_conv1d,
        rms_norm,
        selective_scan,
    )
    from visionmamba.ops.selective_scan.reference import selective_scan_reference

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    def decay_rates() -> torch.Tensor:
        rates = -torch.arange(1.0, _D_STATE + 1, device=device).repeat(_D_INNER, 1)
        return rates.requires_grad_()

    def step_sizes() -> torch.Tensor:
        return (random(1, length, _D_INNER).detach().abs() * 0.1).requires_grad_()

    tokens = (1, length, _D_INNER)
    yield _Case(
        op="selective_scan",
        shape=f"(1, {length}, {_D_INNER}, N {_D_STATE})",
        inputs=(
            random(*tokens),
            step_sizes(),
            decay_rates(),
            random(1, length, _D_STATE),
            random(1, length, _D_STATE),
            random(_D_INNER),
        ),
        call=selective_scan,
        reference=lambda *inputs: selective_scan_reference(*inputs)[0],
    )
    projected = _DT_RANK + 2 * _D_STATE
    yield _Case(
        op="bidirectional_scan",
        shape=f"(1, {length}, {_D_INNER}, N {_D_STATE}) both directions, gated",
        inputs=(
            *(random(*tokens) for _ in range(2)),
            *(random(1, length, projected) for _ in range(2)),
            *(random(_D_INNER, _DT_RANK) for _ in range(2)),
            *(random(_D_INNER) for _ in range(2)),
            *(decay_rates() for _ in range(2)),
            *(random(_D_INNER) for _ in range(2)),
            random(*tokens),
        ),
        call=lambda *inputs: bidirectional_scan(
            inputs[0:2],
            inputs[2:4],
            inputs[4:6],
            inputs[6:8],
            inputs[8:10],
            inputs[10:12],
            z=inputs[12],
            scale=0.5,
        ),
    )
    yield _Case(
        op="causal_conv1d",
        shape=f"(1, {length}, {_D_INNER}) {_D_CONV} taps, SiLU",
        inputs=(random(*tokens), random(_D_INNER, _D_CONV), random(_D_INNER)),
        call=lambda x, weight, bias: causal_conv1d(x, weight, bias, activation="silu"),
    )
    yield _Case(
        op="bidirectional_conv1d",
        shape=f"(1, {length}, {_D_INNER}) {_D_CONV} taps, SiLU, both directions",
        inputs=(
            random(*tokens),
            *(random(_D_INNER, _D_CONV) for _ in range(2)),
            *(random(_D_INNER) for _ in range(2)),
        ),
        call=lambda x, *weights: bidirectional_conv1d(
            x, weights[:2], weights[2:], activation="silu"
        ),
    )
    yield _Case(
        op="rms_norm",
        shape=f"(1, {length}, {_D_MODEL}) with residual",
        inputs=(random(1, length, _D_MODEL), random(_D_MODEL), random(1, length, _D_MODEL)),
        call=lambda x, weight, residual: rms_norm(x, weight, residual=residual),
    )


def _backends(case: _Case, device: str, *, quick: bool) -> tuple[Backend, ...]:
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


def _passes_in_a_turn(case: _Case, direction: Pass, backend: Backend) -> int:
    """How many passes fill a turn; the first two runs warm up."""
    _turn(case, direction, backend, 1)
    seconds = _turn(case, direction, backend, 1)
    return max(1, min(_MOST_PASSES, round(_TURN_SECONDS / seconds)))


def _turn(case: _Case, direction: Pass, backend: Backend, passes: int) -> float:
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


def _as_tuple(outputs: "torch.Tensor | tuple[torch.Tensor, ...]") -> "tuple[torch.Tensor, ...]":
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _synchronize(case: _Case) -> None:
    import torch

    if case.inputs[0].is_cuda:
        torch.cuda.synchronize()


def _difference(actual: "torch.Tensor", expected: "torch.Tensor") -> float:
    return float((actual - expected).norm() / expected.norm())
