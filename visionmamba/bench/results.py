"""What `bench efficiency` found: rows, their ratios, crossing points, and the files they go into.

Memory is in GB, 10^9 bytes, as in the paper.
"""

import csv
import itertools
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from visionmamba.bench.cases import ModelName, display_name
from visionmamba.bench.machine import Machine
from visionmamba.bench.passes import Launch

if TYPE_CHECKING:
    from visionmamba.bench.efficiency import Efficiency

PAPER_CARD_GB = 80.0
"""Memory of the largest card that the paper's figure 1 can mean (A100, 80 GB)."""
DOES_NOT_FIT = "does not fit the paper's card"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one model needed for one pass over a batch."""

    model: ModelName
    """Which model."""
    resolution: int
    """Side of the square input in pixels."""
    batch: int
    """Images in the pass."""
    num_tokens: int
    """Patches of one image."""
    status: Literal["ok", "out of memory"]
    """Out-of-memory cases stay in the table, without numbers."""
    launch: Launch | None
    """Whether each kernel was launched by Python or the pass was one CUDA graph."""
    milliseconds: float | None
    """Median time of the pass."""
    milliseconds_low: float | None
    """Fastest turn."""
    milliseconds_high: float | None
    """Slowest turn."""
    images_per_second: float | None
    """Batch divided by the median time."""
    peak_memory_gb: float | None
    """Weights, input and everything the pass allocates, 10^9 bytes; None also where the system
    does not tell."""
    relative_error: float | None
    """Root-mean-square difference of the logits (feature maps with a pyramid) of the first images
    from the same model's in float32, relative; None in float32."""

    @property
    def fits_paper_card(self) -> bool:
        """Whether the paper's 80 GB would have been enough."""
        return self.peak_memory_gb is None or self.peak_memory_gb <= PAPER_CARD_GB


