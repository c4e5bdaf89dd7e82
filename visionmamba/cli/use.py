"""`visionmamba eval` and `visionmamba predict`: what trained weights are good for."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from visionmamba.cli.messages import complain
from visionmamba.cli.options import image_size_of, num_workers_for, parse

if TYPE_CHECKING:
    from visionmamba.models.weights import WeightsHeader
    from visionmamba.tasks import (
        Evaluation,
        Inference,
        Segmentation,
        SegmentationEvaluation,
    )

_MAX_PIXELS = 89_478_485  # data.MAX_PIXELS, without importing torch
_MAX_SHOWN_CLASSES = 30
_NUM_WORST_CLASSES = 10
_WINDOW_OPTIONS = ("mode", "crop_size", "stride", "num_windows", "scales", "flip")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """How well trained or published weights do: a classifier on labelled images, a segmenter on
    images with masks."""

    weights: tyro.conf.Positional[str]
    """File that training wrote, such as runs/digits/best.safetensors; the authors' .pth; or a name
    that `visionmamba models` lists."""
    data: tyro.conf.Positional[str]
    """For a classifier: digits, a folder with train/ and val/, or a folder of class folders. For a
    segmenter: shapes, or the folder of ADE20K, of Cityscapes, or of images and masks."""
    split: Literal["train", "val", "test"] = "val"
    """Which part of the data; only data with masks have a test split."""
    image_size: tuple[int, ...] | None = None
    """Classifier: side, or height and width, in pixels, instead of what the weights say."""
    crop_fraction: float | None = None
    """Classifier: share of the resized image that the centred crop keeps, instead of what the
    weights say."""
    which: Literal["model", "model_ema"] | None = None
    """Classifier: entry of the authors' file, the raw weights (the default) or their moving
    average."""
    short_side: int | None = None
    """Segmenter: pixels that the shorter side is resized to, instead of what the weights say."""
    mode: Literal["whole", "slide"] | None = None
    """Segmenter: whole images, or windows over them, instead of what the weights say."""
    crop_size: int | None = None
    """Segmenter: side of the windows in pixels."""
    stride: int | None = None
    """Segmenter: distance of the windows in pixels; by default two thirds of a given crop_size."""
    num_windows: int | None = None
    """Segmenter: windows that go through the model at once."""
    scales: tuple[float, ...] | None = None
    """Segmenter: sizes to judge at, as shares of the image's own, averaged; 0.5 0.75 1 1.25 1.5
    1.75 in published multi-scale results."""
    flip: bool = False
    """Segmenter: judge the mirrored image too, whatever the weights say."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the model."""
    device: str = "auto"
    """"auto" (the GPU when there is one), "cpu", "cuda" or "cuda:N"."""
    batch_size: int | None = None
    """Images that go through the model at once; by default 64 for a classifier, 4 of equal size for
    a segmenter."""
    num_workers: int | None = None
    """Processes that prepare images beside the main one; by default as many as there are cores (at
    most 16) for a GPU, none for the CPU."""
    on_unreadable: Literal["fail", "skip"] = "fail"
    """Stop at an image that cannot be opened, or leave it out and list it."""
    max_pixels: int = _MAX_PIXELS
    """Largest image, width times height, that is opened."""
    out: Path | None = None
    """Folder for evaluation.json, per_class.csv, confusion.csv and confusion.png."""


@dataclass(frozen=True, kw_only=True)
class Predict:
    """What images show: a classifier names it, a segmenter says it of every pixel."""

    weights: tyro.conf.Positional[str]
    """File that training wrote, such as runs/digits/best.safetensors; the authors' .pth; or a name
    that `visionmamba models` lists."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or folders of them."""
    top_k: int = 5
    """How many classes to name."""
    mode: Literal["whole", "slide"] | None = None
    """Segmenter: whole images, or windows over them, instead of what the weights say."""
    crop_size: int | None = None
    """Segmenter: side of the windows in pixels."""
    stride: int | None = None
    """Segmenter: distance of the windows in pixels; by default two thirds of a given crop_size."""
    num_windows: int | None = None
    """Segmenter: windows that go through the model at once."""
    scales: tuple[float, ...] | None = None
    """Segmenter: sizes to judge at, as shares of the image's own, averaged."""
    flip: bool = False
    """Segmenter: judge the mirrored image too, whatever the weights say."""
    json: bool = False
    """Print JSON instead of text."""
    out: Path | None = None
    """Folder for what is found of each image: a JSON file, and an annotated picture from a
    classifier, a mask and an overlay from a segmenter."""
    device: str = "auto"
    """"auto" (the GPU when there is one), "cpu", "cuda" or "cuda:N"."""
    batch_size: int | None = None
    """Classifier: images that go through the model at once, by default 32."""
    on_unreadable: Literal["fail", "skip"] = "fail"
    """Stop at an image that cannot be opened, or leave it out and report it."""
    max_pixels: int = _MAX_PIXELS
    """Largest image, width times height, that is opened."""


