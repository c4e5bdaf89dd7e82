"""Sets of pictures with objects: boxes, classes and masks; those of files in COCO's layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from visionmamba.data.coco_json import (
    MAX_JSON_BYTES,
    AnnotationError,
    CocoImage,
    CocoTable,
    read_coco,
)
from visionmamba.data.image_files import MAX_PIXELS, UnreadableImageError, open_image
from visionmamba.data.object_masks import Counts, mask_area, segment_counts
from visionmamba.data.sets import OnUnreadable

_ANNOTATIONS = (
    "annotations/instances_{split}2017.json",
    "annotations/instances_{split}.json",
    "annotations/{split}.json",
    "{split}/annotations.json",
    "{split}/_annotations.coco.json",
)
_IMAGES = ("{split}2017", "images/{split}2017", "images/{split}", "{split}/images", "{split}",
           "images")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Objects:
    """What is to be found in one picture, in its own pixels."""

    image_id: int
    """Number of the picture, as its annotation file counts."""
    height: int
    width: int
    boxes: NDArray[np.float64]
    """(n, 4): left, top, right, bottom."""
    labels: NDArray[np.int64]
    """(n,), from 1; 0 is left to the background."""
    is_crowd: NDArray[np.bool_]
    """(n,): regions of objects too many to tell apart; not learned, and not judged."""
    areas: NDArray[np.float64]
    """(n,): pixels of each object, as annotated."""
    masks: tuple[Counts, ...] | None
    """Run lengths of each mask; None where the set has boxes only."""

    def __len__(self) -> int:
        return len(self.labels)


class DetectionSet(Protocol):
    """Pictures with objects that can be asked for one at a time, from any process."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; label k is the k-th, counted from 1."""

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Numbers of the classes in the set's annotation files, one a class."""

    @property
    def has_masks(self) -> bool:
        """Whether objects have masks, not only boxes."""

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Files and objects that were left out of the set from the start, each with the reason."""

    @property
    def on_unreadable(self) -> OnUnreadable:
        """Whether batches stop at a picture that cannot be used, or do without it."""

    def __len__(self) -> int: ...

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of picture `index`, without opening it."""

    def image(self, index: int) -> Image.Image:
        """Picture `index`, upright, "RGB"."""

    def objects(self, index: int) -> Objects:
        """What is in picture `index`, possibly nothing."""

    def file(self, index: int) -> Path | None:
        """File of picture `index`; None for pictures that come from no file."""

    def order(self, generator: torch.Generator) -> Tensor:
        """Returns (num_images,) int64: the order of a pass of training."""


class DetectionSplits(NamedTuple):
    """The two halves of a data set, over the same classes."""

    train: DetectionSet
    val: DetectionSet


