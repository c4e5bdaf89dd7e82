"""`visionmamba check`: whether pictures with masks, or with objects, can be used."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from visionmamba.cli.messages import EXIT_FAILED
from visionmamba.cli.options import MAX_PIXELS, parse

if TYPE_CHECKING:
    from visionmamba.data import ClassCounts, MaskReport, ObjectReport
    from visionmamba.data.mask_check import Progress

_MAX_SHOWN_PROBLEMS = 20


@dataclass(frozen=True, kw_only=True)
class Check:
    """Which pictures, masks and annotations of a set cannot be used, and what the set holds of each
    class. The exit code is 1 when something is wrong."""

    data: tyro.conf.Positional[Path]
    """Folder of train/images, train/masks and a file of classes, of ADE20K, of Cityscapes, or in
    COCO's layout; or one annotation file in COCO's format."""
    format: Literal["ade20k", "cityscapes", "folder", "coco"] | None = None
    """Which of them it is; by default what is in it tells."""
    images: Path | None = None
    """Folder of the images, where an annotation file is checked; by default they are looked for
    around it."""
    max_pixels: int = MAX_PIXELS
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
    is_coco = options.format == "coco" or (options.format is None and _holds_coco(options.data))
    if options.images is not None and not is_coco:
        raise ValueError("--images is for an annotation file in COCO's format; leave it out")
    if options.format is None and not is_coco:
        _require_masks(options.data)
    return _check_objects(options) if is_coco else _check_masks(options)


def _holds_coco(data: Path) -> bool:
    from visionmamba.data import Coco

    return data.suffix == ".json" or any(map(Coco(root=data).has, ("train", "val")))


def _require_masks(data: Path) -> None:
    """Raises ValueError for a folder that holds nothing that can be checked."""
    from visionmamba.data.mask_folders import LAYOUTS, holds_masks

    if data.is_dir() and not holds_masks(data):
        raise ValueError(
            f"{data} holds no pictures with masks or objects in a known layout; wanted {LAYOUTS}; "
            "or annotations/val.json (COCO), or the annotation file itself under any other name"
        )


def _check_objects(options: Check) -> int:
    from visionmamba.data import check_objects
    from visionmamba.data.object_check import NO_AREA

    with _progress() as progress:
        report = check_objects(
            options.data,
            images=options.images,
            max_pixels=options.max_pixels,
            num_workers=options.num_workers,
            progress=progress,
        )
    if options.out is not None:
        print(report.save(options.out))
    _print_objects(report)
    _print_problems(
        [(one.kind, one.message) for one in report.problems],
        is_saved=options.out is not None,
        harmless=NO_AREA,
    )
    return 0 if report.is_usable else EXIT_FAILED


def _check_masks(options: Check) -> int:
    from visionmamba.data import check_masks

    assert options.format != "coco"
    with _progress() as progress:
        report = check_masks(
            options.data,
            format=options.format,
            max_pixels=options.max_pixels,
            num_workers=options.num_workers,
            progress=progress,
        )
    if options.out is not None:
        print(report.save(options.out))
    _print_masks(report)
    _print_problems(
        [(one.kind, one.message) for one in report.problems], is_saved=options.out is not None
    )
    return EXIT_FAILED if report.problems else 0


@contextmanager
def _progress() -> "Iterator[Progress]":
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_objects(report: "ObjectReport") -> None:
    kind = "boxes and masks" if report.has_masks else "boxes"
    for counts in report.splits:
        print(
            f"{counts.split}: {counts.num_images} pictures with {sum(counts.objects):,} objects "
            f"({kind}), at most {counts.most_objects} in one; {counts.num_empty} without any, "
            f"{counts.num_crowds} crowds"
        )
    width = max(map(len, ("class", *report.class_names)))
    titles = ("objects", "pictures", "small", "medium", "large")
    print("objects of each class, pictures that show it, and how many are of COCO's sizes:")
    print(" " * width + "".join(f"  {one.split:<44.44}" for one in report.splits).rstrip())
    print(f"{'class':{width}}" + "".join(f"{title:>9}" for title in titles) * len(report.splits))
    for index, name in enumerate(report.class_names):
        cells = [
            f"{number:>9,}"
            for one in report.splits
            for number in (one.objects[index], one.images[index], *one.sizes[index])
        ]
        print(f"{name:{width}}" + "".join(cells))
    if report.never_learnt:
        print(f"no training picture shows: {', '.join(report.never_learnt)}")


def _print_masks(report: "MaskReport") -> None:
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


def _print_problems(
    problems: Sequence[tuple[str, str]], *, is_saved: bool, harmless: str | None = None
) -> None:
    """Prints kinds and messages, and how many there are of each kind."""
    for kind, message in problems[:_MAX_SHOWN_PROBLEMS]:
        print(f"{kind}: {message}")
    hidden = len(problems) - _MAX_SHOWN_PROBLEMS
    if hidden > 0:
        print(f"and {hidden} more" + ("" if is_saved else "; --out DIR writes all"))
    counts = Counter(kind for kind, _ in problems)
    num_harmless = counts.pop(harmless, 0) if harmless else 0
    kinds = ", ".join(f"{count} x {kind}" for kind, count in counts.items())
    left_out = f"; left out: {num_harmless} x {harmless}" if num_harmless else ""
    print((f"wrong: {kinds}" if kinds else "nothing is wrong") + left_out)


def _cells(counts: "ClassCounts") -> list[str]:
    pairs = zip(counts.shares, counts.images, strict=True)
    return [f"{share:.2%} in {images:6}" for share, images in pairs]
