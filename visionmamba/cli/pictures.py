"""What `eval` and `predict` share: which images are meant, and how one after another is told of."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from visionmamba.cli.messages import complain

if TYPE_CHECKING:
    from visionmamba.cli.use import Eval, Predict
    from visionmamba.tasks.sliding import Windows

    _Inference = TypeVar("_Inference", bound=Windows)


class Found(Protocol):
    """What a predictor says of a picture."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""

    def save(self, folder: str | Path, *, name: str | None = None) -> Path:
        """Writes files."""


_Answer = TypeVar("_Answer", bound=Found)


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Returns the files meant, those of folders sorted; ValueError for a folder without images."""
    from visionmamba.data import image_files_in

    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(image_files_in(path))
        if not inside:
            raise ValueError(f"folder {path} holds no images; give image files or a folder of them")
        files += inside
    return files


def check_out(out: Path, files: Sequence[Path]) -> None:
    """Raises ValueError where results could replace the images themselves."""
    if out.resolve() in {file.resolve().parent for file in files}:
        raise ValueError(
            f"--out {out} is the folder of the images, which results could replace; give another"
        )


def distinct_names(files: Sequence[Path], *, taken: Sequence[str] = ()) -> list[str]:
    """Returns the files' names without endings, numbered where several share one.

    Args:
        files: of the images.
        taken: names that other results have.
    """
    names = dict.fromkeys(taken)
    for file in files:
        stem = file.stem or "image"
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem}_{number}"
        names[name] = None
    return list(names)[len(taken) :]


def tell_each(
    options: "Predict",
    files: Sequence[Path],
    *,
    find: Callable[[Path], _Answer],
    text: Callable[[_Answer], str],
    taken: Sequence[str] = (),
) -> int:
    """Goes over files one after another, so that one picture is in memory at a time.

    Args:
        options: what to print and to write.
        files: of the images.
        find: asks the predictor.
        text: a line for the terminal.
        taken: names of result files that no image may get.

    Returns:
        The exit code.
    """
    from rich.console import Console
    from rich.progress import Progress

    from visionmamba.data import UnreadableImageError

    console = Console(stderr=True)
    num_found = 0
    with Progress(console=console, disable=not console.is_terminal, redirect_stdout=False) as bar:
        shares_terminal = console.is_terminal and sys.stdout.isatty()
        line = bar.add_task(f"{len(files)} images", total=len(files))
        for file, name in zip(files, distinct_names(files, taken=taken), strict=True):
            try:
                found = find(file)
            except UnreadableImageError as error:
                if options.on_unreadable == "fail":
                    raise
                complain(f"left out: {error}")
                bar.advance(line)
                continue
            if options.out is not None:
                found.save(options.out, name=name)
            told = _json_text(found, is_first=not num_found) if options.json else text(found)
            if shares_terminal:  # above the bar
                console.print(told, markup=False, highlight=False, soft_wrap=True)
            else:
                print(told, flush=True)
            num_found += 1
            bar.advance(line)
    if options.json:
        print("\n]" if num_found else "[]")
    return 0


def inference_of(
    options: "Eval | Predict",
    kind: "type[_Inference]",
    *,
    task: str,
    trained: str,
    names: Sequence[str],
    stride_share: float,
) -> "_Inference":
    """Returns how a model goes over images: as its weights say, changed as asked for.

    Args:
        options: of the command line.
        kind: what the task calls it.
        task, trained: as `TaskWeights.find` takes them.
        names: the options of `kind` that the command line has.
        stride_share: distance of windows whose size alone is given, as share of that.

    Raises:
        ValueError: the weights' header is damaged, or the options do not go together.
    """
    from visionmamba.tasks.task_weights import TaskWeights

    held = TaskWeights.find(options.weights, task=task, trained=trained)
    values = held.inference(kind).to_dict()
    given = {name: value for name in names if is_given(value := getattr(options, name, None))}
    values |= given
    if options.crop_size is not None and options.stride is None:
        values["stride"] = max(1, round(options.crop_size * stride_share))
    inference = kind.from_dict(values)
    for name in ("crop_size", "stride", "num_windows"):
        if inference.mode == "whole" and name in given:
            raise ValueError(f"--{name.replace('_', '-')} is for windows; add --mode slide")
    return inference


def is_given(value: object) -> bool:
    """Whether an option was given on the command line, by its value."""
    return value is not None and value is not False


def _json_text(found: Found, *, is_first: bool) -> str:
    text = json.dumps(found.to_dict(), indent=2, ensure_ascii=False)
    return ("[\n" if is_first else ",\n") + text
