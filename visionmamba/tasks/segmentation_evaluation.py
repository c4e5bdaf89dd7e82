"""How well a segmenter does on pictures with masks: IoU, accuracies, mix-ups and speed."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from visionmamba.data import (
    MAX_PIXELS,
    PADDING,
    MaskSplit,
    SegmentationEvalBatches,
    SegmentationSet,
    SegmentationSource,
    open_masks,
)
from visionmamba.data.sets import OnUnreadable
from visionmamba.tasks.confusion import write_evaluation
from visionmamba.tasks.evaluation import TimedModel, class_difference
from visionmamba.tasks.segmentation import PixelScores, count_pixels
from visionmamba.tasks.segmenter import Segmenter
from visionmamba.tasks.sliding import Inference, explain_large_picture, score_bands


@dataclass(frozen=True, kw_only=True)
class SegmentationClassResult:
    """What became of the pixels of one class."""

    name: str
    """Name of the class."""
    num_pixels: int
    """Labelled pixels of it."""
    share: float
    """Its share of all labelled pixels."""
    iou: float
    """Intersection over union with the pixels that were taken for it, over the whole set."""
    accuracy: float | None
    """Share of its pixels that are right; None when it has none."""
    taken_for: str | None
    """The wrong class that most of its other pixels were taken for; None when there are none."""


@dataclass(frozen=True, kw_only=True)
class SegmentationEvaluation:
    """How well a segmenter does on a set of pictures with masks.

    Intersections, unions and shares are those of one confusion matrix over all pixels of the set,
    not means over pictures.
    """

    miou: float
    """Mean intersection over union of the classes that occur in masks or predictions."""
    macc: float
    """Mean over the classes that occur in masks of the share of their pixels that is right."""
    aacc: float
    """Share of all labelled pixels that is right."""
    num_images: int
    """Pictures judged."""
    num_pixels: int
    """Labelled pixels judged."""
    inference: Inference
    """Windows, scales and mirroring."""
    images_per_second: float
    """Pictures per second, reading, preparing and counting included."""
    model_images_per_second: float
    """Pictures per second of the model alone, with all windows and views of a picture; the first
    batch (where kernels are built) left out."""
    class_names: tuple[str, ...] = field(repr=False)
    """Names of the classes, in the order of the matrix."""
    confusion: NDArray[np.int64] = field(repr=False, compare=False)
    """(classes, classes): how many pixels of the row's class were taken for the column's."""
    unreadable: tuple[str, ...]
    """Files that were left out, with the reasons."""

    def classes(self) -> list[SegmentationClassResult]:
        """Returns one row for each class that occurs in masks or predictions, in their order."""
        scores = PixelScores.of(self.confusion)
        rows: list[SegmentationClassResult] = []
        for index, (name, iou) in enumerate(zip(self.class_names, scores.ious, strict=True)):
            if iou is None:
                continue
            counts = self.confusion[index].copy()
            num_pixels, counts[index] = int(counts.sum()), 0
            worst = int(counts.argmax())
            rows.append(
                SegmentationClassResult(
                    name=name,
                    num_pixels=num_pixels,
                    share=num_pixels / max(self.num_pixels, 1),
                    iou=iou,
                    accuracy=scores.accuracies[index],
                    taken_for=self.class_names[worst] if counts[worst] else None,
                )
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON; the matrix is in confusion.csv."""
        return {
            "miou": self.miou,
            "macc": self.macc,
            "aacc": self.aacc,
            "num_images": self.num_images,
            "num_pixels": self.num_pixels,
            "inference": self.inference.to_dict(),
            "images_per_second": self.images_per_second,
            "model_images_per_second": self.model_images_per_second,
            "per_class": {
                row.name: {"iou": row.iou, "accuracy": row.accuracy} for row in self.classes()
            },
            "unreadable": list(self.unreadable),
        }

    def save(self, folder: str | Path) -> Path:
        """Writes all there is to know into a folder, made when missing.

        evaluation.json, per_class.csv (pixels, share, IoU, accuracy, what the class is most often
        taken for), confusion.csv and its picture confusion.png.

        Returns:
            The path of evaluation.json.
        """
        table: list[Sequence[object]] = [
            ("class", "pixels", "share", "iou", "accuracy", "taken_for")
        ]
        table += [
            (
                row.name,
                row.num_pixels,
                round(row.share, 6),
                round(row.iou, 6),
                "" if row.accuracy is None else round(row.accuracy, 6),
                row.taken_for or "",
            )
            for row in self.classes()
        ]
        return write_evaluation(
            folder, self.to_dict(), table, confusion=self.confusion, class_names=self.class_names
        )


