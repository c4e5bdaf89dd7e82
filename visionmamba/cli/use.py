"""`visionmamba eval` and `visionmamba predict`: what trained weights are good for."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from visionmamba.cli.messages import complain
from visionmamba.cli.options import image_size_of, num_workers_for, parse

if TYPE_CHECKING:
    from visionmamba.tasks import Classification, Evaluation

_MAX_PIXELS = 89_478_485  # data.MAX_PIXELS, without importing torch
_MAX_SHOWN_CLASSES = 30
_NUM_WORST_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Accuracy of trained or published weights on labelled images."""

    weights: tyro.conf.Positional[str]
    """File that training wrote, such as runs/digits/best.safetensors; the authors' .pth; or a name
    that `visionmamba models` lists."""
    data: tyro.conf.Positional[str]
    """digits, a folder with train/ and val/, or a folder of class folders."""
    split: Literal["train", "val"] = "val"
    """Which half of the data."""
    image_size: tuple[int, ...] | None = None
    """Side, or height and width, in pixels, instead of what the weights say."""
    crop_fraction: float | None = None
    """Share of the resized image that the centred crop keeps, instead of what the weights say."""
    which: Literal["model", "model_ema"] = "model"
    """Entry of the authors' file: the raw weights or their moving average."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the model."""
    device: str = "auto"
    """"auto" (the GPU when there is one), "cpu", "cuda" or "cuda:N"."""
    batch_size: int = 64
    """Images that go through the model at once."""
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
    """What images show."""

    weights: tyro.conf.Positional[str]
    """File that training wrote, such as runs/digits/best.safetensors; the authors' .pth; or a name
    that `visionmamba models` lists."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or folders of them."""
    top_k: int = 5
    """How many classes to name."""
    json: bool = False
    """Print JSON instead of text."""
    out: Path | None = None
    """Folder for a JSON file and an annotated picture of each image."""
    device: str = "auto"
    """"auto" (the GPU when there is one), "cpu", "cuda" or "cuda:N"."""
    batch_size: int = 32
    """Images that go through the model at once."""
    on_unreadable: Literal["fail", "skip"] = "fail"
    """Stop at an image that cannot be opened, or leave it out and report it."""
    max_pixels: int = _MAX_PIXELS
    """Largest image, width times height, that is opened."""


def eval(given: list[str]) -> int:
    """Runs `visionmamba eval`."""
    options = parse(Eval, given, prog="visionmamba eval")
    size = image_size_of(options.image_size)
    from visionmamba.tasks import evaluate

    evaluation = evaluate(
        options.weights,
        options.data,
        split=options.split,
        image_size=size,
        crop_fraction=options.crop_fraction,
        which=options.which,
        precision=options.precision,
        device=options.device,
        batch_size=options.batch_size,
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
    from visionmamba.data import split_readable
    from visionmamba.tasks import Classifier

    classifier = Classifier.load(options.weights, device=options.device)
    files = _image_files(options.images)
    if options.on_unreadable == "skip":
        files, reasons = split_readable(files, max_pixels=options.max_pixels)
        for reason in reasons:
            complain(f"left out: {reason}")
    found = classifier(
        files,
        top_k=options.top_k,
        batch_size=options.batch_size,
        max_pixels=options.max_pixels,
    )
    if options.out is not None:
        _save_all(found, options.out)
    if options.json:
        print(json.dumps([one.to_dict() for one in found], indent=2, ensure_ascii=False))
        return 0
    for one in found:
        shares = zip(map(_readable, one.labels), one.probabilities, strict=True)
        print(f"{one.file}: " + ", ".join(f"{label} {share:.1%}" for label, share in shares))
    return 0


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


def _save_all(found: Sequence["Classification"], folder: Path) -> None:
    """Saves each under its file's name, numbered where files of several folders share one."""
    taken: set[str] = set()
    for one in found:
        stem = Path(one.file or "image").stem
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name)
        one.save(folder, name=name)
