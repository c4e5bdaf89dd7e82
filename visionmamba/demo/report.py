"""The report of the demonstration: one HTML file with nothing from outside, for any screen."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from visionmamba.bench.machine import Machine
from visionmamba.bench.plots import PALETTES, Theme, chart, plot_memory, plot_speed, use_log_scale
from visionmamba.bench.results import EfficiencyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

_NUM_SHOWN_DIGITS = 44


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One trained model as the report shows it."""

    name: str
    """Vim or DeiT."""
    command: str
    """The command that trains it alone."""
    accuracy: float
    """Share of the test images classified rightly after the last epoch, 0 to 1."""
    parameters: int
    """Learned numbers."""
    epochs: int
    """Passes over the training images."""
    seconds: float
    """Training with the test after each epoch."""
    train_images_per_second: float
    """Images learned from in a second."""
    predict_images_per_second: float
    """Images classified in a second, preprocessing included."""
    num_train_images: int
    """Size of the training split."""
    num_test_images: int
    """Size of the test split."""
    metrics: tuple[Mapping[str, float], ...]
    """Rows of metrics.csv; missing cells left out."""

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Return epochs, from 1, and the mean of a metric over each epoch's rows."""
        values: dict[int, list[float]] = {}
        for row in self.metrics:
            if name in row:
                values.setdefault(int(row["epoch"]), []).append(row[name])
        epochs = sorted(values)
        return [float(e) for e in epochs], [sum(values[e]) / len(values[e]) for e in epochs]


