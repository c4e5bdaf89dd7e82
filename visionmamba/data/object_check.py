"""Whether annotations in COCO's format and their pictures can be used, and what they hold."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from visionmamba.data.coco import Coco, FileObjects, check_categories
from visionmamba.data.image_files import MAX_PIXELS, UnreadableImageError
from visionmamba.data.mask_check import Progress, unchanged, write_csv
from visionmamba.data.object_sources import open_annotations

_SPLITS = ("train", "val")
_SMALL_AREA, _LARGE_AREA = 32**2, 96**2  # pixels: where COCO's small objects end, large ones begin
NO_AREA = "no area"
"""The kind of those problems that stop nothing: objects that nothing is seen of."""


class ObjectProblem(NamedTuple):
    """Something that cannot be used."""

    kind: str
    """"annotation", "picture", "categories", or `NO_AREA`."""
    split: str
    message: str
    """A sentence that names the file and, for annotations, the ids of image and annotation."""


@dataclass(frozen=True, kw_only=True)
class ObjectCounts:
    """What one split holds, without what cannot be used."""

    split: str
    num_images: int
    """Pictures that can be used."""
    num_empty: int
    """Of them those without objects, crowds aside."""
    most_objects: int
    """Objects of the fullest picture; a detector that reports fewer cannot find all."""
    objects: tuple[int, ...]
    """Objects of each class, crowds aside."""
    images: tuple[int, ...]
    """Pictures that show each class."""
    sizes: tuple[tuple[int, int, int], ...]
    """Small, medium and large objects of each class, by COCO's bounds of 32 x 32 and 96 x 96
    pixels."""
    num_crowds: int
    """Regions of objects too many to tell apart."""


@dataclass(frozen=True, kw_only=True)
class ObjectReport:
    """What `check_objects` found."""

    class_names: tuple[str, ...]
    """Of all splits together."""
    has_masks: bool
    """Whether objects have masks, not only boxes."""
    splits: tuple[ObjectCounts, ...]
    problems: tuple[ObjectProblem, ...]
    """In the order of the splits and of their files."""

    @property
    def num_problems(self) -> dict[str, int]:
        """How many problems there are of each kind."""
        return dict(Counter(problem.kind for problem in self.problems))

    @property
    def is_usable(self) -> bool:
        """Whether training and evaluation take everything as it is."""
        return not set(self.num_problems) - {NO_AREA}

    @property
    def never_learnt(self) -> tuple[str, ...]:
        """Classes that no training picture shows."""
        train = next((counts for counts in self.splits if counts.split == "train"), None)
        if train is None:
            return ()
        pairs = zip(self.class_names, train.objects, strict=True)
        return tuple(name for name, count in pairs if not count)

    def save(self, folder: Path) -> Path:
        """Writes classes.csv and problems.csv into a folder and returns it."""
        folder.mkdir(parents=True, exist_ok=True)
        columns = ("objects", "images", "small", "medium", "large")
        header = ["class", *(f"{one.split}_{name}" for one in self.splits for name in columns)]
        rows: list[list[object]] = [list(header)]
        for index, name in enumerate(self.class_names):
            row: list[object] = [name]
            for one in self.splits:
                row += [one.objects[index], one.images[index], *one.sizes[index]]
            rows.append(row)
        write_csv(folder / "classes.csv", rows)
        write_csv(
            folder / "problems.csv", [["kind", "split", "message"], *map(list, self.problems)]
        )
        return folder


def check_objects(
    data: str | Path,
    *,
    images: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> ObjectReport:
    """Reads every annotation and opens every picture, and returns what is wrong with them.

    Args:
        data: the root of a `Coco`, of whose splits those that are there are checked, or one
            annotation file.
        images: folder that file names count from when `data` is an annotation file.
        max_pixels: largest picture, width times height.
        num_workers: processes that open pictures beside this one; 0 opens them in this one.
        progress: is called after each picture.

    Raises:
        FileNotFoundError: the folder, the annotation file or the folder of pictures is missing.
        ValueError: an annotation file is no JSON, not COCO's, or has nothing that can be used.
        ImportError: outlines of objects need faster-coco-eval.
    """
    sets = _open(Path(data), images, max_pixels)
    class_names = tuple(dict.fromkeys(name for one in sets.values() for name in one.class_names))
    problems: list[ObjectProblem] = []
    if len(sets) == len(_SPLITS):
        try:
            check_categories(Path(data), *sets.values())
        except ValueError as error:
            problems.append(ObjectProblem("categories", "train and val", str(error)))
    total, num_done = sum(map(len, sets.values())), 0
    splits: list[ObjectCounts] = []
    for split, pictures in sets.items():
        table = pictures.table
        problems += [ObjectProblem("annotation", split, text) for text in table.problems]
        counted: list[_Checked] = []
        for checked in _checks(pictures, num_workers):
            num_done += 1
            if progress is not None:
                progress(num_done, total)
            if checked.problem is not None:
                problems.append(ObjectProblem("picture", split, checked.problem))
                continue
            counted.append(checked)
        problems += [ObjectProblem(NO_AREA, split, text) for text in table.without_area]
        own_names = [class_names.index(name) for name in pictures.class_names]
        splits.append(_count(split, counted, np.array(own_names), num_classes=len(class_names)))
    return ObjectReport(
        class_names=class_names,
        has_masks=all(one.has_masks for one in sets.values()),
        splits=tuple(splits),
        problems=tuple(problems),
    )


def _open(data: Path, images: Path | None, max_pixels: int) -> dict[str, FileObjects]:
    """Returns the sets by their splits' names."""
    if data.suffix == ".json":
        return {
            data.stem: open_annotations(
                data, images=images, on_unreadable="skip", max_pixels=max_pixels
            )
        }
    source = Coco(root=data, keep_empty=True, on_unreadable="skip", max_pixels=max_pixels)
    there = [split for split in _SPLITS if source.has(split)]
    return {split: source.open(split) for split in there or _SPLITS}


