"""The comparison of Vim and DeiT as a table, for the terminal and for documents."""

from typing import TYPE_CHECKING

from visionmamba.bench.cases import ModelName

if TYPE_CHECKING:
    from rich.table import Table

    from visionmamba.bench.efficiency import EfficiencyResult, Measurement

_MODELS: tuple[ModelName, ...] = ("vim", "deit")


def to_table(result: "EfficiencyResult") -> "Table":
    """Return the comparison as a table for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    vim, deit = result.names["vim"], result.names["deit"]
    settings = result.settings
    what = "forward" if settings.mode == "infer" else "forward + backward"
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=f"{vim} and {deit}, {what}, batch {settings.batch}, {settings.precision}",
        caption=f"{result.machine.accelerator or result.machine.processor}, "
        f"{result.machine.num_threads} threads, torch {result.machine.versions['torch']}, "
        f"{result.machine.date}",
    )
    for heading in ("side\npx", "tokens", f"{vim}\nms", f"{deit}\nms", "DeiT/Vim\ntime"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in (f"{vim}\nMiB", f"{deit}\nMiB", "DeiT/Vim\nmemory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for side in settings.resolutions:
        rows = [result.measurement(model, side) for model in _MODELS]
        table.add_row(
            str(side),
            str(rows[0].num_tokens),
            *(_time_cell(row) for row in rows),
            _ratio_cell(result.speedup(side)),
            *(_memory_cell(row) for row in rows),
            _ratio_cell(result.memory_ratio(side)),
        )
    return table


def to_markdown(result: "EfficiencyResult") -> str:
    """Return the comparison as a table for a document, with its circumstances below."""
    vim, deit = result.names["vim"], result.names["deit"]
    lines = [
        f"| side, px | tokens | {vim}, ms | {deit}, ms | time DeiT/Vim "
        f"| {vim}, MiB | {deit}, MiB | memory DeiT/Vim |",
        "|---" * 8 + "|",
    ]
    for side in result.settings.resolutions:
        rows = [result.measurement(model, side) for model in _MODELS]
        cells = (
            str(side),
            str(rows[0].num_tokens),
            *map(_time_cell, rows),
            _ratio_cell(result.speedup(side)),
            *map(_memory_cell, rows),
            _ratio_cell(result.memory_ratio(side)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join((*lines, "", f"{result.machine.sentence()} {result.sentence()}", ""))


def _time_cell(row: "Measurement") -> str:
    if row.milliseconds is None or row.milliseconds_low is None or row.milliseconds_high is None:
        return row.status
    spread = (row.milliseconds_high - row.milliseconds_low) / 2
    digits = 1 if row.milliseconds < 100 else 0
    return f"{row.milliseconds:.{digits}f} ±{spread:.{digits}f}"


def _memory_cell(row: "Measurement") -> str:
    if row.peak_memory_gib is None:
        return row.status if row.status != "ok" else "not measured"
    return f"{row.peak_memory_gib * 1024:,.0f}"


def _ratio_cell(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
