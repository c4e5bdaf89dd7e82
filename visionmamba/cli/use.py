"""`visionmamba eval` and `visionmamba predict`: what trained weights are good for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from visionmamba.cli.classifiers import eval_classifier, predict_classes
from visionmamba.cli.detectors import eval_detector, predict_objects
from visionmamba.cli.options import MAX_PIXELS, parse
from visionmamba.cli.pictures import check_out, image_files, is_given
from visionmamba.cli.segmenters import eval_segmenter, predict_segments

_WINDOWS = ("mode", "crop_size", "stride", "num_windows")
_EVAL_OPTIONS = {
    "classification": ("image_size", "crop_fraction", "which"),
    "segmentation": (*_WINDOWS, "scales", "flip", "short_side"),
    "detection": (*_WINDOWS, "images", "max_detections"),
}
_PREDICT_OPTIONS = {
    "classification": ("batch_size",),
    "segmentation": (*_WINDOWS, "scales", "flip"),
    "detection": (*_WINDOWS, "min_score"),
}


@dataclass(frozen=True, kw_only=True)
class Eval:
    """How well trained or published weights do: a classifier on labelled images, a segmenter on
    images with masks, a detector on images with objects."""

    weights: tyro.conf.Positional[str]
    """File that training wrote, such as runs/digits/best.safetensors; the authors' .pth; or a name
    that `visionmamba models` lists."""
    data: tyro.conf.Positional[str]
    """For a classifier: digits, a folder with train/ and val/, or a folder of class folders. For a
    segmenter: shapes, or the folder of ADE20K, of Cityscapes, or of images and masks. For a
    detector: objects, a folder in COCO's layout, or one annotation file in COCO's format."""
    images: Path | None = None
    """Detector: folder of the images, where DATA is an annotation file; by default they are looked
    for around it."""
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
    """Segmenter, detector: whole images, or windows over them, instead of what the weights say."""
    crop_size: int | None = None
    """Segmenter, detector: side of the windows in pixels."""
    stride: int | None = None
    """Segmenter, detector: distance of the windows in pixels; by default two thirds of a given
    crop_size for a segmenter, three quarters for a detector."""
    num_windows: int | None = None
    """Segmenter, detector: windows that go through the model at once."""
    scales: tuple[float, ...] | None = None
    """Segmenter: sizes to judge at, as shares of the image's own, averaged; 0.5 0.75 1 1.25 1.5
    1.75 in published multi-scale results."""
    flip: bool = False
    """Segmenter: judge the mirrored image too, whatever the weights say."""
    max_detections: int | None = None
    """Detector: objects of an image and class that count, the best ones; 100 in COCO's tables, by
    default as many as the weights report of an image."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the model."""
    device: str = "auto"
    """"auto" (the GPU when there is one), "cpu", "cuda" or "cuda:N"."""
    batch_size: int | None = None
    """Images that go through the model at once; by default 64 for a classifier, 4 of equal size for
    a segmenter, 1 for a detector."""
    num_workers: int | None = None
    """Processes that prepare images beside the main one; by default as many as there are cores (at
    most 16) for a GPU, none for the CPU."""
    on_unreadable: Literal["fail", "skip"] = "fail"
    """Stop at an image that cannot be opened, or an annotation that is broken, or leave it out and
    list it."""
    max_pixels: int = MAX_PIXELS
    """Largest image, width times height, that is opened."""
    out: Path | None = None
    """Folder for evaluation.json and per_class.csv, with confusion.csv and confusion.png of a
    classifier or segmenter, average_precision.csv and detections.json (COCO's results) of a
    detector."""