class _Checked(NamedTuple):
    problem: str | None
    """What is wrong with the picture."""
    labels: NDArray[np.int64]
    """(n,) of the objects, crowds aside."""
    areas: NDArray[np.float64]
    """(n,) in pixels."""
    num_crowds: int


class _Checks(Dataset[_Checked]):
    def __init__(self, pictures: FileObjects) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> _Checked:
        objects = self._pictures.objects(index)
        problem = None
        try:
            self._pictures.image(index)
        except (UnreadableImageError, FileNotFoundError) as error:
            problem = str(error)
        is_single = ~objects.is_crowd
        return _Checked(
            problem,
            objects.labels[is_single],
            objects.areas[is_single],
            int(objects.is_crowd.sum()),
        )


def _checks(pictures: FileObjects, num_workers: int) -> Iterator[_Checked]:
    loader: Any = DataLoader(
        _Checks(pictures), batch_size=None, collate_fn=unchanged, num_workers=num_workers
    )
    return iter(loader)


def _count(
    split: str, pictures: list[_Checked], class_of: NDArray[np.intp], *, num_classes: int
) -> ObjectCounts:
    sizes = np.zeros((num_classes, 3), dtype=np.int64)
    images = np.zeros(num_classes, dtype=np.int64)
    for one in pictures:
        classes = class_of[one.labels - 1]
        size = np.digitize(one.areas, (_SMALL_AREA, _LARGE_AREA))
        np.add.at(sizes, (classes, size), 1)
        images[np.unique(classes)] += 1
    nums = [len(one.labels) for one in pictures]
    return ObjectCounts(
        split=split,
        num_images=len(pictures),
        num_empty=nums.count(0),
        most_objects=max(nums, default=0),
        objects=tuple(sizes.sum(axis=1).tolist()),
        images=tuple(images.tolist()),
        sizes=tuple((small, medium, large) for small, medium, large in sizes.tolist()),
        num_crowds=sum(one.num_crowds for one in pictures),
    )
