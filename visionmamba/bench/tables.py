"""The comparison of the models as a table, for the terminal and for documents."""

from itertools import compress
from typing import TYPE_CHECKING

from visionmamba.bench.results import DOES_NOT_FIT, PAPER_CARD_GB

if TYPE_CHECKING:
    from rich.table import Table

    from visionmamba.bench.results import EfficiencyResult, Measurement

_HEADINGS = (
    "side, px",
    "batch",
    "model",
    "ms",
    "images/s",
    "peak GB",
    "time ratio",
    "memory ratio",
    "error",
    "launch",
)
_TEXT_HEADINGS = ("model", "launch")

_MEASURED = "Medians; peak GB (10^9 bytes): weights, input and all that a pass allocates."
_ERROR = "Error: of the first two images' output, relative to the same model in float32."


def to_table(result: "EfficiencyResult") -> "Table":
    """Return the comparison as a table for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    settings, machine = result.settings, result.machine
    what = "forward" if settings.mode == "infer" else "forward + backward"
    what += ", feature pyramid" if settings.pyramid else ""
    if settings.what != "classifiers":
        head = settings.segmenter or settings.detector
        classes = "1 class" if settings.num_classes == 1 else f"{settings.num_classes} classes"
        what += f", {settings.what} ({head}, {classes})"
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=f"{what}, {result.precision}; ratios to {result.names[result.first]}",
        caption=f"{machine.accelerator or machine.processor}, {machine.num_threads} threads, "
        f"torch {machine.versions['torch']}, {machine.date}{_footnote(result)}",
    )
    headings, *rows = _rows(result)
    for heading in headings:
        is_text = heading in _TEXT_HEADINGS
        table.add_column(
            heading.replace(" ", "\n"),
            justify="left" if is_text else "right",
            no_wrap=heading != "model",
        )
    previous = None
    for row in rows:
        table.add_row(*(row if row[:2] != previous else ("", "", *row[2:])))
        previous = row[:2]
    return table


def to_markdown(result: "EfficiencyResult") -> str:
    """Return the comparison as a table for a document, with its circumstances below."""
    headings, *lines = [f"| {' | '.join(row)} |" for row in _rows(result)]
    lines = [headings, "|---" * (headings.count("|") - 1) + "|", *lines]
    first = result.names[result.first]
    notes = f"{_MEASURED} Ratios above 1 are in favour of {first}. {result.machine.sentence()}"
    if result.precision != "float32":
        notes = f"{_ERROR} {notes}"
    return "\n".join((*lines, "", f"{notes} {result.sentence()}{_footnote(result)}", ""))


def _rows(result: "EfficiencyResult") -> list[tuple[str, ...]]:
    """Return the headings and a row for each measurement, without columns that say nothing."""
    rows = [_cells(result, row) for row in result.measurements]
    said = [any(row[i] for row in rows) for i in range(len(_HEADINGS))]
    return [tuple(compress(row, said)) for row in (_HEADINGS, *rows)]


def _cells(result: "EfficiencyResult", row: "Measurement") -> tuple[str, ...]:
    is_first = row.model == result.first
    return (
        str(row.resolution),
        str(row.batch),
        result.names[row.model],
        _time_cell(row),
        "" if result.settings.what == "classifiers" else _speed_cell(row),
        _memory_cell(row),
        "" if is_first else _ratio_cell(result.time_ratio(row)),
        "" if is_first else _ratio_cell(result.memory_ratio(row)),
        "" if row.relative_error is None else f"{row.relative_error:.1e}",
        row.launch or "" if result.machine_kind == "cuda" else "",
    )


def _time_cell(row: "Measurement") -> str:
    if row.milliseconds is None or row.milliseconds_low is None or row.milliseconds_high is None:
        return row.status
    spread = (row.milliseconds_high - row.milliseconds_low) / 2
    digits = 2 if row.milliseconds < 10 else 1 if row.milliseconds < 100 else 0
    return f"{row.milliseconds:.{digits}f} ±{spread:.{digits}f}"


def _speed_cell(row: "Measurement") -> str:
    return "" if row.images_per_second is None else f"{row.images_per_second:.3g}"


def _memory_cell(row: "Measurement") -> str:
    if row.peak_memory_gb is None:
        return "" if row.status != "ok" else "not measured"
    return f"{row.peak_memory_gb:.3g}{'' if row.fits_paper_card else ' *'}"


def _ratio_cell(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _footnote(result: "EfficiencyResult") -> str:
    if all(row.fits_paper_card for row in result.measurements):
        return ""
    return f" * {DOES_NOT_FIT} ({PAPER_CARD_GB:.0f} GB)."
