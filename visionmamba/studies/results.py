"""What a study found: a row for each variant, differences with their signs, and the files.

Scores are shares from 0 to 1 in the files for machines, per cent in tables and sentences.
"""

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionmamba.bench.machine import Machine
from visionmamba.studies.jobs import Outcome
from visionmamba.training.checkpoint import replace_file

if TYPE_CHECKING:
    from rich.table import Table

    from visionmamba.studies.study import MetricTable, Study, Variant

_LEFT_TO_FILES = ("seeds", "parameters", "minutes", "GB")
"""Columns that a terminal has no room for."""
_DIFFERENCE = "difference"
_LABELS = {
    "accuracy": "top-1",
    "miou": "mIoU",
    "macc": "mAcc",
    "aacc": "aAcc",
    "box_ap": "box AP",
    "mask_ap": "mask AP",
}
_UNKNOWN = "-"
"""In a table of metrics: there was nothing to judge."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of a study."""

    variant: str
    """Name of the variant."""
    lr: float
    """Peak learning rate."""
    seed: int
    """Seed of everything random."""
    epochs: int
    """Length; the sweep's may be shorter than that of the runs that count."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The same score of several seeds, 0 to 1."""

    values: tuple[float, ...]
    """One a seed."""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of a seed (n - 1 in the denominator); None with one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {100 * self.deviation:.2f}"
        return f"{100 * self.mean:.2f}{spread}"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A variant's mean score minus another's."""

    other: str
    """The variant that is subtracted."""
    points: float
    """Per cent; negative when the other is ahead."""
    standard_error: float | None
    """Of the difference, from the deviations over seeds; None with one seed."""

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.2f}"
        return f"{self.points:+.2f}{error}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one variant came to at its best learning rate."""

    variant: str
    """Its name."""
    best_rate: float | None
    """Learning rate with the best mean of the sweep; None when no run of it has a result."""
    is_at_edge: bool
    """Whether that is the smallest or largest rate tried, so that a better one may lie outside."""
    validation: Scores | None
    """Score on the validation split; None when no run that counts is finished."""
    test: Scores | None
    """Score on the test split; None without one."""
    num_failed: int
    """Runs that count and have no result."""
    parameters: int
    """Parameters of the model."""
    minutes: float
    """Mean wall-clock time of a run that counts, beside the others that ran."""
    peak_memory_gb: float | None
    """Most memory of the GPU that a run that counts took, in 10^9 bytes; None on a CPU."""
    difference: Difference | None
    """On the test split where there is one, else on the validation split."""


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """The finished runs of a study, all of them or those so far."""

    study: "Study"
    """What was asked for."""
    machine: Machine
    """Where the last part of it ran."""
    outcomes: dict[Run, Outcome]
    """What each finished run came to."""

    def scores(
        self, runs: Sequence[Run], *, test: bool = False, metric: str | None = None
    ) -> Scores | None:
        """Returns the scores of those runs that have one; None when none has.

        Args:
            runs: trainings, finished or not.
            test: whether those on the test split are asked for.
            metric: another validation metric than the study's score.
        """
        name = self.test_score if test else metric or self.study.score
        found = [self.outcomes[run] for run in runs if run in self.outcomes]
        values = tuple(
            (one.test if test else one.metrics)[name]
            for one in found
            if name in (one.test if test else one.metrics)
        )
        return Scores(values=values) if values else None

    @property
    def test_score(self) -> str:
        """The score's name among the metrics of the test split."""
        return self.study.score.removeprefix("val_").removesuffix("_ema")

    def sweep(self, variant: "Variant") -> dict[float, Scores]:
        """Returns the scores at each learning rate of the sweep that has a result."""
        runs = self.study.sweep_of(variant)
        found = {
            lr: self.scores([run for run in runs if run.lr == lr])
            for lr in self.study.rates_of(variant)
        }
        return {lr: scores for lr, scores in found.items() if scores is not None}

    def best_rate(self, variant: "Variant") -> float | None:
        """Returns the learning rate with the best mean on the validation split of the sweep."""
        if not self.study.sweep_of(variant):
            return self.study.rates_of(variant)[0]
        found = self.sweep(variant)
        return max(found, key=lambda lr: found[lr].mean) if found else None

    def runs_that_count(self, variant: "Variant") -> list[Run]:
        """Returns the finished runs of a variant at its best rate and whole length."""
        best = self.best_rate(variant)
        runs = [] if best is None else self.study.runs_at(variant, best)
        return [run for run in runs if run in self.outcomes]

    def row(self, variant: "Variant") -> Row:
        """Returns what a variant came to."""
        runs = self.runs_that_count(variant)
        finished = [self.outcomes[run] for run in runs if self.outcomes[run].failure is None]
        best, rates = self.best_rate(variant), self.study.rates_of(variant)
        return Row(
            variant=variant.name,
            best_rate=best,
            is_at_edge=len(rates) > 1 and best in (min(rates), max(rates)),
            validation=self.scores(runs),
            test=self.scores(runs, test=True),
            num_failed=len(runs) - len(finished),
            parameters=max((one.parameters for one in finished), default=0),
            minutes=statistics.fmean(one.seconds for one in finished) / 60 if finished else 0.0,
            peak_memory_gb=max(
                (one.peak_memory_gb for one in finished if one.peak_memory_gb is not None),
                default=None,
            ),
            difference=self._difference(variant),
        )

    def rows(self) -> list[Row]:
        """Returns a row for each variant, in their order."""
        return [self.row(variant) for variant in self.study.variants]

    def _difference(self, variant: "Variant") -> Difference | None:
        if variant.compared_with is None:
            return None
        other = self.study.variant(variant.compared_with)
        is_tested = self.study.test_split is not None
        first = self.scores(self.runs_that_count(variant), test=is_tested)
        second = self.scores(self.runs_that_count(other), test=is_tested)
        if first is None or second is None:
            return None
        error = None
        if first.deviation is not None and second.deviation is not None:
            variances = (
                first.deviation**2 / len(first.values),
                second.deviation**2 / len(second.values),
            )
            error = 100 * math.sqrt(sum(variances))
        points = 100 * (first.mean - second.mean)
        return Difference(other=other.name, points=points, standard_error=error)

    def sentences(self) -> list[str]:
        """Says who is ahead of whom and by how much, whichever it is, and what is wanting."""
        said = []
        split = "validation" if self.study.test_split is None else self.study.test_split
        for row in self.rows():
            if row.difference is not None:
                points, other = row.difference.points, row.difference.other
                side = "above" if points > 0 else "below" if points < 0 else "equal to"
                said.append(
                    f"{row.variant} is {abs(points):.2f} points {side} {other} "
                    f"({label_of(self.test_score)}, {split} split{_spread_of(row.difference)})."
                )
            if row.is_at_edge:
                said.append(
                    f"The best learning rate of {row.variant}, {row.best_rate:g}, is at the edge "
                    "of those tried; a better one may lie outside."
                )
            if row.num_failed:
                said.append(f"{row.num_failed} runs of {row.variant} ended without a finite loss.")
            if row.validation is None:
                said.append(f"{row.variant} has no result.")
        failed = [run for run, outcome in self.outcomes.items() if outcome.failure is not None]
        if failed:
            places = ", ".join(f"{run.variant} at {run.lr:g}" for run in failed)
            said.append(f"The loss was not finite in {len(failed)} runs: {places}.")
        if self.study.test_split is None and self.study.has_sweep:
            said.append("The validation split also chose the learning rates.")
        return said

    def save(self, *, pictures: bool = True) -> list[Path]:
        """Writes JSON, CSV and Markdown into the study's folder, and the pictures; returns them."""
        from visionmamba.bench.plots import PALETTES
        from visionmamba.studies.plots import plot_curves, plot_rates

        folder, name = self.study.out, self.study.name
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            folder / f"{name}.json": json.dumps(self.to_dict(), indent=2, default=str) + "\n",
            folder / f"{name}.csv": self.to_csv(),
            folder / f"{name}.md": self.to_markdown(),
        }
        for path, text in texts.items():
            _replace(path, text.encode())
        paths = list(texts)
        if pictures:
            plots = {"curves": plot_curves}
            plots |= {"rates": plot_rates} if self.study.has_sweep else {}
            for what, plot in plots.items():
                for theme in PALETTES:
                    paths.append(folder / f"{name}_{what}_{theme}.png")
                    _replace(paths[-1], plot(self, theme))
        return paths

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON-ready values."""
        return {
            "study": self.study.to_dict(),
            "machine": asdict(self.machine),
            "rows": [
                asdict(row) | {"paper": dict(variant.paper)}
                for row, variant in zip(self.rows(), self.study.variants, strict=True)
            ],
            "runs": [asdict(run) | asdict(outcome) for run, outcome in self._ordered()],
            "sentences": self.sentences(),
        }

    def to_csv(self) -> str:
        """Returns one line for each finished run, metrics of the validation split first."""
        ordered = self._ordered()
        metrics = list(dict.fromkeys(name for _, one in ordered for name in one.metrics))
        tested = list(dict.fromkeys(name for _, one in ordered for name in one.test))
        plain = ("steps", "seconds", "images_per_second", "parameters", "peak_memory_gb", "failure")
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        tests = [f"test_{name}" for name in tested]
        writer.writerow(["variant", "lr", "seed", "epochs", *metrics, *tests, *plain])
        for run, one in ordered:
            values = [one.metrics.get(name, "") for name in metrics]
            values += [one.test.get(name, "") for name in tested]
            rest = ["" if (value := getattr(one, name)) is None else value for name in plain]
            writer.writerow([run.variant, run.lr, run.seed, run.epochs, *values, *rest])
        return file.getvalue()

    def to_markdown(self) -> str:
        """Returns the table for a document, with its circumstances below."""
        headings, *rows = self._cells()
        blocks = [_markdown_table(headings, rows)]
        for table in self.study.tables:
            headings, *rows = self._metric_cells(table)
            blocks.append(f"{table.title}, validation:\n\n{_markdown_table(headings, rows)}")
        notes = " ".join((self._schedule(), *self.study.notes, *self.sentences()))
        return "\n\n".join((*blocks, f"{notes} {self.machine.sentence()}\n"))

    def to_table(self) -> "Table":
        """Returns the table for the terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        headings, *rows = self._cells()
        table = Table(
            box=SIMPLE_HEAD, pad_edge=False, title=self.study.title, caption=self._schedule()
        )
        shown = [heading not in _LEFT_TO_FILES for heading in headings]
        for heading in compress(headings, shown):
            is_text = heading == "variant"
            table.add_column(heading.replace(" ", "\n"), justify="left" if is_text else "right")
        for row in rows:
            cells = (
                cell.partition(" to ")[0] if heading == _DIFFERENCE else cell
                for heading, cell in zip(headings, row, strict=True)
            )
            table.add_row(*compress(cells, shown))
        return table

    def metric_tables(self) -> "list[Table]":
        """Returns the study's tables of further metrics for the terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        tables = []
        for metrics in self.study.tables:
            headings, *rows = self._metric_cells(metrics)
            table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"{metrics.title}, validation")
            for heading in headings:
                table.add_column(heading, justify="left" if heading == "variant" else "right")
            for row in rows:
                table.add_row(*row)
            tables.append(table)
        return tables

    def _schedule(self) -> str:
        study = self.study
        which, _, average = study.judged.partition("_")
        weights = "averaged weights" if average else "weights"
        said = f"{study.epochs} epochs, {weights} of the {which} one"
        if study.has_sweep:
            grids: dict[str, list[str]] = {}
            for variant in study.variants:
                rates = ", ".join(f"{lr:g}" for lr in study.rates_of(variant))
                grids.setdefault(rates, []).append(variant.name)
            tried = list(grids)
            if len(grids) > 1:
                tried = [f"{rates} ({' and '.join(names)})" for rates, names in grids.items()]
            said += f"; learning rates {'; '.join(tried)} tried for {study.short_epochs} epochs"
        return f"{said}; mean ± standard deviation over seeds, per cent."

    def _cells(self) -> list[tuple[str, ...]]:
        """Returns the headings and a row for each variant."""
        study, rows = self.study, self.rows()
        paper = list(dict.fromkeys(name for variant in study.variants for name in variant.paper))
        label = label_of(self.test_score)
        columns: dict[str, list[str]] = {
            "variant": [row.variant for row in rows],
            "learning rate": [
                "" if row.best_rate is None else f"{row.best_rate:g}" for row in rows
            ],
            f"{label}, validation": [str(row.validation or "") for row in rows],
        }
        if study.test_split is not None:
            columns[f"{label}, {study.test_split}"] = [str(row.test or "") for row in rows]
        columns["seeds"] = [
            str(len(row.validation.values) if row.validation else 0) for row in rows
        ]
        if any(row.difference for row in rows):
            columns[_DIFFERENCE] = [
                f"{row.difference} to {row.difference.other}" if row.difference else ""
                for row in rows
            ]
        columns["parameters"] = [f"{row.parameters:,}" if row.parameters else "" for row in rows]
        columns["minutes"] = [f"{row.minutes:.1f}" if row.minutes else "" for row in rows]
        if any(row.peak_memory_gb is not None for row in rows):
            columns["GB"] = [
                "" if row.peak_memory_gb is None else f"{row.peak_memory_gb:.2f}" for row in rows
            ]
        for name in paper:
            columns[f"paper, {name}"] = [one.paper.get(name, "") for one in study.variants]
        return [tuple(columns), *zip(*columns.values(), strict=True)]

    def _metric_cells(self, table: "MetricTable") -> list[tuple[str, ...]]:
        """Returns the headings, a row for each variant, and the paper's rows below."""
        ours, paper = [], []
        for variant in self.study.variants:
            runs = self.runs_that_count(variant)
            found = [self.scores(runs, metric=name) for name in table.metrics.values()]
            ours.append((variant.name, *(str(one or _UNKNOWN) for one in found)))
            names = [name.removesuffix("_ema") for name in table.metrics.values()]
            numbers = [variant.paper_metrics.get(name, "") for name in names]
            if any(numbers):
                paper.append((f"{variant.name}, paper", *numbers))
        return [("variant", *table.metrics), *ours, *paper]

    def _ordered(self) -> list[tuple[Run, Outcome]]:
        names = [variant.name for variant in self.study.variants]
        return sorted(
            self.outcomes.items(),
            key=lambda item: (
                names.index(item[0].variant),
                item[0].epochs,
                item[0].lr,
                item[0].seed,
            ),
        )


def label_of(score: str) -> str:
    """Returns a metric's name as papers write it."""
    return _LABELS.get(score, score)


def _spread_of(difference: Difference) -> str:
    if difference.standard_error is None:
        return ", one seed"
    return f", standard error {difference.standard_error:.2f}"


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(map(_in_markdown, row))} |" for row in rows]
    return "\n".join((f"| {' | '.join(headings)} |", "|---" * len(headings) + "|", *lines))


def _in_markdown(cell: str) -> str:
    return cell.replace("|", "\\|")


def _replace(path: Path, content: bytes) -> None:
    replace_file(path, lambda file: file.write(content))
