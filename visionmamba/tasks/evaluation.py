"""How well a classifier does on labelled pictures."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionmamba.data import MAX_PIXELS, EvalBatches, explain_out_of_memory, open_images
from visionmamba.data.sets import OnUnreadable, Split
from visionmamba.tasks.classification import hits
from visionmamba.tasks.classifier import Classifier
from visionmamba.tasks.files import replace_file


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
    unreadable: tuple[str, ...]
    """Files that were left out, with the reasons."""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON."""
        return asdict(self)

    def save(self, folder: str | Path) -> Path:
        """Writes evaluation.json into a folder, made when missing, and returns its path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "evaluation.json"
        replace_file(target, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")
        return target


def evaluate(
    weights: str | os.PathLike[str],
    data: str | Path,
    *,
    split: Split = "val",
    device: str = "auto",
    batch_size: int = 64,
    num_workers: int = 0,
    on_unreadable: OnUnreadable = "fail",
    max_pixels: int = MAX_PIXELS,
) -> Evaluation:
    """Returns the accuracy of a weights file on labelled pictures.

    Args:
        weights: a file that `fit` or `visionmamba.save` wrote.
        data: "digits", a folder with train/ and val/, or a folder of class folders.
        split: which half of "digits", or of a folder that has both.
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
    classifier = Classifier.load(weights, device=device)
    images = open_images(data, split=split, on_unreadable=on_unreadable, max_pixels=max_pixels)
    if images.class_names != classifier.class_names:
        raise ValueError(
            _class_difference(weights, data, classifier.class_names, images.class_names)
        )
    batches = EvalBatches(
        images, classifier.preprocessing.build(), batch_size=batch_size, num_workers=num_workers
    )
    first: list[Tensor] = []
    first_five: list[Tensor] = []
    with torch.inference_mode(), explain_out_of_memory(batch_size):
        for batch in batches:
            logits = classifier.model(batch.images.to(classifier.device)).float().cpu()
            hit = hits(logits, batch.labels)
            first.append(hit[0])
            first_five.append(hit[1])
    is_first, labels = torch.cat(first).double(), torch.tensor(images.labels)
    return Evaluation(
        accuracy=is_first.mean().item(),
        top5_accuracy=torch.cat(first_five).double().mean().item(),
        per_class={
            name: is_first[labels == label].mean().item()
            for label, name in enumerate(images.class_names)
            if bool((labels == label).any())
        },
        num_images=len(images),
        unreadable=images.unreadable,
    )


def _class_difference(
    weights: str | os.PathLike[str], data: str | Path, ours: Sequence[str], theirs: Sequence[str]
) -> str:
    missing = sorted(set(theirs) - set(ours)) or sorted(set(ours) - set(theirs))
    example = f" (for example {missing[0]})" if missing else " (their order differs)"
    return (
        f"{os.fspath(weights)} knows {len(ours)} classes and {data} has {len(theirs)}, which must "
        f"be the same{example}; evaluate on data with the classes it was trained on"
    )