def eval(given: list[str]) -> int:
    """Runs `visionmamba eval`."""
    options = parse(Eval, given, prog="visionmamba eval")
    size = image_size_of(options.image_size)
    header = _header_of(options.weights)
    if _is_segmenter(options, header, ("image_size", "crop_fraction", "which")):
        return _eval_segmenter(options, _inference_of(options, header))
    if options.split == "test":
        raise ValueError("labelled images have no split test; use --split train or --split val")
    from visionmamba.tasks import evaluate

    evaluation = evaluate(
        options.weights,
        options.data,
        split=options.split,
        image_size=size,
        crop_fraction=options.crop_fraction,
        which=options.which or "model",
        precision=options.precision,
        device=options.device,
        batch_size=64 if options.batch_size is None else options.batch_size,
        num_workers=num_workers_for(options.device, options.num_workers),
        on_unreadable=options.on_unreadable,
        max_pixels=options.max_pixels,
    )
    if options.out is not None:
        print(evaluation.save(options.out))
    _print_evaluation(evaluation)
    return 0


def predict(given: list[str]) -> int:
    """Runs `visionmamba predict`."""
    options = parse(Predict, given, prog="visionmamba predict")
    if not options.images:
        raise ValueError("predict needs at least one image or folder: visionmamba predict W IMAGE")
    if options.top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {options.top_k}")
    header = _header_of(options.weights)
    is_segmenter = _is_segmenter(options, header, ("batch_size",))
    files = _image_files(options.images)
    if options.out is not None:
        _check_out(options.out, files)
    if is_segmenter:
        return _predict_segments(options, files, _inference_of(options, header))
    from visionmamba.data import split_readable
    from visionmamba.tasks import Classifier

    classifier = Classifier.load(options.weights, device=options.device)
    if options.on_unreadable == "skip":
        files, reasons = split_readable(files, max_pixels=options.max_pixels)
        for reason in reasons:
            complain(f"left out: {reason}")
    found = classifier(
        files,
        top_k=options.top_k,
        batch_size=32 if options.batch_size is None else options.batch_size,
        max_pixels=options.max_pixels,
    )
    if options.out is not None:
        for one, name in zip(found, _distinct_names(files), strict=True):
            one.save(options.out, name=name)
    if options.json:
        print(json.dumps([one.to_dict() for one in found], indent=2, ensure_ascii=False))
        return 0
    for one in found:
        shares = zip(map(_readable, one.labels), one.probabilities, strict=True)
        print(f"{one.file}: " + ", ".join(f"{label} {share:.1%}" for label, share in shares))
    return 0


def _header_of(weights: str) -> "WeightsHeader | None":
    """Returns what weights say about themselves; None for those that this package did not write."""
    from visionmamba.models.hub import find_weights
    from visionmamba.models.weights import METADATA_KEY, read_header, read_metadata

    path = find_weights(weights)
    if path.suffix != ".safetensors" or METADATA_KEY not in read_metadata(path):
        return None
    return read_header(path)


def _is_segmenter(
    options: Eval | Predict, header: "WeightsHeader | None", of_classifiers: Sequence[str]
) -> bool:
    """Returns whether weights are a segmenter's; ValueError for options of the other task."""
    task = "classification" if header is None else header.task
    if task not in ("classification", "segmentation"):
        raise ValueError(
            f"{options.weights} was trained for {task}; eval and predict know classification and "
            "segmentation"
        )
    is_segmenter = task == "segmentation"
    foreign = of_classifiers if is_segmenter else (*_WINDOW_OPTIONS, "short_side")
    for name in foreign:
        if _is_given(getattr(options, name, None)):
            raise ValueError(
                f"--{name.replace('_', '-')} is not for {task}, which {options.weights} was "
                "trained for; leave it out"
            )
    return is_segmenter


def _is_given(value: object) -> bool:
    return value is not None and value is not False


def _inference_of(options: Eval | Predict, header: "WeightsHeader | None") -> "Inference":
    """Returns how a segmenter goes over images: as its weights say, changed as asked for."""
    from visionmamba.tasks import Inference
    from visionmamba.tasks.task_weights import TaskWeights

    held = TaskWeights.find(options.weights, task="segmentation", trained="segmenter")
    values = held.inference(Inference).to_dict()
    given = {name: getattr(options, name) for name in _WINDOW_OPTIONS}
    values |= {name: value for name, value in given.items() if _is_given(value)}
    if options.crop_size is not None and options.stride is None:
        values["stride"] = max(1, round(options.crop_size * 2 / 3))
    inference = Inference.from_dict(values)
    for name in ("crop_size", "stride", "num_windows"):
        if inference.mode == "whole" and given[name] is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for windows; add --mode slide")
    return inference


def _eval_segmenter(options: Eval, inference: "Inference") -> int:
    from visionmamba.tasks import evaluate_segmentation

    evaluation = evaluate_segmentation(
        options.weights,
        options.data,
        split=options.split,
        inference=inference,
        short_side=options.short_side,
        precision=options.precision,
        device=options.device,
        batch_size=4 if options.batch_size is None else options.batch_size,
        num_workers=num_workers_for(options.device, options.num_workers),
        on_unreadable=options.on_unreadable,
        max_pixels=options.max_pixels,
        progress=True,
    )
    if options.out is not None:
        print(evaluation.save(options.out))
    _print_segmentation_evaluation(evaluation)
    return 0


