"""Trains Vim and DeiT on handwritten digits, measures both on one picture and writes the report.

Every step leaves its result in a file; a second run takes what is there and says so.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from visionmamba.bench.cases import ModelName
from visionmamba.bench.efficiency import Efficiency
from visionmamba.bench.machine import Machine, describe_machine
from visionmamba.bench.results import EfficiencyResult
from visionmamba.bench.tables import to_table
from visionmamba.demo.report import Contender, Digit, Report

if TYPE_CHECKING:
    from rich.console import Console

    from visionmamba.data import ImageSet, ImageSplits
    from visionmamba.recipes import Recipe
    from visionmamba.training import FitResult

_MODELS: tuple[ModelName, ...] = ("vim", "deit")
_NAMES: dict[ModelName, str] = {"vim": "Vim", "deit": "DeiT"}
_SAME_MACHINE = ("processor", "accelerator", "num_cores", "num_threads", "commit")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small Vim beside a DeiT of equal parameters on real digits and write a report."""

    out: Path = Path("runs/demo")
    """Folder for both runs, the measurements and report.html."""
    fresh: bool = False
    """Train and measure anew instead of taking up what `out` holds."""
    seed: int = 0
    """Seed of both trainings."""
    epochs: int | None = None
    """Passes over the training images; None takes the recipes' own number."""
    resolutions: tuple[int, ...] = (224, 384, 512, 768, 1024)
    """Sides in pixels at which Vim-Ti and DeiT-Ti are measured."""
    repeats: int = 5
    """Timed passes of each measurement."""

    def __post_init__(self) -> None:
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1; got {self.epochs}")
        self._efficiency(None)  # checks resolutions and repeats before anything is trained

    def run(self) -> Path:
        """Train, predict, measure and return the path of the report.

        Raises:
            ImportError: the [train] extra is not installed.
            ValueError: `out` holds runs with other options, and `fresh` is not set.
        """
        from rich.console import Console

        from visionmamba.data import Digits

        console = Console()
        splits = Digits().build()  # before anything is written: the extra may be missing
        self.out.mkdir(parents=True, exist_ok=True)
        if self.fresh:
            for name in (*_MODELS, "efficiency"):
                shutil.rmtree(self.out / name, ignore_errors=True)
        console.rule("training Vim and DeiT on handwritten digits")
        results = self._train(console)
        console.rule("classifying the test digits")
        test = splits.val
        answers = {model: self._classify(model, test, console) for model in _MODELS}
        console.rule("measuring Vim-Ti and DeiT-Ti on this machine")
        efficiency = self._measure(console)
        report = Report(
            vim=self._contender("vim", results["vim"], answers["vim"], splits),
            deit=self._contender("deit", results["deit"], answers["deit"], splits),
            digits=_digits(test, answers["vim"].labels, answers["deit"].labels),
            efficiency=efficiency,
            machine=describe_machine("cpu", command=self.command),
        )
        path = self.out / "report.html"
        _write_whole(path, report.to_html())
        console.print(f"\nThe report is written: {path.resolve().as_uri()}", style="bold")
        return path

    @property
    def command(self) -> str:
        """The command that repeats the demonstration from the beginning."""
        words = ["visionmamba demo --fresh"]
        for name in ("out", "seed", "epochs"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                words.append(f"--{name} {getattr(self, name)}")
        return " ".join(words)

    def _recipe(self, model: ModelName) -> "Recipe":
        from visionmamba.recipes import digits_deit, digits_vim

        recipes: dict[ModelName, Callable[[], Recipe]] = {"vim": digits_vim, "deit": digits_deit}
        recipe = replace(recipes[model](), seed=self.seed)
        return recipe if self.epochs is None else replace(recipe, epochs=self.epochs)

    def _train_arguments(self, model: ModelName) -> list[str]:
        arguments = ["train", self._recipe(model).name, "--seed", str(self.seed)]
        if self.epochs is not None:
            arguments += ["--epochs", str(self.epochs)]
        return [*arguments, "--device", "cpu", "--out", str(self.out / model)]

    def _train(self, console: "Console") -> "dict[ModelName, FitResult]":
        """Train what is not finished, both models at the same time with one thread each."""
        due = [model for model in _MODELS if not (self.out / model / "results.json").exists()]
        for model in _MODELS:
            if model not in due:
                console.print(f"{self.out / model} is finished and taken; --fresh trains anew")
        runs = [_Training(self._train_arguments(model), console) for model in due]
        complaints = [complaint for run in runs if (complaint := run.wait())]
        if complaints:
            raise ValueError(f"{complaints[0]}; --fresh trains anew")
        return {model: self._result(model) for model in _MODELS}

    def _result(self, model: ModelName) -> "FitResult":
        from visionmamba.training import fit

        try:
            return fit(self._recipe(model), self.out / model, device="cpu")
        except ValueError as error:  # a run of another recipe is in the folder
            raise ValueError(f"{error}; --fresh trains anew") from error

    def _classify(self, model: ModelName, test: "ImageSet", console: "Console") -> "_Answers":
        from visionmamba.tasks import Classifier

        classifier = Classifier.load(self.out / model / "last.safetensors", device="cpu")
        pictures = [test.image(index) for index in range(len(test))]
        classifier(pictures[:64], top_k=1)  # warm up
        begin = time.perf_counter()
        answers = classifier(pictures, top_k=1)
        seconds = time.perf_counter() - begin
        labels = tuple(answer.label for answer in answers)
        right = sum(
            test.class_names[i] == label for i, label in zip(test.labels, labels, strict=True)
        )
        console.print(f"{_NAMES[model]}: {right} of {len(pictures)} right", highlight=False)
        return _Answers(labels, right / len(pictures), len(pictures) / seconds)

    def _contender(
        self, model: ModelName, result: "FitResult", answers: "_Answers", splits: "ImageSplits"
    ) -> Contender:
        from visionmamba.training import read_metrics

        return Contender(
            name=_NAMES[model],
            command=shlex.join(["visionmamba", *self._train_arguments(model)]),
            accuracy=answers.accuracy,
            parameters=result.parameters,
            epochs=result.epochs,
            seconds=result.seconds,
            train_images_per_second=result.images_per_second,
            predict_images_per_second=answers.images_per_second,
            num_train_images=len(splits.train),
            num_test_images=len(splits.val),
            metrics=tuple(read_metrics(self.out / model / "metrics.csv")),
        )

    def _efficiency(self, image: Path | None) -> Efficiency:
        return Efficiency(
            size="tiny",
            resolutions=self.resolutions,
            device="cpu",
            repeats=self.repeats,
            image=image,
            out=self.out / "efficiency",
        )

    def _measure(self, console: "Console") -> EfficiencyResult:
        settings = self._efficiency(_china_picture())
        machine = describe_machine("cpu", command=settings.command)
        result = _measured_before(self.out / "efficiency", settings, machine)
        if result is not None:
            console.print(f"measured before, {result.machine.date}, and taken; --fresh repeats it")
        else:
            result = settings.measure(console)
            result.save(self.out / "efficiency")
        console.print(to_table(result))
        console.print(result.sentence())
        return result


class _Training:
    """A training in a process of its own, its progress shown line by line."""

    def __init__(self, arguments: list[str], console: "Console") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "visionmamba", *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # small products: two threads gain nothing
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._last_line = ""
        self._reader = threading.Thread(target=self._show, args=(console,), daemon=True)
        self._reader.start()

    def wait(self) -> str | None:
        """Wait for the end; return what the process complained of, None when all went well."""
        try:
            code = self._process.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches the process too, and it saves a checkpoint
            self._process.wait()
            raise
        self._reader.join()  # closes the pipe
        return self._last_line.removeprefix("visionmamba: ") if code else None

    def _show(self, console: "Console") -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._last_line = line.strip()
                console.print(self._last_line, highlight=False, markup=False)


class _Answers(NamedTuple):
    """What one model said about the test images."""

    labels: tuple[str, ...]
    accuracy: float
    images_per_second: float


def _digits(test: "ImageSet", vim: tuple[str, ...], deit: tuple[str, ...]) -> tuple[Digit, ...]:
    truths = (test.class_names[label] for label in test.labels)
    return tuple(
        Digit(picture=test.image(index), truth=truth, vim=vim_label, deit=deit_label)
        for index, (truth, vim_label, deit_label) in enumerate(zip(truths, vim, deit, strict=True))
    )


def _measured_before(
    folder: Path, settings: Efficiency, machine: Machine
) -> EfficiencyResult | None:
    """The result in a folder, when it answers the same question on the same machine and code."""
    for path in sorted(folder.glob("efficiency_*.json")):
        record: dict[str, Any] = json.loads(path.read_text())
        try:
            result = EfficiencyResult.from_dict(record)
        except (KeyError, TypeError):  # another version of this package wrote it
            continue
        then, now = asdict(result.machine), asdict(machine)
        same = all(then[name] == now[name] for name in (*_SAME_MACHINE, "versions"))
        if same and result.settings == settings:
            return result
    return None


def _china_picture() -> Path:
    """The photograph china.jpg, 640x427, that scikit-learn brings along."""
    from importlib.resources import files

    return Path(str(files("sklearn.datasets.images") / "china.jpg"))


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there in full or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