def evaluate_segmentation(
    weights: str | os.PathLike[str],
    data: str | Path | SegmentationSource,
    *,
    split: MaskSplit = "val",
    inference: Inference | None = None,
    short_side: int | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    batch_size: int = 1,
    num_workers: int = 0,
    on_unreadable: OnUnreadable = "fail",
    max_pixels: int = MAX_PIXELS,
    progress: bool = False,
) -> SegmentationEvaluation:
    """Returns how well weights do on pictures with masks.

    Pictures are prepared as the weights say; scores are resized to the size of the masks, so that
    every labelled pixel of the files counts.

    Args:
        weights: whatever `Segmenter.load` takes.
        data: a folder that `open_masks` knows, "shapes", or a source, which says itself what
            becomes of unreadable files and how large they may be.
        split: which part of the data.
        inference: windows, scales and mirroring instead of the weights' own.
        short_side: pixels that the shorter side is resized to instead of the weights' own.
        precision: "bfloat16" runs the model under autocast.
        device: "auto" takes the GPU when there is one.
        batch_size: pictures of equal size that are judged at once.
        num_workers: processes that read pictures beside this one.
        on_unreadable: stop at a file that cannot be opened, or leave it out and list it.
        max_pixels: width times height beyond which a file counts as unreadable.
        progress: show a bar on a terminal.

    Raises:
        FileNotFoundError: the weights or the data are missing.
        ValueError: the classes of both disagree, or either is damaged.
        BatchTooLargeError: a batch does not fit into memory.
    """
    segmenter = Segmenter.load(weights, device=device, inference=inference)
    preprocessing = segmenter.preprocessing
    if short_side is not None:
        preprocessing = replace(preprocessing, short_side=short_side)
    pictures: SegmentationSet
    if isinstance(data, str | Path):
        pictures = open_masks(data, split=split, on_unreadable=on_unreadable, max_pixels=max_pixels)
    else:
        pictures = data.open(split)
    if pictures.class_names != segmenter.class_names:
        raise ValueError(
            class_difference(weights, data, segmenter.class_names, pictures.class_names)
        )
    batches = SegmentationEvalBatches(
        pictures, preprocessing.build(None), batch_size=batch_size, num_workers=num_workers
    )
    on, count = segmenter.device, len(pictures.class_names)
    model = TimedModel(segmenter.model, on)
    confusion = torch.zeros(count, count, dtype=torch.int64, device=on)
    num_images: list[int] = []
    started = time.perf_counter()
    shown = track(
        batches,
        description=f"{len(pictures)} pictures",
        console=Console(stderr=True),
        disable=not progress or not Console(stderr=True).is_terminal,
    )
    for batch in shown:
        size = batch.masks.shape[-2], batch.masks.shape[-1]
        with (
            explain_large_picture(segmenter.inference, size, num_images=len(batch.images)),
            torch.inference_mode(),
            torch.autocast(on.type, torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            bands = score_bands(
                model, batch.images, size=size, inference=segmenter.inference, device=on
            )
            for band in bands:
                masks = batch.masks[:, band.rows, band.columns].to(on)
                confusion += count_pixels(masks, band.scores.argmax(dim=1), count)
        num_images.append(int((batch.indices != PADDING).sum()))
        model.end_batch(num_images[-1])
    seconds = time.perf_counter() - started
    if not sum(num_images):
        first = batches.unreadable[0] if batches.unreadable else "the set is empty"
        raise ValueError(
            f"none of the {len(pictures)} pictures of {data} can be judged; the first: {first}"
        )
    matrix: NDArray[np.int64] = confusion.cpu().numpy()
    scores = PixelScores.of(matrix)
    return SegmentationEvaluation(
        miou=scores.miou,
        macc=scores.macc,
        aacc=scores.aacc,
        num_images=sum(num_images),
        num_pixels=int(matrix.sum()),
        inference=segmenter.inference,
        images_per_second=round(sum(num_images) / seconds, 2),
        model_images_per_second=round(model.images_per_second, 2),
        class_names=pictures.class_names,
        confusion=matrix,
        unreadable=batches.unreadable,
    )
