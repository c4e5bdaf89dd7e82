"""Pictures of a comparison in the manner of the paper's figures 1, 3 and 4: PNG, light or dark."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from visionmamba.bench.cases import ModelName
from visionmamba.bench.results import PAPER_CARD_GB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from visionmamba.bench.results import EfficiencyResult, Measurement

Theme = Literal["light", "dark"]


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours of one theme."""

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


class _Style(NamedTuple):
    """How a model is drawn; models differ in lightness, marker and line too."""

    light: str
    dark: str
    line: str


# Okabe and Ito's colours, lightened for the dark theme where they are too dark
_STYLES: dict[ModelName, _Style] = {
    "vim": _Style(PALETTES["light"].vim, PALETTES["dark"].vim, "o-"),
    "vim-lean": _Style("#56b4e9", "#9ad8ff", "v-"),
    "vim-mamba-ssm": _Style("#5b6770", "#c3ccd4", "P:"),
    "deit": _Style(PALETTES["light"].deit, PALETTES["dark"].deit, "s--"),
    "deit-eager": _Style("#b8860b", "#f0e442", "D:"),
    "deit-compile": _Style("#a03e78", "#e79cc7", "^--"),
    "deit-checkpoint": _Style("#009e73", "#3fd0a5", "X-."),
    "deit-window": _Style("#8c564b", "#d7a79c", "*-."),
}


@contextmanager
def chart(
    theme: Theme, title: str, *, height_inches: float = 3.9
) -> Iterator[tuple["Axes", io.BytesIO]]:
    """Give axes in the house style; the PNG is in the buffer when the block ends."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the plots need matplotlib; install it with: pip install 'visionmamba[train]'"
        ) from error

    palette = PALETTES[theme]
    figure = Figure(
        figsize=(6.0, height_inches),
        dpi=160,
        facecolor=palette.background,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=palette.background)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=palette.text, pad=12)
    axes.grid(color=palette.faint, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette.faint)
    axes.tick_params(which="both", colors=palette.text, labelsize=10, length=0)
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


def plot_speed(result: "EfficiencyResult", theme: Theme = "light") -> bytes:
    """Plot images per second over the resolution, with the crossing points named."""
    settings = result.settings
    what = "inference" if settings.mode == "infer" else "training step"
    what = "backbone and feature pyramid" if settings.pyramid else what
    what = what if settings.what == "classifiers" else f"{what} of {settings.what}"
    with _chart_of_models(result, theme, f"Speed, {what}, batch {settings.batch[0]}") as (
        axes,
        buffer,
    ):
        for model in settings.models:
            crossing = result.crossing_px(model) if model != result.first else None
            facts = _facts(result, model, result.time_ratio, "faster", crossing)
            _draw(axes, result, model, theme, lambda row: row.images_per_second, facts)
            if crossing is not None:
                color = getattr(_STYLES[model], theme)
                axes.axvline(crossing, color=color, linewidth=1.2, linestyle=":")
                axes.annotate(
                    f"{crossing:.0f} px",
                    (crossing, 0.03),
                    xycoords=("data", "axes fraction"),
                    xytext=(-2, 0),
                    textcoords="offset points",
                    rotation=90,
                    ha="right",
                    fontsize=8,
                    color=color,
                )
        axes.set_ylabel("images a second")
    return buffer.getvalue()


def plot_memory(result: "EfficiencyResult", theme: Theme = "light") -> bytes:
    """Plot the peak memory of one pass over the resolution."""
    color = PALETTES[theme].text
    settings = result.settings
    what = "" if settings.what == "classifiers" else f", {settings.what}"
    what += ", training" if what and settings.mode == "train" else ""
    title = f"Peak memory{what}, batch {settings.batch[0]}"
    with _chart_of_models(result, theme, title) as (axes, buffer):
        for model in result.settings.models:
            facts = _facts(result, model, result.memory_ratio, "less", None)
            _draw(axes, result, model, theme, lambda row: row.peak_memory_gb, facts)
        if any(not row.fits_paper_card for row in result.measurements):
            axes.axhline(PAPER_CARD_GB, color=color, linewidth=1, linestyle=":")
            axes.annotate(
                f"the paper's card, {PAPER_CARD_GB:.0f} GB",
                (0.01, PAPER_CARD_GB),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                fontsize=9,
                color=color,
            )
        axes.set_ylabel("GB")
    return buffer.getvalue()


@contextmanager
def _chart_of_models(
    result: "EfficiencyResult", theme: Theme, title: str
) -> Iterator[tuple["Axes", io.BytesIO]]:
    """Give axes over the resolution; a legend below names every model and what is said of it."""
    num_models = len(result.settings.models)
    with chart(theme, title, height_inches=3.6 + 0.22 * num_models) as (axes, buffer):
        yield axes, buffer
        use_log_scale(axes)
        sides = result.settings.resolutions
        axes.set_xticks(sides, [str(side) for side in sides])
        axes.set_xlabel("image side, pixels")
        axes.figure.legend(
            loc="outside lower left", frameon=False, labelcolor=PALETTES[theme].text, fontsize=9
        )


def _draw(
    axes: "Axes",
    result: "EfficiencyResult",
    model: ModelName,
    theme: Theme,
    value: "Callable[[Measurement], float | None]",
    facts: list[str],
) -> None:
    """Draw a model's curve; the legend says its facts and where it ran out of memory."""
    rows = [row for row in result.measurements if row.model == model]
    known = [(row.resolution, y) for row in rows if (y := value(row)) is not None]
    failed = [f"{row.resolution}" for row in rows if row.status == "out of memory"]
    facts = [*facts, *([f"out of memory at {', '.join(failed)} px"] if failed else [])]
    style, name = _STYLES[model], result.names[model]
    axes.plot(
        [side for side, _ in known],
        [y for _, y in known],
        style.line,
        color=getattr(style, theme),
        linewidth=2.2,
        markersize=6,
        label=f"{name}: {'; '.join(facts)}" if facts else name,
    )


def _facts(
    result: "EfficiencyResult",
    model: ModelName,
    ratio_of: "Callable[[Measurement], float | None]",
    word: str,
    crossing: float | None,
) -> list[str]:
    """Return how a model compares with the first one: the crossing, and the last ratio known."""
    rows = [row for row in result.measurements if row.model == model]
    ratios = [(row.resolution, ratio) for row in rows if (ratio := ratio_of(row)) is not None]
    if model == result.first or not ratios:
        return []
    first, (side, ratio) = result.names[result.first], ratios[-1]
    who, factor = (f"{first} ", ratio) if ratio >= 1 else ("", 1 / ratio)
    facts = [] if crossing is None else [f"{first} faster from about {crossing:.0f} px on"]
    return [*facts, f"{who}{factor:.2f}x {word} at {side} px"]
