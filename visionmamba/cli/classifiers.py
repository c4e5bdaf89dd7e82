"""`visionmamba eval` and `visionmamba predict` with the weights of a classifier."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from visionmamba.cli.messages import complain
from visionmamba.cli.options import (
    MAX_SHOWN_CLASSES,
    NUM_WORST_CLASSES,
    image_size_of,
    num_workers_for,
)
from visionmamba.cli.pictures import distinct_names

if TYPE_CHECKING:
    from visionmamba.cli.use import Eval, Predict
    from visionmamba.tasks import Evaluation


def eval_classifier(options: "Eval") -> int:
    """Prints and saves how well a classifier does; returns the exit code."""
    if options.split == "test":
        raise ValueError("labelled images have no split test; use --split train or --split val")
    from visionmamba.tasks import evaluate

    evaluation = evaluate(
        options.weights,
        options.data,
        split=options.split,
        image_size=image_size_of(options.image_size),
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


def predict_classes(options: "Predict", files: Sequence[Path]) -> int:
    """Names what pictures show; returns the exit code."""
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
        for one, name in zip(found, distinct_names(files), strict=True):
            one.save(options.out, name=name)
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
    if len(rows) > MAX_SHOWN_CLASSES:
        print(f"the {NUM_WORST_CLASSES} worst of {len(rows)} classes; --out DIR writes all:")
        rows = sorted(rows, key=lambda row: row.accuracy)[:NUM_WORST_CLASSES]
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
