"""Saying what every pixel of a picture shows: the predictor, and what it answers."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from visionmamba.data import MAX_PIXELS, SegmentationPreprocessing, UnreadableImageError
from visionmamba.data.masks import MAX_CLASSES
from visionmamba.models.weights import resolve_device
from visionmamba.tasks.classifier import Picture, as_image
from visionmamba.tasks.files import plain_name, replace_file
from visionmamba.tasks.overlay import Palette, add_legend, blend_labels, paint_labels, palette_of
from visionmamba.tasks.run_lengths import encode_labels
from visionmamba.tasks.segmentation import TASK_NAME
from visionmamba.tasks.sliding import Inference, explain_large_picture, predict_labels
from visionmamba.tasks.task_weights import TaskWeights

_MIN_PICTURE_WIDTH_PX = 256


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """What every pixel of a picture shows."""

    labels: NDArray[np.uint8] = field(repr=False, compare=False)
    """(H, W), of the picture's own size: indices into `class_names`. Cannot be written to."""
    classes: tuple[str, ...]
    """Names of the classes that occur, the one of most pixels first."""
    shares: tuple[float, ...]
    """Share of the picture that each of `classes` covers; together 1."""
    indices: tuple[int, ...] = field(repr=False)
    """What `labels` holds for each of `classes`."""
    class_names: tuple[str, ...] = field(repr=False)
    """Names of all classes that could occur."""
    palette: Palette = field(repr=False)
    """Red, green and blue of each of `class_names`."""
    file: str | None = None
    """Where the picture came from; None for images and arrays in memory."""
    picture: Image.Image = field(repr=False, compare=False)
    """The picture, upright."""

    def mask(self, name: str) -> NDArray[np.bool_]:
        """Returns (H, W): where the picture shows a class.

        Raises:
            ValueError: there is no class of that name.
        """
        if name not in self.class_names:
            raise ValueError(f"there is no class {name!r}; classes: {', '.join(self.class_names)}")
        where: NDArray[np.bool_] = self.labels == self.class_names.index(name)
        return where

    def overlay(self, *, opacity: float = 0.5, legend: bool = False) -> Image.Image:
        """Returns the picture with the colours of its classes on it, "RGB".

        Args:
            opacity: of the colours: 0 shows the picture alone, 1 the classes alone.
            legend: write names and shares under it, which makes the picture higher, and enlarge
                one of less than 256 pixels across.

        Raises:
            ValueError: the opacity is out of range.
        """
        blended = blend_labels(self.picture, self.labels, self.palette, opacity=opacity)
        if not legend:
            return blended
        scale = max(1, _MIN_PICTURE_WIDTH_PX // blended.width)
        size = (blended.width * scale, blended.height * scale)
        entries = [
            (f"{share:.1%} {name}", self.palette[index])
            for name, share, index in zip(self.classes, self.shares, self.indices, strict=True)
        ]
        return add_legend(blended.resize(size, Image.Resampling.NEAREST), entries)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON; masks as COCO's run lengths, largest class first."""
        masks = encode_labels(self.labels)
        height, width = self.labels.shape
        return {
            "file": self.file,
            "height": height,
            "width": width,
            "classes": [
                {"name": name, "index": index, "share": share, "mask": masks[index]}
                for name, share, index in zip(self.classes, self.shares, self.indices, strict=True)
            ],
        }

    def save(self, folder: str | Path, *, name: str | None = None) -> Path:
        """Writes NAME.json, NAME_mask.png and NAME_overlay.png into a folder, made when missing.

        The mask is a palette picture of the picture's size whose pixels are the class indices.

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
        replace_file(folder / f"{name}_mask.png", paint_labels(self.labels, self.palette))
        replace_file(folder / f"{name}_overlay.png", self.overlay(legend=True))
        target = folder / f"{name}.json"
        replace_file(target, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")
        return target


class Segmenter:
    """Pictures in, segmentations out; `Segmenter.load(weights)("street.jpg")`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        preprocessing: SegmentationPreprocessing,
        class_names: tuple[str, ...],
        inference: Inference | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        device: str | torch.device = "auto",
    ) -> None:
        """Takes a model that gives (B, K, H, W) scores, K classes in order.

        Args:
            model: see above; it is put into evaluation mode.
            preprocessing: how pictures become its input.
            class_names: K names.
            inference: windows, scales and mirroring; None goes over a picture in one pass.
            palette: one colour a class; None makes some.
            device: "auto" takes the GPU when there is one.

        Raises:
            ValueError: the device is unknown or absent, there are too many classes, or the palette
                is of another number of classes.
        """
        if len(class_names) > MAX_CLASSES:
            raise ValueError(
                f"a segmenter takes at most {MAX_CLASSES} classes, got {len(class_names)}"
            )
        self.device = resolve_device(device)
        self.model = model.eval().to(self.device)
        self.preprocessing = preprocessing
        self.class_names = class_names
        self.inference = inference or Inference()
        self.palette = palette_of(palette, len(class_names))
        self._transform = preprocessing.build(None)

    @classmethod
    def load(
        cls,
        weights: str | os.PathLike[str],
        *,
        device: str = "auto",
        inference: Inference | None = None,
    ) -> "Segmenter":
        """Returns the segmenter that weights hold.

        Args:
            weights: a file or folder that training or `visionmamba.save` wrote, or a repository of
                the Hub.
            device: "auto" takes the GPU when there is one.
            inference: windows, scales and mirroring instead of the weights' own.

        Raises:
            FileNotFoundError: there is no such file, and the Hub is out of reach.
            ValueError: it is damaged, too new, of another task, or says nothing about preparation.
        """
        held = TaskWeights.find(weights, task=TASK_NAME, trained="segmenter")
        return cls(
            held.model(device),
            preprocessing=held.preprocessing(SegmentationPreprocessing.from_dict),
            class_names=held.header.class_names,
            inference=inference or held.inference(Inference),
            palette=held.palette,
            device=device,
        )

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence too, but of no pictures
        self, pictures: Picture, *, max_pixels: int = MAX_PIXELS
    ) -> Segmentation: ...

    @overload
    def __call__(
        self, pictures: Sequence[Picture], *, max_pixels: int = MAX_PIXELS
    ) -> list[Segmentation]: ...

    def __call__(
        self, pictures: Picture | Sequence[Picture], *, max_pixels: int = MAX_PIXELS
    ) -> Segmentation | list[Segmentation]:
        """Returns what the pixels of one picture show, or a list for a list or tuple of pictures.

        Pictures go through the model one after another, each at its own size; a list of results
        holds all pictures, so that of thousands each is better asked for and saved by itself.

        Args:
            pictures: files, PIL images or uint8 arrays (H, W), (H, W, 3), (H, W, 4), one or many.
            max_pixels: width times height beyond which a file is refused before it is decoded.

        Raises:
            FileNotFoundError, UnreadableImageError: a file is missing, no image, or too long a
                strip to be resized.
            ValueError: an array of another shape or type.
            BatchTooLargeError: a picture, or a batch of windows, does not fit into memory.
        """
        if isinstance(pictures, str | Path | Image.Image | np.ndarray):
            return self._segment(pictures, max_pixels)
        return [self._segment(picture, max_pixels) for picture in pictures]

    def _segment(self, picture: Picture, max_pixels: int) -> Segmentation:
        image = as_image(picture, max_pixels).convert("RGB")
        size = (image.height, image.width)
        file = str(picture) if isinstance(picture, str | Path) else None
        try:
            self.preprocessing.evaluation_size(*size)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"{file or 'the picture'} is too long: {error}") from None
        with explain_large_picture(self.inference, size), torch.inference_mode():
            prepared, _ = self._transform(image, None)
            labels = predict_labels(
                self.model, prepared[None], size=size, inference=self.inference, device=self.device
            )[0].numpy()
        labels.setflags(write=False)
        counts = np.bincount(labels.ravel(), minlength=len(self.class_names))
        order = [index for index in np.argsort(-counts, kind="stable").tolist() if counts[index]]
        return Segmentation(
            labels=labels,
            classes=tuple(self.class_names[index] for index in order),
            shares=tuple(float(counts[index] / labels.size) for index in order),
            indices=tuple(order),
            class_names=self.class_names,
            palette=self.palette,
            file=file,
            picture=image,
        )
