"""Whether all pictures and masks of a set can be used, and how much of it each class makes up."""

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from visionmamba.data.image_files import MAX_PIXELS, UnreadableImageError
from visionmamba.data.mask_folders import (
    ADE20K,
    Cityscapes,
    MaskFolder,
    MaskFormat,
    MaskSplit,
    mask_source,
)
from visionmamba.data.masks import IGNORE, FileMasks, MaskError, MaskProblem, check_decoded

Progress = Callable[[int, int], None]
"""Is told how many pictures are done, and of how many."""


@dataclass(frozen=True, kw_only=True)
class ClassCounts:
    """How often the classes occur in the usable masks of one split."""

    split: str
    num_images: int
    """Pictures that can be used."""
    pixels: tuple[int, ...]
    """Pixels of each class."""
    images: tuple[int, ...]
    """Pictures that show each class."""
    ignored_pixels: int
    """Pixels of no class."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each class the share of the pixels that belong to any; 0 where none does."""
        total = sum(self.pixels)
        return tuple(count / total if total else 0.0 for count in self.pixels)

    @property
    def ignored_share(self) -> float:
        """Share of all pixels that belong to no class."""
        total = sum(self.pixels) + self.ignored_pixels
        return self.ignored_pixels / total if total else 0.0


@dataclass(frozen=True, kw_only=True)
class MaskReport:
    """What `check_masks` found."""

    class_names: tuple[str, ...]
    splits: tuple[ClassCounts, ...]
    """Counts of each split that is there."""
    problems: tuple[MaskProblem, ...]
    """What is wrong, in the order of the splits and of the files' names."""

    @property
    def num_problems(self) -> dict[str, int]:
        """How many problems there are of each kind."""
        return dict(Counter(problem.kind for problem in self.problems))

    @property
    def never_learnt(self) -> tuple[str, ...]:
        """Classes that no training mask shows."""
        train = next((counts for counts in self.splits if counts.split == "train"), None)
        if train is None:
            return ()
        pairs = zip(self.class_names, train.pixels, strict=True)
        return tuple(name for name, pixels in pairs if not pixels)

    def save(self, folder: Path) -> Path:
        """Writes classes.csv and problems.csv into a folder and returns it."""
        folder.mkdir(parents=True, exist_ok=True)
        header = ["class"]
        for counts in self.splits:
            names = ("pixels", "share", "images")
            header += [f"{counts.split}_{name}" for name in names]
        rows: list[list[object]] = [list(header)]
        for index, name in enumerate(self.class_names):
            row: list[object] = [name]
            for counts in self.splits:
                row += [counts.pixels[index], f"{counts.shares[index]:.6f}", counts.images[index]]
            rows.append(row)
        ignored: list[object] = ["(ignored)"]
        for counts in self.splits:
            ignored += [counts.ignored_pixels, "", ""]
        write_csv(folder / "classes.csv", [*rows, ignored])
        problems = [[one.kind, one.file, one.message] for one in self.problems]
        write_csv(folder / "problems.csv", [["kind", "file", "message"], *problems])
        return folder


def check_masks(
    data: str | Path | ADE20K | Cityscapes | MaskFolder,
    *,
    format: MaskFormat | None = None,
    max_pixels: int = MAX_PIXELS,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> MaskReport:
    """Opens every picture and mask of a set and returns what is wrong with them.

    Args:
        data: a source, or the root of one.
        format: which kind of root it is; None finds out by the folders in it.
        max_pixels: largest picture, width times height, when data is a root.
        num_workers: processes that open files beside this one; 0 opens them in this one.
        progress: is called after each picture.

    Raises:
        FileNotFoundError: there is no such folder, no training pictures, or no file of classes.
        ValueError: it has no known layout, its classes cannot be used, or a split is empty.
    """
    if isinstance(data, str | Path):
        data = mask_source(Path(data), format=format, max_pixels=max_pixels)
    source = replace(data, on_unreadable="skip")
    sets = {split: source.open(split) for split in _splits(source)}
    total = sum(map(len, sets.values()))
    num_done = 0
    problems: list[MaskProblem] = []
    splits: list[ClassCounts] = []
    for split, masks in sets.items():
        num_classes = len(masks.class_names)
        pixels = np.zeros(num_classes + 1, dtype=np.int64)
        images = np.zeros(num_classes + 1, dtype=np.int64)
        found: list[MaskProblem] = list(masks.problems)
        num_images = 0
        for checked in _checks(masks, num_workers):
            num_done += 1
            if progress is not None:
                progress(num_done, total)
            found += checked.problems
            if not checked.problems:
                num_images += 1
                pixels += checked.pixels
                images += checked.pixels > 0
        problems += sorted(found, key=lambda problem: problem.file)
        splits.append(
            ClassCounts(
                split=split,
                num_images=num_images,
                pixels=tuple(pixels[:-1].tolist()),
                images=tuple(images[:-1].tolist()),
                ignored_pixels=int(pixels[-1]),
            )
        )
    class_names = sets["train"].class_names
    return MaskReport(class_names=class_names, splits=tuple(splits), problems=tuple(problems))


class _Checked(NamedTuple):
    pixels: NDArray[np.int64]
    """(K + 1,): pixels of each class, and those that are ignored."""
    problems: tuple[MaskProblem, ...]


class _Checks(Dataset[_Checked]):
    def __init__(self, masks: FileMasks) -> None:
        self._masks = masks

    def __len__(self) -> int:
        return len(self._masks)

    def __getitem__(self, index: int) -> _Checked:
        masks = self._masks
        num_classes = len(masks.class_names)
        pixels = np.zeros(num_classes + 1, dtype=np.int64)
        problems: list[MaskProblem] = []
        try:
            picture = masks.image(index)
        except (UnreadableImageError, FileNotFoundError) as error:
            problems.append(MaskProblem("unreadable", masks.image_files[index], str(error)))
        try:
            mask = masks.mask(index)
            if not problems:
                check_decoded(picture, mask, masks.image_files[index])
            counts = np.bincount(mask.ravel(), minlength=IGNORE + 1)
            pixels[:-1], pixels[-1] = counts[:num_classes], counts[IGNORE]
        except MaskError as error:
            problems.append(MaskProblem(error.kind, masks.mask_files[index], str(error)))
        except (UnreadableImageError, FileNotFoundError) as error:
            if not problems:  # else the picture's own header stands in the way
                problems.append(MaskProblem("unreadable", masks.mask_files[index], str(error)))
        return _Checked(pixels, tuple(problems))


def _checks(masks: FileMasks, num_workers: int) -> Iterator[_Checked]:
    loader: Any = DataLoader(
        _Checks(masks), batch_size=None, collate_fn=unchanged, num_workers=num_workers
    )
    return iter(loader)


def unchanged(checked: Any) -> Any:
    """Returns what a process checked, as a data loader's collate_fn."""
    return checked


def _splits(source: ADE20K | Cityscapes | MaskFolder) -> tuple[MaskSplit, ...]:
    if not isinstance(source, MaskFolder):
        return ("train", "val")
    there: list[MaskSplit] = ["train"]
    if (source.root / source.val_split).is_dir():
        there.append("val")
    if source.val_split != "test" and (source.root / "test").is_dir():
        there.append("test")
    return tuple(there)


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    """Writes under a temporary name first, so that the file is never there by half."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
