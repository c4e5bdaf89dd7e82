"""Pictures of a comparison in the manner of the paper's figure 1, as PNG bytes, light or dark."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from visionmamba.bench.cases import ModelName

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from visionmamba.bench.efficiency import EfficiencyResult

Theme = Literal["light", "dark"]


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours of one theme; Vim and DeiT differ in lightness, marker and line too (Okabe-Ito)."""

    background: str
    """Behind everything."""
    text: str
    """Labels and titles."""
    faint: str
    """Grid and axes."""
    vim: str
    """Curves of Vim."""
    deit: str
    """Curves of DeiT."""


PALETTES: dict[Theme, Palette] = {
    "light": Palette(
        background="#ffffff", text="#1c2733", faint="#d5dbe1", vim="#0072b2", deit="#d55e00"
    ),
    "dark": Palette(
        background="#161b22", text="#e6edf3", faint="#38424d", vim="#56b4e9", deit="#f0a04b"
    ),
}
_LINES: dict[ModelName, str] = {"vim": "o-", "deit": "s--"}


@contextmanager
def chart(theme: Theme, title: str) -> Iterator[tuple["Axes", io.BytesIO]]:
    """Give axes in the house style; the PNG is in the buffer when the block ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    palette = PALETTES[theme]
    figure = Figure(figsize=(6.0, 3.9), dpi=160, facecolor=palette.background, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=palette.background)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=palette.text, pad=12)
    axes.grid(color=palette.faint, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette.faint)
    axes.tick_params(colors=palette.text, labelsize=10, length=0)
    axes.xaxis.label.set_color(palette.text)
    axes.yaxis.label.set_color(palette.text)
    buffer = io.BytesIO()
    yield axes, buffer
    figure.savefig(buffer, format="png")


def use_log_scale(axes: "Axes") -> None:
    """Make the vertical axis logarithmic, with plain numbers at 1, 2 and 5 of every decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def plot_time(result: "EfficiencyResult", theme: Theme = "light") -> bytes:
    """Plot the time of one image over the resolution, with the crossing point named."""
    palette = PALETTES[theme]
    what = "inference" if result.settings.mode == "infer" else "training step"
    with chart(theme, f"Time of one image, {what}") as (axes, buffer):
        times: dict[ModelName, dict[int, float]] = {"vim": {}, "deit": {}}
        for row in result.measurements:
            if row.milliseconds is not None:
                times[row.model][row.resolution] = row.milliseconds / result.settings.batch
        _draw_models(axes, result, times, palette, unit="milliseconds an image")
        crossing = result.crossing_px()
        if crossing is not None:
            axes.axvline(crossing, color=palette.text, linewidth=1, linestyle=":")
            axes.annotate(
                f"Vim faster from\nabout {crossing:.0f} px on",
                (crossing, 0.97),
                xycoords=("data", "axes fraction"),
                xytext=(7, 0),
                textcoords="offset points",
                va="top",
                fontsize=9,
                color=palette.text,
            )
        _name_last_ratio(axes, result, times, palette, "faster")
    return buffer.getvalue()


def plot_memory(result: "EfficiencyResult", theme: Theme = "light") -> bytes:
    """Plot the peak memory of one pass over the resolution."""
    palette = PALETTES[theme]
    with chart(theme, f"Peak memory, batch {result.settings.batch}") as (axes, buffer):
        peaks: dict[ModelName, dict[int, float]] = {"vim": {}, "deit": {}}
        for row in result.measurements:
            if row.peak_memory_gib is not None:
                peaks[row.model][row.resolution] = row.peak_memory_gib * 1024
        _draw_models(axes, result, peaks, palette, unit="MiB")
        _name_last_ratio(axes, result, peaks, palette, "less")
    return buffer.getvalue()


def _draw_models(
    axes: "Axes",
    result: "EfficiencyResult",
    values: dict[ModelName, dict[int, float]],
    palette: Palette,
    *,
    unit: str,
) -> None:
    for model, name in result.names.items():
        curve = values[model]
        color = getattr(palette, model)
        axes.plot(
            list(curve),
            list(curve.values()),
            _LINES[model],
            color=color,
            linewidth=2.2,
            markersize=6,
            label=name,
        )
        failed = [
            row.resolution
            for row in result.measurements
            if row.model == model and row.status == "out of memory"
        ]
        for side in failed:
            axes.annotate(
                f"{name}\nout of\nmemory",
                (side, 0.9),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="top",
                fontsize=9,
                color=color,
            )
    use_log_scale(axes)
    axes.set_xticks(
        result.settings.resolutions, [str(side) for side in result.settings.resolutions]
    )
    axes.set_xlabel("image side, pixels")
    axes.set_ylabel(unit)
    axes.legend(frameon=False, labelcolor=palette.text, loc="upper left", fontsize=10)


def _name_last_ratio(
    axes: "Axes",
    result: "EfficiencyResult",
    values: dict[ModelName, dict[int, float]],
    palette: Palette,
    word: str,
) -> None:
    both = sorted(values["vim"].keys() & values["deit"].keys())
    if not both:
        return
    side = both[-1]
    low, high = sorted((values["vim"][side], values["deit"][side]))
    who = "Vim" if values["vim"][side] == low else "DeiT"
    axes.annotate(
        "",
        (side, low),
        xytext=(side, high),
        arrowprops={"arrowstyle": "->", "color": palette.text, "linewidth": 1.2},
    )
    axes.text(
        0.99,
        0.05,
        f"at {side} px: {who} {high / low:.2f}x {word}",
        transform=axes.transAxes,
        ha="right",
        fontsize=10,
        fontweight="bold",
        color=palette.text,
    )
