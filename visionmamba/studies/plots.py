"""Pictures of a study: the score over the epochs, and over the learning rates of the sweep."""

import itertools
import statistics
from typing import TYPE_CHECKING

from visionmamba.bench.plots import Theme, chart
from visionmamba.studies.results import label_of
from visionmamba.training import read_metrics
from visionmamba.training.folder import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from visionmamba.studies.results import StudyResult
    from visionmamba.studies.study import Variant

# Okabe and Ito's colours, lightened for the dark theme where they are too dark
_COLORS: dict[Theme, tuple[str, ...]] = {
    "light": ("#0072b2", "#d55e00", "#009e73", "#a03e78", "#b8860b", "#56b4e9", "#5b6770"),
    "dark": ("#56b4e9", "#f0a04b", "#3fd0a5", "#e79cc7", "#f0e442", "#9ad8ff", "#c3ccd4"),
}
_LINES = ("-", "--", "-.", ":")
_MARKERS = "osDv^PX"


def plot_curves(result: "StudyResult", theme: Theme = "light") -> bytes:
    """Returns a PNG of the score on the validation split over the epochs.

    Each variant's mean over the seeds that count, the band from the lowest to the highest.
    """
    study = result.study
    height = 3.4 + 0.2 * len(study.variants)
    with chart(theme, study.title, height_inches=height) as (axes, buffer):
        for variant, color, line in _styled(study.variants, theme):
            epochs, curves = _curves_of(result, variant)
            if not curves:
                continue
            means = [100 * statistics.fmean(values) for values in curves]
            label = f"{variant.name} ({means[-1]:.1f} after the last epoch)"
            axes.plot(epochs, means, line, color=color, linewidth=1.8, label=label)
            lowest, highest = [100 * min(v) for v in curves], [100 * max(v) for v in curves]
            axes.fill_between(epochs, lowest, highest, color=color, alpha=0.15, linewidth=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"{label_of(result.test_score)}, validation, %")
        _name_curves(axes)
    return buffer.getvalue()


def plot_rates(result: "StudyResult", theme: Theme = "light") -> bytes:
    """Returns a PNG of the sweep: the score of each variant over the learning rates."""
    from matplotlib.ticker import NullFormatter

    study = result.study
    height = 3.4 + 0.2 * len(study.variants)
    title = f"Learning rates, {study.short_epochs} epochs"
    with chart(theme, title, height_inches=height) as (axes, buffer):
        markers = itertools.cycle(_MARKERS)
        for (variant, color, line), marker in zip(
            _styled(study.variants, theme), markers, strict=False
        ):
            found = sorted(result.sweep(variant).items())
            axes.plot(
                [lr for lr, _ in found],
                [100 * scores.mean for _, scores in found],
                line,
                marker=marker,
                color=color,
                linewidth=1.8,
                label=variant.name,
            )
        axes.set_xscale("log")
        rates = sorted({lr for variant in study.variants for lr in study.rates_of(variant)})
        axes.set_xticks(rates, [f"{lr:g}" for lr in rates])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel(f"{label_of(result.test_score)}, validation, %")
        _name_curves(axes)
    return buffer.getvalue()


def _name_curves(axes: "Axes") -> None:
    """Puts a legend below, once there is something to name."""
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(
            loc="outside lower left",
            frameon=False,
            fontsize=9,
            labelcolor=axes.xaxis.label.get_color(),
        )


def _styled(variants: "tuple[Variant, ...]", theme: Theme) -> "list[tuple[Variant, str, str]]":
    """Returns each variant with its colour and line."""
    colors, lines = itertools.cycle(_COLORS[theme]), itertools.cycle(_LINES)
    return list(zip(variants, colors, lines, strict=False))


def _curves_of(result: "StudyResult", variant: "Variant") -> tuple[list[int], list[list[float]]]:
    """Returns the epochs that all runs that count have, and in each the score of every seed that
    has a result."""
    score, curves = result.study.score, []
    for run in result.runs_that_count(variant):
        path = result.study.folder_of(run) / METRICS
        if result.outcomes[run].failure is None and path.is_file():
            rows = [row for row in read_metrics(path) if score in row]
            curves.append({int(row["epoch"]): row[score] for row in rows})
    if not curves:
        return [], []
    epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
    return epochs, [[curve[epoch] for curve in curves] for epoch in epochs]
