"""metrics.csv: a row for some training steps and each validation, whole after an interruption."""

import csv
import io
from pathlib import Path

STEP_COLUMNS = ("step", "epoch", "lr", "train_loss", "gradient_norm")


class MetricsFile:
    """Appends rows that survive the death of the process at once; holds no clock times.

    A resumed run drops the rows after its checkpoint, so its file equals that of an unbroken run.
    """

    def __init__(self, path: Path, *, metric_names: tuple[str, ...], last_step: int) -> None:
        """Opens the file for rows after last_step, 0 for a run that has just begun."""
        self._columns = (*STEP_COLUMNS, *metric_names)
        rows = [row for row in read_metrics(path) if row["step"] <= last_step] if last_step else []
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(
            ",".join(self._columns) + "\n" + "".join(map(self._line, rows)), encoding="utf-8"
        )
        temporary.replace(path)
        self._path = path

    def append(self, row: dict[str, float]) -> None:
        """Adds a row; columns it lacks stay empty."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(self._line(row))

    def _line(self, row: dict[str, float]) -> str:
        line = io.StringIO()
        values = [f"{row[name]:.9g}" if name in row else "" for name in self._columns]
        csv.writer(line, lineterminator="\n").writerow(values)
        return line.getvalue()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Returns the rows of a metrics.csv; empty cells are left out, so is a half-written last row.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    whole_lines = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole_lines))
    return [{name: float(cell) for name, cell in row.items() if cell} for row in reader]
