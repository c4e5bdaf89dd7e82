"""Naming what a picture shows: the predictor, and what it answers."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from visionmamba.data import (
    MAX_PIXELS,
    Preprocessing,
    as_upright_eight_bit,
    explain_out_of_memory,
    open_image,
)
from visionmamba.models.deit import DeiT
from visionmamba.models.detection import DetectionModel
from visionmamba.models.hub import find_weights
from visionmamba.models.published import load_published
from visionmamba.models.published_file import Which
from visionmamba.models.segmentation import SegmentationModel
from visionmamba.models.vim import Vim
from visionmamba.models.weights import (
    METADATA_KEY,
    load,
    read_header,
    read_metadata,
    resolve_device,
)
from visionmamba.tasks.classification import TASK_NAME
from visionmamba.tasks.files import plain_name, replace_file

Picture = str | Path | Image.Image | NDArray[Any]
"""What a predictor takes: a file, a PIL image, or uint8 (H, W), (H, W, 1), (H, W, 3), (H, W, 4)."""

_THUMBNAIL_SIDE_PX = 512
_BAR_HEIGHT_PX = 18
_MIN_PICTURE_WIDTH_PX = 256


@dataclass(frozen=True, kw_only=True)
class Classification:
    """What a picture shows, most probable first."""

    labels: tuple[str, ...]
    """Names of the classes."""
    probabilities: tuple[float, ...]
    """One a label, 0 to 1; over all classes they sum to 1."""
    file: str | None = None
    """Where the picture came from; None for images and arrays in memory."""
    picture: Image.Image = field(repr=False, compare=False)
    """The picture, reduced to at most 512 px a side."""

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.labels[0]

    @property
    def probability(self) -> float:
        """The probability of the most probable class."""
        return self.probabilities[0]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON."""
        return {
            "file": self.file,
            "labels": list(self.labels),
            "probabilities": list(self.probabilities),
        }

    def save(self, folder: str | Path, *, name: str | None = None) -> Path:
        """Writes NAME.json and the annotated NAME.png into a folder, which is made when missing.

        Args:
            folder: where to write; files of the same name are replaced.
            name: without ending; by default that of the picture's file, or "image".

        Returns:
            The path of the JSON file.

        Raises:
            ValueError: the name is no plain file name.
        """
        name = plain_name(name or (Path(self.file).stem if self.file else "") or "image")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{name}.png", self._annotated())
        target = folder / f"{name}.json"
        replace_file(target, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")
        return target

    def _annotated(self) -> Image.Image:
        scale = max(1, _MIN_PICTURE_WIDTH_PX // self.picture.width)
        size = (self.picture.width * scale, self.picture.height * scale)
        enlarged = self.picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
        width = max(enlarged.width, _MIN_PICTURE_WIDTH_PX)
        height = enlarged.height + _BAR_HEIGHT_PX * len(self.labels) + 4
        canvas = Image.new("RGB", (width, height), "white")
        canvas.paste(enlarged, ((width - enlarged.width) // 2, 0))
        draw = ImageDraw.Draw(canvas)
        font = ImageFont.load_default(size=12)
        lines = zip(self.labels, self.probabilities, strict=True)
        for row, (label, probability) in enumerate(lines):
            top = enlarged.height + 4 + row * _BAR_HEIGHT_PX
            bar = (0, top, round(width * probability), top + _BAR_HEIGHT_PX - 4)
            draw.rectangle(bar, fill="#bcd4ee")
            draw.text((4, top - 1), f"{probability:6.1%}  {label}", fill="black", font=font)
        return canvas


class Classifier:
    """Pictures in, classifications out; `Classifier.load(weights)("picture.jpg")`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        preprocessing: Preprocessing,
        class_names: tuple[str, ...],
        device: str | torch.device = "auto",
    ) -> None:
        """Take a model whose outputs are the classes, in order.

        Raises:
            ValueError: the device is unknown or absent.
        """
        self.device = resolve_device(device)
        self.model = model.eval().to(self.device)
        self.preprocessing = preprocessing
        self.class_names = class_names
        self._transform = preprocessing.build()

    @classmethod
    def load(
        cls,
        weights: str | os.PathLike[str],
        *,
        device: str = "auto",
        which: Which = "model",
    ) -> "Classifier":
        """Returns the classifier that weights hold.

        Args:
            weights: a file or folder that `fit` or `visionmamba.save` wrote, the authors' .pth, a
                name that `visionmamba models` lists, or a repository of the Hub.
            device: "auto" takes the GPU when there is one.
            which: entry of the authors' file: the raw weights or their moving average.

        Raises:
            FileNotFoundError: there is no such file, and the Hub is out of reach.
            ValueError: it is damaged, too new, of another task, or says nothing about preparation.
        """
        where, path = os.fspath(weights), find_weights(weights)
        model: Vim | DeiT | SegmentationModel | DetectionModel
        if path.suffix == ".safetensors" and METADATA_KEY in read_metadata(path):
            task = read_header(path).task
            if task != TASK_NAME:
                raise ValueError(
                    f"{where} was trained for {task}, wanted {TASK_NAME}; use the predictor of "
                    "that task"
                )
            model = load(path, device=device)
        else:
            model = load_published(path, which=which)
        header = model.header
        assert header is not None
        if not model.config.num_classes:
            raise ValueError(
                f"{where} has no classifier (num_classes=0); give weights that kept their head"
            )
        if not header.preprocessing:
            raise ValueError(
                f"{where} does not say how pictures are prepared; "
                "save it with visionmamba.save(..., preprocessing=...)"
            )
        names = header.class_names or tuple(map(str, range(model.config.num_classes)))
        if len(names) != model.config.num_classes:
            raise ValueError(
                f"{where} names {len(names)} classes, and its model has "
                f"{model.config.num_classes}; get it again"
            )
        try:
            preprocessing = Preprocessing.from_dict(header.preprocessing)
        except ValueError as error:
            raise ValueError(f"{where} has a damaged header ({error}); get it again") from None
        return cls(model, preprocessing=preprocessing, class_names=names, device=device)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence too, but of no pictures
        self,
        pictures: Picture,
        *,
        top_k: int = 5,
        batch_size: int = 32,
        max_pixels: int = MAX_PIXELS,
    ) -> Classification: ...

    @overload
    def __call__(
        self,
        pictures: Sequence[Picture],
        *,
        top_k: int = 5,
        batch_size: int = 32,
        max_pixels: int = MAX_PIXELS,
    ) -> list[Classification]: ...

    def __call__(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        top_k: int = 5,
        batch_size: int = 32,
        max_pixels: int = MAX_PIXELS,
    ) -> Classification | list[Classification]:
        """Returns what one picture shows, or a list for a list or tuple of pictures.

        Args:
            pictures: files, PIL images or uint8 arrays (H, W), (H, W, 3), (H, W, 4), one or many.
            top_k: how many classes to report; fewer when there are fewer classes.
            batch_size: pictures that go through the model at once.
            max_pixels: width times height beyond which a file is refused before it is decoded.

        Raises:
            FileNotFoundError, UnreadableImageError: a file is missing or no image.
            ValueError: an array of another shape or type, or top_k or batch_size below 1.
            BatchTooLargeError: a batch does not fit into memory.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(pictures, str | Path | Image.Image | np.ndarray):
            return self._classify([pictures], top_k, max_pixels)[0]
        classified: list[Classification] = []
        for start in range(0, len(pictures), batch_size):
            classified += self._classify(pictures[start : start + batch_size], top_k, max_pixels)
        return classified

    def _classify(
        self, pictures: Sequence[Picture], top_k: int, max_pixels: int
    ) -> list[Classification]:
        images = [as_image(picture, max_pixels) for picture in pictures]
        with explain_out_of_memory(len(images)):
            batch = torch.stack([self._transform(image) for image in images]).to(self.device)
            with torch.inference_mode():
                probabilities = self.model(batch).float().softmax(dim=-1).cpu()
        values, indices = probabilities.topk(min(top_k, len(self.class_names)))
        return [
            Classification(
                labels=tuple(self.class_names[index] for index in row_indices),
                probabilities=tuple(row_values),
                file=str(picture) if isinstance(picture, str | Path) else None,
                picture=_thumbnail(image),
            )
            for picture, image, row_values, row_indices in zip(
                pictures, images, values.tolist(), indices.tolist(), strict=True
            )
        ]


def as_image(picture: Picture, max_pixels: int) -> Image.Image:
    """Returns the picture meant, upright, "L" or "RGB".

    Raises:
        FileNotFoundError, UnreadableImageError: a file is missing or no image.
        ValueError: an array of another shape or type, or something else altogether.
    """
    if isinstance(picture, str | Path):
        return open_image(picture, max_pixels=max_pixels)
    if isinstance(picture, Image.Image):
        return as_upright_eight_bit(picture, "the picture")
    if not isinstance(picture, np.ndarray):
        raise ValueError(
            f"a picture must be a path, a PIL image or a uint8 array, got {type(picture).__name__}"
        )
    if picture.dtype != np.uint8:
        raise ValueError(
            f"a picture array must be uint8 with values 0 to 255, got {picture.dtype}; "
            "scale and convert it"
        )
    if picture.ndim == 3 and picture.shape[2] == 1:
        picture = picture[:, :, 0]
    if picture.size == 0 or not (
        picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4))
    ):
        raise ValueError(
            f"a picture array must be (H, W), (H, W, 3) or (H, W, 4), got {picture.shape}; "
            "give several pictures as a list"
        )
    return Image.fromarray(picture)


def _thumbnail(image: Image.Image) -> Image.Image:
    copy = image.copy()
    copy.thumbnail((_THUMBNAIL_SIDE_PX, _THUMBNAIL_SIDE_PX))
    return copy