@dataclass(frozen=True, kw_only=True)
class Coco:
    """Any data set in COCO's format; classes are the annotation files' categories.

    Taken as they are: COCO 2017 (annotations/instances_{train,val}2017.json, {train,val}2017/),
    annotations/{train,val}.json beside images/ or {train,val}/, and {train,val}/annotations.json
    beside the pictures. File names count from the folder of pictures or from the root.
    """

    root: Path = Path("data/coco")
    """Folder of everything; file names in the JSON never lead out of it, or of the folder of
    pictures below it, which may be a link."""
    train_annotations: Path | None = None
    """JSON file to learn from, below the root; None looks where it usually is."""
    val_annotations: Path | None = None
    """JSON file to judge on, below the root."""
    train_images: Path | None = None
    """Folder of the pictures to learn from, below the root; None looks where it usually is."""
    val_images: Path | None = None
    """Folder of the pictures to judge on, below the root."""
    keep_empty: bool = False
    """Whether pictures without objects (crowds aside) are trained on too; the published training
    leaves them out. They always count in evaluation."""
    on_unreadable: OnUnreadable = "fail"
    """"fail" stops at the first broken annotation or picture and names it; "skip" goes on without;
    both list it."""
    max_pixels: int = MAX_PIXELS
    """Largest picture, width times height."""
    max_json_bytes: int = MAX_JSON_BYTES
    """Largest annotation file."""

    def build(self) -> DetectionSplits:
        """Returns the pictures of both splits.

        Raises:
            FileNotFoundError: the root, an annotation file or a folder of pictures is missing.
            ValueError: annotations are broken, or the categories of both disagree.
        """
        train, val = self.open("train"), self.open("val")
        check_categories(self.root, train, val)
        return DetectionSplits(train, val)

    def has(self, split: str) -> bool:
        """Whether there is an annotation file of "train" or "val" where it usually is, or said."""
        places = self._places(split, "annotations", _ANNOTATIONS)
        return any((self.root / place).is_file() for place in places)

    def open(self, split: str) -> "FileObjects":
        """Returns the pictures of "train" or "val".

        Raises:
            FileNotFoundError: the root, the annotation file or the folder of pictures is missing.
            ValueError: the annotations are broken, or there is no such split.
        """
        if split not in ("train", "val"):
            raise ValueError(f"sets in COCO's format have the splits train and val, got {split}")
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"there is no folder {self.root}; wanted one that holds annotations/*.json and "
                "folders of images"
            )
        annotations = self._find(split, "annotations", _ANNOTATIONS)
        table = read_coco(
            annotations,
            on_broken=self.on_unreadable,
            max_pixels=self.max_pixels,
            max_bytes=self.max_json_bytes,
        )
        pictures = np.arange(len(table.images))
        if len(table.is_crowd) and table.is_crowd.all():
            raise AnnotationError(f"{annotations} has crowds only, wanted single objects; add some")
        if split == "train" and not self.keep_empty:
            learnable = np.concatenate([[0], np.cumsum(~table.is_crowd)])[table.first]
            pictures = np.flatnonzero(learnable[1:] > learnable[:-1])
        if not len(pictures):
            raise AnnotationError(f"{annotations} has no image with objects; add some")
        folder = self._find(split, "images", _IMAGES)
        first = table.images[pictures[0]].file_name
        from_root = not (folder / first).exists() and (self.root / first).exists()
        return FileObjects(
            folder=self.root if from_root else folder,
            homes=(self.root.resolve(), folder.resolve()),
            table=table,
            pictures=pictures,
            on_unreadable=self.on_unreadable,
            max_pixels=self.max_pixels,
        )

    def _find(self, split: str, what: str, patterns: Sequence[str]) -> Path:
        """Returns the annotation file or the folder of pictures of a split."""
        places = self._places(split, what, patterns)
        is_there = Path.is_file if what == "annotations" else Path.is_dir
        for place in places:
            if is_there(self.root / place):
                return self.root / place
        kind = "annotation file" if what == "annotations" else "folder of images"
        raise FileNotFoundError(
            f"there is no {kind} of {split} in {self.root}; wanted {_either(places)}: name another "
            f"with {split}_{what}, or give eval and check the annotation file itself"
        )

    def _places(self, split: str, what: str, patterns: Sequence[str]) -> list[Path]:
        """Returns where a thing of a split may be, below the root."""
        given: Path | None = getattr(self, f"{split}_{what}")
        if given is not None and (given.is_absolute() or ".." in given.parts):
            raise ValueError(
                f"{split}_{what} must be a path below the root {self.root}, got {given}"
            )
        return [given] if given else [Path(pattern.format(split=split)) for pattern in patterns]