@dataclass(frozen=True, kw_only=True)
class Predict:
    """What images show: a classifier names it, a segmenter says it of every pixel, a detector finds
    each object with a box and a mask."""

    weights: tyro.conf.Positional[str]
    """File that training wrote, such as runs/digits/best.safetensors; the authors' .pth; or a name
    that `visionmamba models` lists."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or folders of them."""
    top_k: int = 5
    """How many classes to name."""
    mode: Literal["whole", "slide"] | None = None
    """Segmenter, detector: whole images, or windows over them, instead of what the weights say."""
    crop_size: int | None = None
    """Segmenter, detector: side of the windows in pixels."""
    stride: int | None = None
    """Segmenter, detector: distance of the windows in pixels; by default two thirds of a given
    crop_size for a segmenter, three quarters for a detector."""
    num_windows: int | None = None
    """Segmenter, detector: windows that go through the model at once."""
    scales: tuple[float, ...] | None = None
    """Segmenter: sizes to judge at, as shares of the image's own, averaged."""
    flip: bool = False
    """Segmenter: judge the mirrored image too, whatever the weights say."""
    min_score: float | None = None
    """Detector: objects scored lower are left out; by default what the weights say, 0.5 unless they
    do."""
    json: bool = False
    """Print JSON instead of text."""
    out: Path | None = None
    """Folder for what is found of each image: a JSON file, and an annotated picture from a
    classifier, a mask and an overlay from a segmenter, an overlay from a detector, which adds
    coco_results.json (all objects as COCO's tools read them) and coco_images.json (the images that
    its numbers mean)."""
    device: str = "auto"
    """"auto" (the GPU when there is one), "cpu", "cuda" or "cuda:N"."""
    batch_size: int | None = None
    """Classifier: images that go through the model at once, by default 32."""
    on_unreadable: Literal["fail", "skip"] = "fail"
    """Stop at an image that cannot be opened, or leave it out and report it."""
    max_pixels: int = MAX_PIXELS
    """Largest image, width times height, that is opened."""


def eval(given: list[str]) -> int:
    """Runs `visionmamba eval`."""
    options = parse(Eval, given, prog="visionmamba eval")
    commands: dict[str, Callable[[Eval], int]] = {
        "classification": eval_classifier,
        "segmentation": eval_segmenter,
        "detection": eval_detector,
    }
    return commands[_task_of(options, _EVAL_OPTIONS)](options)


def predict(given: list[str]) -> int:
    """Runs `visionmamba predict`."""
    options = parse(Predict, given, prog="visionmamba predict")
    if not options.images:
        raise ValueError("predict needs at least one image or folder: visionmamba predict W IMAGE")
    if options.top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {options.top_k}")
    task = _task_of(options, _PREDICT_OPTIONS)
    files = image_files(options.images)
    if options.out is not None:
        check_out(options.out, files)
    commands: dict[str, Callable[[Predict, Sequence[Path]], int]] = {
        "classification": predict_classes,
        "segmentation": predict_segments,
        "detection": predict_objects,
    }
    return commands[task](options, files)


def _task_of(options: Eval | Predict, own_options: dict[str, tuple[str, ...]]) -> str:
    """Returns the task of the weights; ValueError for options that belong to other tasks only.

    Args:
        options: of the command line.
        own_options: those of each task that not all tasks have.
    """
    task = _task_in_header(options.weights)
    if task not in own_options:
        *others, last = own_options
        raise ValueError(
            f"{options.weights} was trained for {task}; eval and predict know {', '.join(others)} "
            f"and {last}"
        )
    foreign = {name for names in own_options.values() for name in names} - {*own_options[task]}
    for name in sorted(foreign):
        if is_given(getattr(options, name)):
            raise ValueError(
                f"--{name.replace('_', '-')} is not for {task}, which {options.weights} was "
                "trained for; leave it out"
            )
    return task


def _task_in_header(weights: str) -> str:
    """Returns what weights were trained for; those that this package did not write classify."""
    from visionmamba.models.hub import find_weights
    from visionmamba.models.weights import METADATA_KEY, read_header, read_metadata

    path = find_weights(weights)
    if path.suffix != ".safetensors" or METADATA_KEY not in read_metadata(path):
        return "classification"
    return read_header(path).task
