"""metrics.csv and classes.csv: rows of steps and validations, whole after an interruption."""

import csv
import io
from pathlib import Path

ClassValues = dict[str, dict[str, float | None]]
"""Metrics of each class by name; None where one cannot be judged."""

STEP_COLUMNS = ("step", "epoch", "lr", "train_loss", "gradient_norm")


class MetricsFile:
    """Appends rows that survive the death of the process at once; holds no clock times.

    A resumed run drops the rows after its checkpoint, so its file equals that of an unbroken run.
    """

    def __init__(self, path: Path, *, metric_names: tuple[str, ...], last_step: int) -> None:
        """Opens the file for rows after last_step, 0 for a run that has just begun."""
        self._columns = (*STEP_COLUMNS, *metric_names)
        self._path = path
        rows = [row for row in read_metrics(path) if row["step"] <= last_step] if last_step else []
        _replace_lines(path, [list(self._columns), *map(self._cells, rows)])

    def append(self, row: dict[str, float]) -> None:
        """Adds a row; columns it lacks stay empty."""
        _append_lines(self._path, [self._cells(row)])

    def _cells(self, row: dict[str, float]) -> list[str]:
        return [f"{row[name]:.9g}" if name in row else "" for name in self._columns]


class ClassesFile:
    """classes.csv: a row for each class and validation, kept as MetricsFile keeps its rows.

    Its columns are step, epoch, class and the metrics of a class; empty where it cannot be judged.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        """Drops the rows after last_step; there is no file before the first row."""
        self._path = path
        header, *rows = _whole_lines(path) if last_step and path.exists() else [[]]
        kept = [row for row in rows if int(row[0]) <= last_step]
        if kept:
            _replace_lines(path, [header, *kept])
        else:
            path.unlink(missing_ok=True)

    def append(self, values: ClassValues, *, step: int, epoch: int) -> None:
        """Adds a validation; all classes must have the same metrics."""
        names = list(next(iter(values.values())))
        lines = [
            [f"{step}", f"{epoch}", class_name, *(_cell(of_class[name]) for name in names)]
            for class_name, of_class in values.items()
        ]
        if not self._path.exists():
            lines.insert(0, ["step", "epoch", "class", *names])
        _append_lines(self._path, lines)


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Returns the rows of a metrics.csv; empty cells are left out, so is a half-written last row.

    Raises:
        FileNotFoundError: there is no such file.
    """
    header, *rows = _whole_lines(path)
    return [
        {name: float(cell) for name, cell in zip(header, row, strict=True) if cell} for row in rows
    ]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.9g}"


def _whole_lines(path: str | Path) -> list[list[str]]:
    """Returns the cells of a file, without a last line that is half written."""
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    return list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))) or [[]]


def _append_lines(path: Path, lines: list[list[str]]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(_text(lines))


def _replace_lines(path: Path, lines: list[list[str]]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(_text(lines), encoding="utf-8")
    temporary.replace(path)


def _text(lines: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [" ".join(cell.splitlines()) for cell in line] for line in lines
    )
    return text.getvalue()
