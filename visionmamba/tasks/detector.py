"""Finding the objects of a picture, with boxes and masks: the predictor, and what it answers."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from visionmamba.data import MAX_PIXELS, DetectionPreprocessing, explain_out_of_memory
from visionmamba.data.object_masks import Counts, decode_mask
from visionmamba.models.weights import resolve_device
from visionmamba.tasks.classifier import Picture, as_image
from visionmamba.tasks.detection import TASK_NAME
from visionmamba.tasks.files import plain_name, replace_file
from visionmamba.tasks.overlay import Palette, add_legend, draw_objects, palette_of
from visionmamba.tasks.run_lengths import compress
from visionmamba.tasks.task_weights import TaskWeights
from visionmamba.tasks.tiles import DetectionInference, find_objects

_MIN_PICTURE_SIDE_PX = 512
_NO_COLOUR = (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class Detections:
    """The objects of a picture in its own pixels, best first. Arrays cannot be written to."""

    boxes: NDArray[np.float64] = field(compare=False)
    """(n, 4): left, top, right, bottom."""
    scores: NDArray[np.float64] = field(compare=False)
    """(n,) from 0 to 1."""
    labels: NDArray[np.int64] = field(compare=False)
    """(n,): 1 for the first of `class_names`; 0 is left to the background."""
    classes: tuple[str, ...]
    """Name of the class of each object."""
    run_lengths: tuple[Counts, ...] = field(repr=False, compare=False)
    """Each mask as lengths of runs of 0 and 1 in turn, column after column."""
    class_names: tuple[str, ...] = field(repr=False)
    """Names of all classes that could occur."""
    category_ids: tuple[int, ...] = field(repr=False)
    """Number of each of `class_names` in the annotations that the model learned from."""
    palette: Palette = field(repr=False)
    """Red, green and blue of each of `class_names`."""
    file: str | None = None
    """Where the picture came from; None for images and arrays in memory."""
    picture: Image.Image = field(repr=False, compare=False)
    """The picture, upright."""

    def __len__(self) -> int:
        """Number of objects."""
        return len(self.labels)

    @property
    def counts(self) -> dict[str, int]:
        """How many objects there are of each class that occurs, the most frequent one first."""
        return dict(Counter(self.classes).most_common())

    @property
    def masks(self) -> NDArray[np.bool_]:
        """(n, H, W), made when asked for; for many objects on a large picture take `mask(k)`."""
        masks = np.zeros((len(self), self.picture.height, self.picture.width), dtype=np.bool_)
        for number in range(len(self)):
            masks[number] = self.mask(number)
        return masks

    def mask(self, number: int) -> NDArray[np.bool_]:
        """Returns (H, W): the pixels of object `number`, counted from 0.

        Raises:
            IndexError: there are fewer objects.
        """
        counts = self.run_lengths[number]
        return decode_mask(counts, self.picture.height, self.picture.width).view(np.bool_)

    def overlay(self, *, opacity: float = 0.5, legend: bool = False) -> Image.Image:
        """Returns the picture with masks, boxes and, where there is room, names on it, "RGB".

        Objects have the colours of their classes, or each its own where the model knows one class.

        Args:
            opacity: of the masks: 0 shows boxes alone.
            legend: write the number of objects of each class under it, which makes the picture
                higher, and enlarge one of less than 512 pixels a side.

        Raises:
            ValueError: the opacity is out of range.
        """
        scale = -(-_MIN_PICTURE_SIDE_PX // max(self.picture.size)) if legend else 1
        drawn = draw_objects(
            self.picture,
            boxes=self.boxes,
            labels=self.labels,
            class_names=self.class_names,
            palette=self.palette,
            masks=self.run_lengths,
            scores=self.scores,
            opacity=opacity,
            scale=scale,
        )
        if not legend:
            return drawn
        colours = dict(zip(self.class_names, self.palette, strict=True))
        if len(colours) == 1:
            colours = dict.fromkeys(colours, _NO_COLOUR)  # each object has its own
        entries = [(f"{count} {name}", colours[name]) for name, count in self.counts.items()]
        return add_legend(drawn, entries)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON; masks as COCO's run lengths, best object first."""
        height, width = self.picture.height, self.picture.width
        return {
            "file": self.file,
            "height": height,
            "width": width,
            "objects": [
                {
                    "name": name,
                    "category_id": self.category_ids[label - 1],
                    "score": score,
                    "box": box,
                    "mask": {"size": [height, width], "counts": compress(counts)},
                }
                for name, label, score, box, counts in zip(
                    self.classes,
                    self.labels.tolist(),
                    self.scores.tolist(),
                    self.boxes.tolist(),
                    self.run_lengths,
                    strict=True,
                )
            ],
        }

    def coco_results(self, image_id: int) -> list[dict[str, Any]]:
        """Returns the objects as COCO's results list them, for one of its evaluators.

        Args:
            image_id: number of the picture in the annotation file.
        """
        return [
            {
                "image_id": image_id,
                "category_id": one["category_id"],
                "bbox": [left, top, right - left, bottom - top],
                "score": one["score"],
                "segmentation": one["mask"],
            }
            for one in self.to_dict()["objects"]
            for left, top, right, bottom in [one["box"]]
        ]

    def save(self, folder: str | Path, *, name: str | None = None) -> Path:
        """Writes NAME.json and NAME_overlay.png into a folder, which is made when missing.

        Args:
            folder: where to write; files of the same names are replaced.
            name: without ending; by default that of the picture's file, or "image".

        Returns:
            The path of the JSON file.

        Raises:
            ValueError: the name is no plain file name.
        """
        name = plain_name(name or (Path(self.file).stem if self.file else "") or "image")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{name}_overlay.png", self.overlay(legend=True))
        target = folder / f"{name}.json"
        replace_file(target, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")
        return target


class Detector:
    """Pictures in, objects out; `Detector.load(weights)("kitchen.jpg")`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        preprocessing: DetectionPreprocessing,
        class_names: tuple[str, ...],
        inference: DetectionInference | None = None,
        category_ids: Sequence[int] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        device: str | torch.device = "auto",
    ) -> None:
        """Takes a model with the face of torchvision's detectors.

        Args:
            model: in evaluation mode, into which it is put, a list of (3, h, w) to a list of dicts
                of "boxes" (n, 4), "scores" (n,), "labels" (n,) from 1, and "masks" (n, h, w) or
                (n, 1, h, w), bool or from 0 to 1.
            preprocessing: how pictures become its input.
            class_names: label k is the k-th, counted from 1.
            inference: windows, and the score that objects need to be told; None goes over a picture
                in one pass.
            category_ids: number of each class in annotations; None counts from 1.
            palette: one colour a class; None makes some.
            device: "auto" takes the GPU when there is one.

        Raises:
            ValueError: the device is unknown or absent, or the palette or the numbers are of
                another number of classes.
        """
        self.device = resolve_device(device)
        self.model = model.eval().to(self.device)
        self.preprocessing = preprocessing
        self.class_names = class_names
        self.inference = inference or DetectionInference.of_size(preprocessing.size)
        self.category_ids = _category_ids(category_ids, len(class_names))
        self.palette = palette_of(palette, len(class_names))

    @classmethod
    def load(
        cls,
        weights: str | os.PathLike[str],
        *,
        device: str = "auto",
        inference: DetectionInference | None = None,
    ) -> "Detector":
        """Returns the detector that weights hold.

        Args:
            weights: a file or folder that training or `visionmamba.save` wrote, or a repository of
                the Hub.
            device: "auto" takes the GPU when there is one.
            inference: windows and least score instead of the weights' own.

        Raises:
            FileNotFoundError: there is no such file, and the Hub is out of reach.
            ValueError: it is damaged, too new, of another task, or says nothing about preparation.
        """
        held = TaskWeights.find(weights, task=TASK_NAME, trained="detector")
        try:
            category_ids = _category_ids(
                held.header.details.get("category_ids"), len(held.header.class_names)
            )
        except ValueError as error:
            raise ValueError(f"{held.where} has a damaged header ({error}); get it again") from None
        return cls(
            held.model(device),
            preprocessing=held.preprocessing(DetectionPreprocessing.from_dict),
            class_names=held.header.class_names,
            inference=inference or held.inference(DetectionInference),
            category_ids=category_ids,
            palette=held.palette,
            device=device,
        )

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence too, but of no pictures
        self, pictures: Picture, *, min_score: float | None = None, max_pixels: int = MAX_PIXELS
    ) -> Detections: ...

    @overload
    def __call__(
        self,
        pictures: Sequence[Picture],
        *,
        min_score: float | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> list[Detections]: ...

    def __call__(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        min_score: float | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> Detections | list[Detections]:
        """Returns the objects of one picture, or a list for a list or tuple of pictures.

        Pictures go through the model one after another; a list of results holds all pictures, so
        that of thousands each is better asked for and saved by itself. A picture much larger than
        the model's image size is better gone over in windows: tiles.py says how their results are
        put together, `DetectionInference(mode="slide")` asks for them.

        Args:
            pictures: files, PIL images or uint8 arrays (H, W), (H, W, 3), (H, W, 4), one or many.
            min_score: objects scored lower are left out; None takes that of `inference`. The model
                itself reports none below its own score_threshold.
            max_pixels: width times height beyond which a file is refused before it is decoded.

        Raises:
            FileNotFoundError, UnreadableImageError: a file is missing or no image.
            ValueError: an array of another shape or type, or a score out of range.
            BatchTooLargeError: what goes through the model at once does not fit into memory.
        """
        least = self.inference.min_score if min_score is None else min_score
        if not 0 <= least <= 1:
            raise ValueError(f"min_score must lie between 0 and 1, got {least}")
        if isinstance(pictures, str | Path | Image.Image | np.ndarray):
            return self._detect(pictures, least, max_pixels)
        return [self._detect(picture, least, max_pixels) for picture in pictures]

    def _detect(self, picture: Picture, min_score: float, max_pixels: int) -> Detections:
        image = as_image(picture, max_pixels).convert("RGB")
        at_once = self.inference.num_windows if self.inference.mode == "slide" else 1
        with explain_out_of_memory(at_once, option="num_windows"), torch.inference_mode():
            found = find_objects(
                self.model,
                image,
                preprocessing=self.preprocessing,
                inference=self.inference,
                min_score=min_score,
                device=self.device,
            )
        for values in (found.boxes, found.scores, found.labels, *found.masks):
            values.setflags(write=False)
        return Detections(
            boxes=found.boxes,
            scores=found.scores,
            labels=found.labels,
            classes=tuple(self.class_names[label - 1] for label in found.labels.tolist()),
            run_lengths=found.masks,
            class_names=self.class_names,
            category_ids=self.category_ids,
            palette=self.palette,
            file=str(picture) if isinstance(picture, str | Path) else None,
            picture=image,
        )


def _category_ids(given: object, count: int) -> tuple[int, ...]:
    """Returns one number a class, from 1 where none are given; ValueError for anything else."""
    if given is None:
        return tuple(range(1, count + 1))
    are_numbers = isinstance(given, list | tuple) and all(type(one) is int for one in given)
    if not isinstance(given, list | tuple) or not are_numbers or len(set(given)) != count:
        raise ValueError(
            f"category_ids must be {count} different whole numbers, one a class; got {given!r}"
        )
    return tuple(given)