@dataclass(frozen=True, kw_only=True)
class EfficiencyResult:
    """All measurements of one run and its circumstances."""

    settings: "Efficiency"
    """What was asked for."""
    machine: Machine
    """Where it ran."""
    measurements: tuple[Measurement, ...]
    """Point by point in the order asked for, and in each the models in theirs."""

    @property
    def names(self) -> dict[ModelName, str]:
        """The models' names as in the papers."""
        return {model: display_name(model, self.settings.size) for model in self.settings.models}

    @property
    def first(self) -> ModelName:
        """The model that the others are compared with."""
        return self.settings.models[0]

    @property
    def others(self) -> tuple[ModelName, ...]:
        """The models beside the first."""
        return self.settings.models[1:]

    @property
    def machine_kind(self) -> Literal["cpu", "cuda"]:
        """What was measured."""
        return "cpu" if self.machine.accelerator is None else "cuda"

    @property
    def precision(self) -> str:
        """float32 or bfloat16."""
        return self.settings.precision_on(self.machine_kind)

    def measurement(
        self, model: ModelName, resolution: int, batch: int | None = None
    ) -> Measurement:
        """Return the measurement of a model at a size that was asked for.

        Args:
            model: one of the models measured.
            resolution: side in pixels.
            batch: images in a pass; None takes the first measured at this resolution.
        """
        for row in self.measurements:
            is_batch = batch is None or row.batch == batch
            if (row.model, row.resolution) == (model, resolution) and is_batch:
                return row
        raise ValueError(
            f"{model} at {resolution} px, batch {batch or 'any'}, was not measured; got models "
            f"{self.settings.models}, sizes {self.settings.points}"
        )

    def time_ratio(self, row: Measurement) -> float | None:
        """A row's time divided by the first model's; above 1 the first is faster.

        None when one of them ran out of memory.
        """
        first = self.measurement(self.first, row.resolution, row.batch)
        if row.milliseconds is None or first.milliseconds is None:
            return None
        return row.milliseconds / first.milliseconds

    def memory_ratio(self, row: Measurement) -> float | None:
        """A row's peak memory divided by the first model's; None when one is unknown."""
        first = self.measurement(self.first, row.resolution, row.batch)
        if row.peak_memory_gb is None or first.peak_memory_gb is None:
            return None
        return row.peak_memory_gb / first.peak_memory_gb

    @property
    def is_curve(self) -> bool:
        """Whether the points differ in resolution alone, so that they can be drawn as curves."""
        return len({batch for _, batch in self.settings.points}) == 1

    def crossing_px(self, other: ModelName) -> float | None:
        """The resolution from which on the first model is faster than another one.

        Interpolated in the logarithm of the ratio; None when one is faster over the whole range,
        or the points are no curve.
        """
        if not self.is_curve:
            return None
        for (side, ratio), (next_side, next_ratio) in itertools.pairwise(self._ratios(other)):
            if ratio < 1 <= next_ratio:
                part = -math.log(ratio) / (math.log(next_ratio) - math.log(ratio))
                return side + part * (next_side - side)
        return None

    def sentence(self) -> str:
        """Say where the first model is faster than each other, and by how much at the last size."""
        return " ".join(map(self._sentence, self.others))

    def _sentence(self, other: ModelName) -> str:
        first, second = self.names[self.first], self.names[other]
        ratios = self._ratios(other)
        if not ratios:
            return (
                f"{first} and {second} cannot be compared: one of them ran out of memory "
                "throughout."
            )
        side, ratio = ratios[-1]
        fast, slow, factor = (first, second, ratio) if ratio >= 1 else (second, first, 1 / ratio)
        last = f"takes {factor:.2f}x less time than {slow} at {side} px"
        crossing = self.crossing_px(other)
        if crossing is not None:
            where = f"{first} is faster than {second} from about {crossing:.0f} px on"
            return f"{where}; {fast} {last}."
        wins = sum((ratio >= 1) == (fast == first) for _, ratio in ratios)
        where = "everywhere" if wins == len(ratios) else f"in {wins} of {len(ratios)} cases"
        return f"{fast} is faster than {slow} {where}; it {last}."

    def _ratios(self, other: ModelName) -> list[tuple[int, float]]:
        """Resolutions and ratios of time, where both are known."""
        rows = [row for row in self.measurements if row.model == other]
        ratios = [(row.resolution, self.time_ratio(row)) for row in rows]
        return [(side, ratio) for side, ratio in ratios if ratio is not None]

    @property
    def stem(self) -> str:
        """What the names of all files begin with."""
        settings = self.settings
        names = {
            "classifiers": "efficiency",
            "segmenters": f"segmentation_{settings.segmenter}",
            "detectors": f"detection_{settings.detector}",
        }
        parts = [names[settings.what], self.machine_kind, settings.size, settings.mode]
        parts += ["pyramid"] if settings.pyramid else []
        return "_".join([*parts, *([settings.label] if settings.label else [])])

    def save(self, folder: Path) -> list[Path]:
        """Write CSV, JSON, Markdown and, of a curve, the plots; return their paths."""
        from visionmamba.bench.plots import PALETTES, plot_memory, plot_speed
        from visionmamba.bench.tables import to_markdown

        folder.mkdir(parents=True, exist_ok=True)
        table = folder / f"{self.stem}.csv"
        with table.open("w", newline="") as file:
            names = [*(field.name for field in fields(Measurement)), "fits_paper_card"]
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(
                asdict(row) | {"fits_paper_card": row.fits_paper_card} for row in self.measurements
            )
        record = folder / f"{self.stem}.json"
        record.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        summary = folder / f"{self.stem}.md"
        summary.write_text(to_markdown(self), encoding="utf-8")
        pictures = []
        if self.is_curve:
            for name, plot in (("speed", plot_speed), ("memory", plot_memory)):
                for theme in PALETTES:
                    pictures.append(folder / f"{self.stem}_{name}_{theme}.png")
                    pictures[-1].write_bytes(plot(self, theme))
        return [table, record, summary, *pictures]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self.settings).items()
        }
        return {
            "settings": settings,
            "machine": asdict(self.machine),
            "measurements": [asdict(row) for row in self.measurements],
            "crossings_px": {other: self.crossing_px(other) for other in self.others},
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "EfficiencyResult":
        """Rebuild a result from `to_dict` after a trip through JSON.

        Raises:
            KeyError, TypeError: the record was written by another version.
        """
        from visionmamba.bench.efficiency import Efficiency

        settings = dict(record["settings"])
        for name in ("models", "resolutions", "batch"):
            settings[name] = tuple(settings[name])
        settings["out"] = Path(settings["out"])
        if settings["image"] is not None:
            settings["image"] = Path(settings["image"])
        return cls(
            settings=Efficiency(**settings),
            machine=Machine(**record["machine"]),
            measurements=tuple(Measurement(**row) for row in record["measurements"]),
        )
