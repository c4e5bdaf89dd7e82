"""Vim beside DeiT over the resolution: time, peak memory and their ratios, on a CPU or a GPU.

Both models are timed in one run, repeats interleaved, so that a busy moment hits both.
"""

import csv
import itertools
import json
import math
import shlex
import statistics
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from visionmamba.bench.cases import (
    PATCH_SIDE_PX,
    Case,
    LoadedCase,
    Mode,
    ModelName,
    OutOfMemory,
    Precision,
    Size,
)
from visionmamba.bench.machine import Machine, describe_machine
from visionmamba.bench.memory import peak_memory_gib

if TYPE_CHECKING:
    from rich.console import Console

_MODELS: tuple[ModelName, ...] = ("vim", "deit")
_SIZE_NAMES = {"tiny": "Ti", "small": "S", "base": "B"}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one model needed at one resolution."""

    model: ModelName
    """vim or deit."""
    resolution: int
    """Side of the square input in pixels."""
    num_tokens: int
    """Patches of one image."""
    status: Literal["ok", "out of memory"]
    """Out-of-memory cases stay in the table, without numbers."""
    milliseconds: float | None
    """Median time of one pass over the batch."""
    milliseconds_low: float | None
    """Fastest repeat."""
    milliseconds_high: float | None
    """Slowest repeat."""
    images_per_second: float | None
    """Batch divided by the median time."""
    peak_memory_gib: float | None
    """Weights, input and everything the pass allocates; None also where it cannot be measured."""


@dataclass(frozen=True, kw_only=True)
class EfficiencyResult:
    """All measurements of one run and its circumstances."""

    settings: "Efficiency"
    """What was asked for."""
    machine: Machine
    """Where it ran."""
    measurements: tuple[Measurement, ...]
    """Two for each resolution, in ascending order."""

    @property
    def names(self) -> dict[ModelName, str]:
        """The models' names as in the papers."""
        suffix = _SIZE_NAMES[self.settings.size]
        return {"vim": f"Vim-{suffix}", "deit": f"DeiT-{suffix}"}

    def measurement(self, model: ModelName, resolution: int) -> Measurement:
        """Return the measurement of a model at a resolution that was asked for."""
        for row in self.measurements:
            if (row.model, row.resolution) == (model, resolution):
                return row
        raise ValueError(
            f"resolution {resolution} was not measured; got {self.settings.resolutions}"
        )

    def speedup(self, resolution: int) -> float | None:
        """DeiT's time divided by Vim's; above 1 Vim is faster. None when one ran out of memory."""
        vim, deit = (self.measurement(model, resolution) for model in _MODELS)
        if vim.milliseconds is None or deit.milliseconds is None:
            return None
        return deit.milliseconds / vim.milliseconds

    def memory_ratio(self, resolution: int) -> float | None:
        """DeiT's peak memory divided by Vim's; above 1 Vim needs less. None when one is unknown."""
        vim, deit = (self.measurement(model, resolution) for model in _MODELS)
        if vim.peak_memory_gib is None or deit.peak_memory_gib is None:
            return None
        return deit.peak_memory_gib / vim.peak_memory_gib

    def crossing_px(self) -> float | None:
        """The resolution from which on Vim is faster, interpolated in the logarithm of the ratio.

        None when one model is faster over the whole range.
        """
        known = [
            (side, ratio) for side in self.settings.resolutions if (ratio := self.speedup(side))
        ]
        for (side, ratio), (next_side, next_ratio) in itertools.pairwise(known):
            if ratio < 1 <= next_ratio:
                part = -math.log(ratio) / (math.log(next_ratio) - math.log(ratio))
                return side + part * (next_side - side)
        return None

    def sentence(self) -> str:
        """Say in one sentence where each model is faster and by how much at the largest side."""
        vim, deit = self.names["vim"], self.names["deit"]
        known = [
            (side, ratio) for side in self.settings.resolutions if (ratio := self.speedup(side))
        ]
        if not known:
            return f"{vim} and {deit} cannot be compared: one of them ran out of memory throughout."
        crossing = self.crossing_px()
        side, ratio = known[-1]
        first, second, factor = (vim, deit, ratio) if ratio >= 1 else (deit, vim, 1 / ratio)
        largest = f"{first} takes {factor:.2f}x less time than {second} at {side} px"
        if crossing is not None:
            return f"{vim} is the faster one from about {crossing:.0f} px on; {largest}."
        always = all(ratio >= 1 for _, ratio in known)
        never = all(ratio < 1 for _, ratio in known)
        where = "at every resolution measured" if always or never else "at some of the resolutions"
        return f"{first} is the faster one {where}; {largest}."

    def save(self, folder: Path) -> list[Path]:
        """Write CSV, JSON, Markdown and the plots into a folder and return their paths."""
        from visionmamba.bench.plots import PALETTES, plot_memory, plot_time
        from visionmamba.bench.tables import to_markdown

        folder.mkdir(parents=True, exist_ok=True)
        stem = f"efficiency_{self.machine_kind}_{self.settings.size}_{self.settings.mode}"
        table = folder / f"{stem}.csv"
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Measurement)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.measurements)
        record = folder / f"{stem}.json"
        record.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        summary = folder / f"{stem}.md"
        summary.write_text(to_markdown(self), encoding="utf-8")
        pictures = []
        for name, plot in (("time", plot_time), ("memory", plot_memory)):
            for theme in PALETTES:
                pictures.append(folder / f"{stem}_{name}_{theme}.png")
                pictures[-1].write_bytes(plot(self, theme))
        return [table, record, summary, *pictures]

    @property
    def machine_kind(self) -> str:
        """cpu or cuda."""
        return "cpu" if self.machine.accelerator is None else "cuda"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        settings = {
            name: str(v) if isinstance(v, Path) else v for name, v in vars(self.settings).items()
        }
        return {
            "settings": settings,
            "machine": asdict(self.machine),
            "measurements": [asdict(row) for row in self.measurements],
            "crossing_px": self.crossing_px(),
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "EfficiencyResult":
        """Rebuild a result from `to_dict` after a trip through JSON.

        Raises:
            KeyError, TypeError: the record was written by another version.
        """
        settings = dict(record["settings"])
        settings["resolutions"] = tuple(settings["resolutions"])
        settings["out"] = Path(settings["out"])
        if settings["image"] is not None:
            settings["image"] = Path(settings["image"])
        return cls(
            settings=Efficiency(**settings),
            machine=Machine(**record["machine"]),
            measurements=tuple(Measurement(**row) for row in record["measurements"]),
        )


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Measure Vim beside DeiT over the resolution: time, peak memory, ratios, a table and plots."""

    size: Size = "tiny"
    """Which pair of models: tiny, small or base."""
    resolutions: tuple[int, ...] = (224, 384, 512, 768, 1024, 1248)
    """Sides of the square inputs in pixels, ascending multiples of 16."""
    batch: int = 1
    """Images in one pass."""
    mode: Mode = "infer"
    """infer: forward without gradients; train: forward, cross-entropy and backward."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one."""
    precision: Precision = "float32"
    """float32 throughout, or autocast to bfloat16."""
    threads: int | None = None
    """PyTorch's threads on the CPU; None leaves PyTorch's own choice."""
    repeats: int = 7
    """Timed passes of each case; the median counts."""
    warmup: int = 2
    """Passes before, not counted; kernels are compiled in the first."""
    image: Path | None = None
    """A picture resized to every resolution; None takes noise."""
    memory_limit_gib: float | None = None
    """On the CPU, count a case as out of memory when it grows by more; None asks the machine."""
    out: Path = Path("runs/bench")
    """Folder for the CSV, JSON and PNG files."""

    def __post_init__(self) -> None:
        sides = self.resolutions
        if not sides or any(side < PATCH_SIDE_PX or side % PATCH_SIDE_PX for side in sides):
            raise ValueError(
                f"resolutions must be positive multiples of {PATCH_SIDE_PX}, the side of a patch; "
                f"got {sides}"
            )
        if list(sides) != sorted(set(sides)):
            raise ValueError(f"resolutions must ascend without repetition; got {sides}")
        for name in ("batch", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative; got {self.warmup}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1; got {self.threads}")
        if self.image is not None and not self.image.is_file():
            raise FileNotFoundError(
                f"there is no picture {self.image}; leave --image out for noise"
            )

    @property
    def command(self) -> str:
        """The command that repeats this measurement."""
        words = ["visionmamba", "bench", "efficiency"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--{field.name.replace('_', '-')}", *(str(v) for v in values)]
        return shlex.join(words)

    def run(self) -> EfficiencyResult:
        """Measure, print the table and write the files into `out`."""
        from rich.console import Console

        from visionmamba.bench.tables import to_table

        console = Console()
        result = self.measure(console)
        paths = result.save(self.out)
        console.print(to_table(result))
        console.print(result.sentence())
        console.print(f"wrote {len(paths)} files: {self.out}/{paths[0].stem}*", highlight=False)
        return result

    def measure(self, console: "Console") -> EfficiencyResult:
        """Measure with a progress bar on the console, and write nothing.

        Raises:
            ValueError: device "cuda" without a CUDA device.
        """
        import torch
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "device 'cuda' was asked for, but torch finds no CUDA device; use 'cpu'"
            )
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        machine = describe_machine(device, command=self.command)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        measurements: list[Measurement] = []
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("measuring", total=len(self.resolutions))
            for side in self.resolutions:
                progress.update(task, description=f"measuring at {side} px")
                measurements += self._measure_pair(side, device)
                progress.advance(task)
        return EfficiencyResult(settings=self, machine=machine, measurements=tuple(measurements))

    def _measure_pair(self, side: int, device: str) -> list[Measurement]:
        import torch

        peaks: dict[ModelName, float | None] = {}
        passes: dict[ModelName, LoadedCase] = {}
        for model in _MODELS:
            case = Case(
                model=model,
                size=self.size,
                resolution=side,
                batch=self.batch,
                mode=self.mode,
                device=device,
                precision=self.precision,
                image=self.image,
            )
            try:
                peaks[model] = peak_memory_gib(
                    case, threads=torch.get_num_threads(), limit_gib=self.memory_limit_gib
                )
                passes[model] = case.load()
            except OutOfMemory:
                continue
        seconds = time_side_by_side(passes, repeats=self.repeats, warmup=self.warmup)
        return [
            self._row(model, side, seconds.get(model, []), peaks.get(model)) for model in _MODELS
        ]

    def _row(
        self, model: ModelName, side: int, seconds: list[float], peak_gib: float | None
    ) -> Measurement:
        median = statistics.median(seconds) if seconds else None
        return Measurement(
            model=model,
            resolution=side,
            num_tokens=(side // PATCH_SIDE_PX) ** 2,
            status="ok" if seconds else "out of memory",
            milliseconds=median * 1e3 if median else None,
            milliseconds_low=min(seconds) * 1e3 if seconds else None,
            milliseconds_high=max(seconds) * 1e3 if seconds else None,
            images_per_second=self.batch / median if median else None,
            peak_memory_gib=peak_gib if seconds else None,
        )


def time_side_by_side(
    passes: dict[ModelName, LoadedCase], *, repeats: int, warmup: int
) -> dict[ModelName, list[float]]:
    """Return the seconds of every repeat of each model, the models taking turns.

    A model that runs out of memory is left out of the answer.
    """
    seconds: dict[ModelName, list[float]] = {model: [] for model in passes}
    for turn in range(warmup + repeats):
        for model in list(seconds):
            begin = time.perf_counter()
            try:
                passes[model].run()
            except OutOfMemory:
                del seconds[model]
                continue
            if turn >= warmup:
                seconds[model].append(time.perf_counter() - begin)
    return seconds
