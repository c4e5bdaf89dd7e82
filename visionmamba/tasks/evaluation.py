"""How well a classifier does on labelled pictures: accuracies, mix-ups and speed."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from visionmamba.data import MAX_PIXELS, PADDING, EvalBatches, explain_out_of_memory, open_images
from visionmamba.data.sets import OnUnreadable, Split
from visionmamba.models.published_file import Which
from visionmamba.tasks.classification import hits
from visionmamba.tasks.classifier import Classifier
from visionmamba.tasks.confusion import write_evaluation


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """What became of the pictures of one class."""

    name: str
    """Name of the class."""
    num_images: int
    """Pictures of it."""
    accuracy: float
    """Share of them whose most probable class is this one."""
    taken_for: str | None
    """The wrong class named most often; None when none was."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a classifier does on a set of labelled pictures."""

    accuracy: float
    """Share of the pictures whose most probable class is right."""
    top5_accuracy: float
    """Share whose class is among the five most probable."""
    per_class: dict[str, float]
    """Top-1 accuracy of each class that has pictures."""
    num_images: int
    """Pictures judged."""
    image_size: tuple[int, int]
    """Height and width in pixels that the model saw."""
    crop_fraction: float
    """Share of the resized picture that the centred crop kept."""
    images_per_second: float
    """Pictures per second, reading and preparing included."""
    model_images_per_second: float
    """Pictures per second of the model alone, first batch (where kernels are built) left out."""
    class_names: tuple[str, ...] = field(repr=False)
    """Names of the classes, in the order of the matrix."""
    confusion: NDArray[np.int64] = field(repr=False, compare=False)
    """(classes, classes): how many pictures of the row's class were taken for the column's."""
    unreadable: tuple[str, ...]
    """Files that were left out, with the reasons."""

    def classes(self) -> list[ClassResult]:
        """Returns one row for each class that has pictures, in the order of the classes."""
        rows: list[ClassResult] = []
        for index, name in enumerate(self.class_names):
            counts = self.confusion[index].copy()
            num_images, counts[index] = int(counts.sum()), 0
            if not num_images:
                continue
            worst = int(counts.argmax())
            rows.append(
                ClassResult(
                    name=name,
                    num_images=num_images,
                    accuracy=self.per_class[name],
                    taken_for=self.class_names[worst] if counts[worst] else None,
                )
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON; the matrix is in confusion.csv."""
        return {
            "accuracy": self.accuracy,
            "top5_accuracy": self.top5_accuracy,
            "num_images": self.num_images,
            "image_size": list(self.image_size),
            "crop_fraction": self.crop_fraction,
            "images_per_second": self.images_per_second,
            "model_images_per_second": self.model_images_per_second,
            "per_class": self.per_class,
            "unreadable": list(self.unreadable),
        }

    def save(self, folder: str | Path) -> Path:
        """Writes all there is to know into a folder, made when missing.

        evaluation.json, per_class.csv (pictures, accuracy, what the class is most often taken for),
        confusion.csv and its picture confusion.png.

        Returns:
            The path of evaluation.json.
        """
        table: list[Sequence[object]] = [("class", "images", "accuracy", "taken_for")]
        table += [
            (one.name, one.num_images, round(one.accuracy, 6), one.taken_for or "")
            for one in self.classes()
        ]
        return write_evaluation(
            folder, self.to_dict(), table, confusion=self.confusion, class_names=self.class_names
        )


def evaluate(
    weights: str | os.PathLike[str],
    data: str | Path,
    *,
    split: Split = "val",
    image_size: int | tuple[int, int] | None = None,
    crop_fraction: float | None = None,
    which: Which = "model",
    precision: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    batch_size: int = 64,
    num_workers: int = 0,
    on_unreadable: OnUnreadable = "fail",
    max_pixels: int = MAX_PIXELS,
) -> Evaluation:
    """Returns the accuracy of weights on labelled pictures.

    Pictures are prepared as the weights say. The published ones (and the recipes for ImageNet) say:
    shorter side to 256 px by bicubic interpolation, the middle 224 px, ImageNet's mean and
    deviation. ImageNet's classes are in the order of their folders, n01440764 first.

    Args:
        weights: whatever `Classifier.load` takes: a file of this package, the authors' .pth, or a
            published name.
        data: "digits", a folder with train/ and val/, or a folder of class folders.
        split: which half of "digits", or of a folder that has both.
        image_size: side, or (height, width), in pixels at which to judge instead of the weights'
            own; the position embedding is resized.
        crop_fraction: share of the resized picture to keep instead of the weights' own.
        which: entry of the authors' file.
        precision: "bfloat16" runs the model under autocast.
        device: "auto" takes the GPU when there is one.
        batch_size: pictures that go through the model at once.
        num_workers: processes that read pictures beside this one.
        on_unreadable: stop at a file that cannot be opened, or leave it out and list it.
        max_pixels: width times height beyond which a file counts as unreadable.

    Raises:
        FileNotFoundError: the weights or the data are missing.
        ValueError: the classes of both disagree, or either is damaged.
        BatchTooLargeError: a batch does not fit into memory.
    """
    classifier = Classifier.load(weights, device=device, which=which)
    preprocessing = classifier.preprocessing
    if image_size is not None:
        preprocessing = replace(preprocessing, image_size=image_size)
    if crop_fraction is not None:
        preprocessing = replace(preprocessing, crop_fraction=crop_fraction)
    images = open_images(data, split=split, on_unreadable=on_unreadable, max_pixels=max_pixels)
    if images.class_names != classifier.class_names:
        raise ValueError(
            class_difference(weights, data, classifier.class_names, images.class_names)
        )
    batches = EvalBatches(
        images, preprocessing.build(), batch_size=batch_size, num_workers=num_workers
    )
    rows: list[Tensor] = []  # (B, 4): label, prediction, right, among the first five
    model_seconds: list[float] = []
    started = time.perf_counter()
    on = classifier.device
    with (
        torch.inference_mode(),
        explain_out_of_memory(batch_size),
        torch.autocast(on.type, torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        for batch in batches:
            inputs = batch.images.to(on)
            before = clock(on)
            logits = classifier.model(inputs).float()
            model_seconds.append(clock(on) - before)
            judged = (batch.labels, logits.argmax(dim=-1).cpu(), *hits(logits.cpu(), batch.labels))
            rows.append(torch.stack(judged, dim=1)[batch.labels != PADDING])
    seconds = time.perf_counter() - started
    labels, predicted, is_first, is_among_five = torch.cat(rows).unbind(dim=1)
    num_images = len(labels)
    if not num_images:
        raise ValueError(
            f"none of the {len(images)} images of {data} can be opened; the first: "
            f"{batches.unreadable[0]}"
        )
    counts = _confusion(labels, predicted, len(images.class_names))
    warm_seconds = sum(model_seconds[1:]) or model_seconds[0]
    num_warm = sum(map(len, rows[1:])) or num_images
    return Evaluation(
        accuracy=is_first.double().mean().item(),
        top5_accuracy=is_among_five.double().mean().item(),
        per_class={
            name: float(row[index] / row.sum())
            for index, (name, row) in enumerate(zip(images.class_names, counts, strict=True))
            if row.sum()
        },
        num_images=num_images,
        image_size=preprocessing.size,
        crop_fraction=preprocessing.crop_fraction,
        images_per_second=round(num_images / seconds, 1),
        model_images_per_second=round(num_warm / warm_seconds, 1),
        class_names=images.class_names,
        confusion=counts,
        unreadable=batches.unreadable,
    )


def _confusion(labels: Tensor, predicted: Tensor, num_classes: int) -> NDArray[np.int64]:
    counts = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    matrix: NDArray[np.int64] = counts.reshape(num_classes, num_classes).numpy()
    return matrix


def clock(device: torch.device) -> float:
    """Returns seconds of a clock, once all that the device was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class TimedModel:
    """Runs a model on a device and notes how long each batch of an evaluation takes it."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._seconds = 0.0
        self._batches: list[tuple[int, float]] = []

    def __call__(self, images: Any) -> Any:
        before = clock(self._device)
        outputs = self._model(images)
        self._seconds += clock(self._device) - before
        return outputs

    def end_batch(self, num_images: int) -> None:
        """Notes that all calls since the last batch were for so many pictures."""
        self._batches.append((num_images, self._seconds))
        self._seconds = 0.0

    @property
    def images_per_second(self) -> float:
        """Pictures per second of the model alone, without the first batch if there are more."""
        warm = self._batches[1:] or self._batches
        return sum(number for number, _ in warm) / sum(seconds for _, seconds in warm)


def class_difference(
    weights: str | os.PathLike[str], data: object, ours: Sequence[str], theirs: Sequence[str]
) -> str:
    """Returns the sentence for weights and data whose classes are not the same."""
    missing = sorted(set(theirs) - set(ours)) or sorted(set(ours) - set(theirs))
    example = f" (for example {missing[0]})" if missing else " (their order differs)"
    return (
        f"{os.fspath(weights)} knows {len(ours)} classes and {data} has {len(theirs)}, which must "
        f"be the same{example}; evaluate on data with the classes it was trained on"
    )