def _predict_segments(options: Predict, files: Sequence[Path], inference: "Inference") -> int:
    """Goes over files one after another, so that one picture is in memory at a time."""
    from rich.console import Console
    from rich.progress import Progress

    from visionmamba.data import UnreadableImageError
    from visionmamba.tasks import Segmenter

    segmenter = Segmenter.load(options.weights, device=options.device, inference=inference)
    console = Console(stderr=True)
    num_found = 0
    with Progress(console=console, disable=not console.is_terminal, redirect_stdout=False) as bar:
        shares_terminal = console.is_terminal and sys.stdout.isatty()
        line = bar.add_task(f"{len(files)} images", total=len(files))
        for file, name in zip(files, _distinct_names(files), strict=True):
            try:
                found = segmenter(file, max_pixels=options.max_pixels)
            except UnreadableImageError as error:
                if options.on_unreadable == "fail":
                    raise
                complain(f"left out: {error}")
                bar.advance(line)
                continue
            if options.out is not None:
                found.save(options.out, name=name)
            text = _segmentation_text(found, options, is_first=not num_found)
            if shares_terminal:  # above the bar
                console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, flush=True)
            num_found += 1
            bar.advance(line)
    if options.json:
        print("\n]" if num_found else "[]")
    return 0


def _segmentation_text(found: "Segmentation", options: Predict, *, is_first: bool) -> str:
    if options.json:
        text = json.dumps(found.to_dict(), indent=2, ensure_ascii=False)
        return ("[\n" if is_first else ",\n") + text
    shares = list(zip(found.classes, found.shares, strict=True))[: options.top_k]
    return f"{found.file}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares)


def _print_evaluation(evaluation: "Evaluation") -> None:
    height, width = evaluation.image_size
    print(
        f"top-1 {evaluation.accuracy:.2%}, top-5 {evaluation.top5_accuracy:.2%} of "
        f"{evaluation.num_images} images at {height}x{width} px; "
        f"{evaluation.images_per_second:.0f} images/s, "
        f"the model alone {evaluation.model_images_per_second:.0f}"
    )
    rows = evaluation.classes()
    if len(rows) > _MAX_SHOWN_CLASSES:
        print(f"the {_NUM_WORST_CLASSES} worst of {len(rows)} classes; --out DIR writes all:")
        rows = sorted(rows, key=lambda row: row.accuracy)[:_NUM_WORST_CLASSES]
    for row in rows:
        mixed_up = f", most often taken for {_readable(row.taken_for)}" if row.taken_for else ""
        print(f"  {_readable(row.name):24} {row.accuracy:7.2%} of {row.num_images}{mixed_up}")
    for reason in evaluation.unreadable:
        complain(f"left out: {reason}")


def _print_segmentation_evaluation(evaluation: "SegmentationEvaluation") -> None:
    print(
        f"mIoU {evaluation.miou:.2%}, mAcc {evaluation.macc:.2%}, aAcc {evaluation.aacc:.2%} of "
        f"{evaluation.num_images} images, {evaluation.num_pixels:,} labelled pixels; "
        f"{evaluation.images_per_second:.3g} images/s, "
        f"the model alone {evaluation.model_images_per_second:.3g}"
    )
    rows = evaluation.classes()
    if len(rows) > _MAX_SHOWN_CLASSES:
        print(f"the {_NUM_WORST_CLASSES} worst of {len(rows)} classes; --out DIR writes all:")
        rows = sorted(rows, key=lambda row: row.iou)[:_NUM_WORST_CLASSES]
    for row in rows:
        accuracy = "       -" if row.accuracy is None else f"{row.accuracy:8.2%}"
        mixed_up = f", most often taken for {row.taken_for}" if row.taken_for else ""
        print(
            f"  {row.name:24} IoU {row.iou:7.2%}, accuracy{accuracy} of {row.share:.2%} of the "
            f"pixels{mixed_up}"
        )
    for reason in evaluation.unreadable:
        complain(f"left out: {reason}")


def _readable(label: str) -> str:
    """Returns the label, with its meaning where it is a number of WordNet, as in ImageNet."""
    if not re.fullmatch(r"n\d{8}", label):
        return label
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    if label not in info.label_names():  # type: ignore[no-untyped-call]
        return label
    first_name = info.label_name_to_description(label).split(",")[0]
    return f"{first_name} ({label})"


def _image_files(paths: Sequence[Path]) -> list[Path]:
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


def _check_out(out: Path, files: Sequence[Path]) -> None:
    """Raises ValueError where results could replace the images themselves."""
    if out.resolve() in {file.resolve().parent for file in files}:
        raise ValueError(
            f"--out {out} is the folder of the images, which results could replace; give another"
        )


def _distinct_names(files: Sequence[Path]) -> list[str]:
    """Returns the files' names without endings, numbered where several files share one."""
    names: dict[str, None] = {}
    for file in files:
        stem = file.stem or "image"
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem}_{number}"
        names[name] = None
    return list(names)