@dataclass(frozen=True, kw_only=True)
class Digit:
    """One test image and what both models said."""

    picture: "Image"
    """8x8 pixels, gray."""
    truth: str
    """The right class."""
    vim: str
    """Vim's answer."""
    deit: str
    """DeiT's answer."""

    @property
    def is_right(self) -> bool:
        """Whether both answers are right."""
        return self.truth == self.vim == self.deit


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that report.html shows."""

    vim: Contender
    """The small Vim."""
    deit: Contender
    """The DeiT of equal parameters."""
    digits: tuple[Digit, ...]
    """All test images."""
    efficiency: EfficiencyResult
    """Vim-Ti and DeiT-Ti over the resolution."""
    machine: Machine
    """Where the report was made."""

    def to_html(self) -> str:
        """Return the page."""
        largest = self.efficiency.settings.resolutions[-1]
        template = files("visionmamba.demo").joinpath("report.html").read_text(encoding="utf-8")
        return Template(template).substitute(
            processor=_text(self.machine.processor),
            num_threads=self.machine.num_threads,
            date=_text(self.machine.date),
            cards=self._cards(),
            num_train=f"{self.vim.num_train_images:,}",
            num_test=f"{self.vim.num_test_images:,}",
            epochs=self.vim.epochs,
            accuracy_picture=_picture(self._plot_accuracy, "Test accuracy over the epochs"),
            loss_picture=_picture(self._plot_loss, "Training loss over the epochs"),
            contenders=self._contender_table(),
            num_shown=_NUM_SHOWN_DIGITS,
            digits="".join(map(_digit, self.digits[:_NUM_SHOWN_DIGITS])),
            mistakes_title=_text(self._mistakes_title()),
            mistakes=self._mistakes(),
            efficiency_sentence=_text(self.efficiency.sentence()),
            memory_sentence=_text(self._memory_sentence(largest)),
            speed_picture=_picture(lambda theme: plot_speed(self.efficiency, theme), "Speed"),
            memory_picture=_picture(lambda theme: plot_memory(self.efficiency, theme), "Memory"),
            efficiency_table=self._efficiency_table(),
            precision=self.efficiency.precision,
            repeats=self.efficiency.settings.repeats,
            machine_facts=_facts(self.efficiency.machine),
            commands=_text(
                "\n".join(
                    (
                        self.machine.command,
                        self.vim.command,
                        self.deit.command,
                        self.efficiency.machine.command,
                    )
                )
            ),
        )

    def _cards(self) -> str:
        largest = self.efficiency.settings.resolutions[-1]
        speedup = self.efficiency.time_ratio(self.efficiency.measurement("deit", largest))
        cards = [
            ("Vim's test accuracy", f"{self.vim.accuracy:.1%}", f"DeiT {self.deit.accuracy:.1%}"),
            (
                "Vim learned in",
                _duration(self.vim.seconds),
                f"DeiT in {_duration(self.deit.seconds)}, no GPU",
            ),
        ]
        if speedup is not None:
            names = self.efficiency.names
            fast, slow = (names["vim"], names["deit"])
            if speedup < 1:
                fast, slow = slow, fast
            factor = max(speedup, 1 / speedup)
            cards.append((f"{fast} at {largest} px", f"{factor:.2f}x faster", f"than {slow}"))
        crossing = self.efficiency.crossing_px("deit")
        if crossing is not None:
            cards.append(("Vim-Ti overtakes", f"{crossing:.0f} px", "below that DeiT-Ti is faster"))
        return "".join(
            f'<div class="card"><p class="label">{_text(label)}</p>'
            f'<p class="value">{_text(value)}</p><p class="note">{_text(note)}</p></div>'
            for label, value, note in cards
        )

    def _contender_table(self) -> str:
        head = ("", "Test accuracy", "Parameters", "Training", "Learning", "Predicting")
        body = [
            (
                model.name,
                f"{model.accuracy:.2%}",
                f"{model.parameters:,}",
                _duration(model.seconds),
                f"{model.train_images_per_second:,.0f} images/s",
                f"{model.predict_images_per_second:,.0f} images/s",
            )
            for model in (self.vim, self.deit)
        ]
        return _table(head, body)

    def _mistakes_title(self) -> str:
        vim = sum(digit.vim != digit.truth for digit in self.digits)
        deit = sum(digit.deit != digit.truth for digit in self.digits)
        wrong = sum(not digit.is_right for digit in self.digits)
        which = "Every mistake" if wrong <= _NUM_SHOWN_DIGITS else f"{_NUM_SHOWN_DIGITS} mistakes"
        return f"{which}: of {len(self.digits)} digits Vim misread {vim}, DeiT {deit}"

    def _mistakes(self) -> str:
        wrong = [digit for digit in self.digits if not digit.is_right]
        return "".join(map(_digit, wrong[:_NUM_SHOWN_DIGITS]))

    def _memory_sentence(self, side: int) -> str:
        ratio = self.efficiency.memory_ratio(self.efficiency.measurement("deit", side))
        names = self.efficiency.names
        if ratio is None:
            return f"Peak memory at {side} px is not known for both."
        less, more = (names["vim"], names["deit"]) if ratio >= 1 else (names["deit"], names["vim"])
        factor = max(ratio, 1 / ratio)
        return f"At {side} px {less} needs {factor:.2f}x less memory than {more}."

    def _efficiency_table(self) -> str:
        result = self.efficiency
        vim, deit = result.names["vim"], result.names["deit"]
        head = (
            "Side",
            "Tokens",
            f"{vim}, ms",
            f"{deit}, ms",
            "Time ratio",
            f"{vim}, MB",
            f"{deit}, MB",
            "Memory ratio",
        )
        body = []
        for side in result.settings.resolutions:
            rows = [result.measurement("vim", side), result.measurement("deit", side)]
            body.append(
                (
                    f"{side} px",
                    f"{rows[0].num_tokens:,}",
                    *(_number(row.milliseconds, row.status) for row in rows),
                    _ratio(result.time_ratio(rows[1])),
                    *(
                        _number(row.peak_memory_gb and row.peak_memory_gb * 1000, row.status)
                        for row in rows
                    ),
                    _ratio(result.memory_ratio(rows[1])),
                )
            )
        return _table(head, body)

    def _plot_accuracy(self, theme: Theme) -> bytes:
        with chart(theme, "Test accuracy") as (axes, buffer):
            self._draw(axes, theme, "val_accuracy", scale=100)
            axes.set_ylim(max(0.0, axes.get_ylim()[0]), 101)
            axes.set_ylabel("percent")
            axes.legend(
                frameon=False, labelcolor=PALETTES[theme].text, loc="lower right", fontsize=10
            )
        return buffer.getvalue()

    def _plot_loss(self, theme: Theme) -> bytes:
        with chart(theme, "Training loss") as (axes, buffer):
            self._draw(axes, theme, "train_loss", scale=1)
            use_log_scale(axes)
            axes.set_ylabel("cross-entropy, mean of an epoch")
            axes.legend(
                frameon=False, labelcolor=PALETTES[theme].text, loc="upper right", fontsize=10
            )
        return buffer.getvalue()

    def _draw(self, axes: "Axes", theme: Theme, metric: str, *, scale: float) -> None:
        from matplotlib.ticker import MaxNLocator

        palette = PALETTES[theme]
        for model, color, line in ((self.vim, palette.vim, "-"), (self.deit, palette.deit, "--")):
            epochs, values = model.curve(metric)
            scaled = [value * scale for value in values]
            axes.plot(epochs, scaled, line, color=color, linewidth=2.2, label=model.name)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _digit(digit: Digit) -> str:
    """Draw one test image with its class and both answers, wrong ones marked in colour and sign."""
    answers = "".join(
        f'<span class="right">{name} {_text(answer)}</span>'
        if answer == digit.truth
        else f'<span class="wrong">{name} {_text(answer)} ✗</span>'
        for name, answer in (("Vim", digit.vim), ("DeiT", digit.deit))
    )
    truth = "" if digit.is_right else f"<b>is {_text(digit.truth)}</b>"
    alternative = f"handwritten {_text(digit.truth)}"
    return (
        f'<figure class="{"digit" if digit.is_right else "digit missed"}">'
        f'<img src="{_data_uri(_png(digit.picture))}" alt="{alternative}" width="64" height="64">'
        f"<figcaption>{truth}{answers}</figcaption></figure>"
    )


def _png(picture: "Image") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _picture(plot: Callable[[Theme], bytes], description: str) -> str:
    """Embed a plot twice; the reader's colour scheme chooses."""
    return (
        '<picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="{_data_uri(plot("dark"))}">'
        f'<img src="{_data_uri(plot("light"))}" alt="{_text(description)}"></picture>'
    )


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    cells = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    rows = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in body
    )
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _facts(machine: Machine) -> str:
    """List a machine as term and description."""
    facts = {
        "Processor": machine.processor,
        "Accelerator": machine.accelerator or "none used",
        "Cores, threads": f"{machine.num_cores}, {machine.num_threads}",
        "Memory": "unknown" if machine.memory_gib is None else f"{machine.memory_gib:.0f} GiB",
        "System": machine.system,
        "Versions": ", ".join(f"{name} {number}" for name, number in machine.versions.items()),
        "Commit": machine.commit or "not a checkout",
        "Measured": machine.date,
    }
    return "".join(f"<dt>{_text(term)}</dt><dd>{_text(fact)}</dd>" for term, fact in facts.items())


def _text(value: object) -> str:
    return html.escape(str(value))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _number(value: float | None, otherwise: str) -> str:
    if value is None:
        return otherwise if otherwise != "ok" else "not measured"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"
