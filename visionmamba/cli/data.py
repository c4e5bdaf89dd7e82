"""`visionmamba check`: whether pictures and masks can be used."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from visionmamba.cli.messages import EXIT_FAILED
from visionmamba.cli.options import parse

if TYPE_CHECKING:
    from visionmamba.data import ClassCounts, MaskReport

_MAX_PIXELS = 89_478_485  # data.MAX_PIXELS, without importing torch
_MAX_SHOWN_PROBLEMS = 20


@dataclass(frozen=True, kw_only=True)
class Check:
    """Which pictures and masks of a segmentation set cannot be used, and how much of it each class
    makes up. The exit code is 1 when something is wrong."""

    folder: tyro.conf.Positional[Path]
    """Folder of train/images, train/masks and a file of classes, of ADE20K, or of Cityscapes."""
    format: Literal["ade20k", "cityscapes", "folder"] | None = None
    """Which of them it is; by default the folders in it tell."""
    max_pixels: int = _MAX_PIXELS
    """Largest picture, width times height, that is opened."""
    num_workers: int = 0
    """Processes that open files beside the main one."""
    out: Path | None = None
    """Folder for classes.csv and problems.csv."""


def check(given: list[str]) -> int:
    """Runs `visionmamba check`."""
    options = parse(Check, given, prog="visionmamba check")
    if options.num_workers < 0:
        raise ValueError(f"--num-workers must be at least 0, got {options.num_workers}")
    from rich.console import Console
    from rich.progress import Progress

    from visionmamba.data import check_masks

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking", total=None)
        report = check_masks(
            options.folder,
            format=options.format,
            max_pixels=options.max_pixels,
            num_workers=options.num_workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if options.out is not None:
        print(report.save(options.out))
    _print_report(report, is_saved=options.out is not None)
    return EXIT_FAILED if report.problems else 0


def _print_report(report: "MaskReport", *, is_saved: bool) -> None:
    for counts in report.splits:
        print(f"{counts.split}: {counts.num_images} pictures with masks")
    names = ("class", *report.class_names, "(ignored)")
    width = max(map(len, names))
    columns = [(one.split, *_cells(one), f"{one.ignored_share:.2%}") for one in report.splits]
    print("share of the labelled pixels of each class, and pictures that show it:")
    for row, name in enumerate(names):
        print(f"{name:{width}}" + "".join(f"{column[row]:>20}" for column in columns))
    if report.never_learnt:
        print(f"no training mask shows: {', '.join(report.never_learnt)}")
    for problem in report.problems[:_MAX_SHOWN_PROBLEMS]:
        print(f"{problem.kind}: {problem.message}")
    hidden = len(report.problems) - _MAX_SHOWN_PROBLEMS
    if hidden > 0:
        print(f"and {hidden} more" + ("" if is_saved else "; --out DIR writes all"))
    kinds = ", ".join(f"{count} x {kind}" for kind, count in report.num_problems.items())
    print(f"wrong: {kinds}" if kinds else "nothing is wrong")


def _cells(counts: "ClassCounts") -> list[str]:
    pairs = zip(counts.shares, counts.images, strict=True)
    return [f"{share:.2%} in {images:6}" for share, images in pairs]