@dataclass(frozen=True, kw_only=True)
class FileObjects:
    """Pictures in files, their objects in one annotation file."""

    folder: Path
    """Where file names count from."""
    homes: tuple[Path, ...]
    """Folders, without links, one of which every file must lie in."""
    table: CocoTable
    pictures: NDArray[np.int64]
    """Which of the table's images belong to the set."""
    on_unreadable: OnUnreadable = "fail"
    """Whether batches stop at a picture that cannot be used, or do without it."""
    max_pixels: int = MAX_PIXELS
    """Largest picture, width times height."""

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their categories' ids."""
        return self.table.class_names

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Ids of the categories, one a class."""
        return self.table.category_ids

    @property
    def has_masks(self) -> bool:
        """Whether objects have masks, not only boxes."""
        return self.table.segments is not None

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Images and objects that were left out of the set from the start, with the reasons."""
        return self.table.left_out

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of picture `index`, as annotated."""
        image = self._listed(index)
        return image.height, image.width

    def image(self, index: int) -> Image.Image:
        """Opens picture `index`.

        Raises:
            FileNotFoundError: there is no such file.
            UnreadableImageError: it is no image, of another size than annotated, or leads out of
                the data set's folders.
        """
        file, listed = self.file(index), self._listed(index)
        try:
            place = file.resolve()
        except (OSError, RuntimeError) as error:  # a link to itself
            raise UnreadableImageError(
                f"{file} cannot be followed ({error}); put the file itself there"
            ) from error
        if not any(map(place.is_relative_to, self.homes)):
            raise UnreadableImageError(
                f"{file} leads to {place}, outside of {self.homes[0]}; put the file itself there"
            )
        image = open_image(file, max_pixels=self.max_pixels)
        if image.size != (listed.width, listed.height):
            raise UnreadableImageError(
                f"{file} (image {listed.id}) is {image.width}x{image.height} px, its annotations "
                f"say {listed.width}x{listed.height}; make both agree"
            )
        return image if image.mode == "RGB" else image.convert("RGB")

    def objects(self, index: int) -> Objects:
        """Objects of picture `index`; ImportError when outlines need faster-coco-eval."""
        table, image = self.table, self._listed(index)
        start, stop = (int(row) for row in table.first[self.pictures[index] :][:2])
        masks = None
        if table.segments is not None:
            segments = (table.segments[row] for row in range(start, stop))
            masks = tuple(segment_counts(one, image.height, image.width) for one in segments)
        return Objects(
            image_id=image.id,
            height=image.height,
            width=image.width,
            boxes=table.boxes[start:stop],
            labels=table.labels[start:stop],
            is_crowd=table.is_crowd[start:stop],
            areas=_known_areas(table.areas[start:stop], table.boxes[start:stop], masks),
            masks=masks,
        )

    def file(self, index: int) -> Path:
        """File of picture `index`."""
        return self.folder / self._listed(index).file_name

    def order(self, generator: torch.Generator) -> Tensor:
        """Returns (num_images,) int64: any order, all equally probable."""
        return torch.randperm(len(self), generator=generator)

    def _listed(self, index: int) -> CocoImage:
        return self.table.images[int(self.pictures[index])]


def box_areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns (n,) areas of (n, 4) boxes."""
    areas: NDArray[np.float64] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return areas


def check_categories(root: Path, train: FileObjects, val: FileObjects) -> None:
    """Raises ValueError where the splits of a data set have other categories, or other kinds."""
    known = dict(zip(train.category_ids, train.class_names, strict=True))
    judged = dict(zip(val.category_ids, val.class_names, strict=True))
    if known == judged:
        if train.has_masks != val.has_masks:
            raise ValueError(
                f"{root} has masks in one split and only boxes in the other; take both from one "
                "export"
            )
        return
    different = sorted(known.items() ^ judged.items())
    category, name = different[0]
    raise ValueError(
        f"{root} has {len(known)} categories in train and {len(judged)} in val, which must be the "
        f"same by id and name; category {category} ({name}) is not: give both files one list"
    )


def _known_areas(
    areas: NDArray[np.float64], boxes: NDArray[np.float64], masks: tuple[Counts, ...] | None
) -> NDArray[np.float64]:
    if not np.isnan(areas).any():
        return areas
    counted = box_areas(boxes) if masks is None else np.array([mask_area(one) for one in masks])
    return np.where(np.isnan(areas), counted, areas)


def _either(places: Sequence[Path]) -> str:
    *others, last = map(str, places)
    return f"{', '.join(others)} or {last}" if others else last
