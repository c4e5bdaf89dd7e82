"""Sets of images that other libraries find and read: Hugging Face's datasets, and timm."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from visionmamba.data.image_files import (
    MAX_PIXELS,
    UnreadableImageError,
    as_upright_eight_bit,
    decode_image,
    open_image,
)
from visionmamba.data.sets import ImageSplits, LabelledImages, OnUnreadable, check_classes

_ONE_WAY_READERS = {"wds": "WebShards", "hfids": "HuggingFaceData", "tfds": "another reader"}


@dataclass(frozen=True, kw_only=True)
class HuggingFaceData:
    """A data set of the Hugging Face Hub, or a local one, read by the datasets library."""

    path: str = ""
    """Name on the Hub, as ylecun/mnist, or a folder of data files or of `save_to_disk`."""
    name: str | None = None
    """Configuration of the data set, when it has several."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; give a commit to train on the same pictures for ever."""
    train_split: str = "train"
    """Split to learn from."""
    val_split: str = "validation"
    """Split to judge on; many data sets call it "test"."""
    image_column: str = "image"
    """Column of the pictures."""
    label_column: str = "label"
    """Column of the classes: a ClassLabel, or numbers from 0."""
    on_unreadable: OnUnreadable = "fail"
    """"fail" stops at the first picture that cannot be opened; "skip" goes on without it."""
    max_pixels: int = MAX_PIXELS
    """Largest picture, width times height; a larger one counts as unreadable."""

    def build(self) -> ImageSplits:
        """Returns the pictures of both splits; downloads what is not there yet.

        Raises:
            ImportError: the datasets library is missing.
            FileNotFoundError: there is no such data set.
            ValueError: a split or a column is missing, labels are no class numbers, or the classes
                of both splits disagree.
        """
        if not self.path:
            raise ValueError(
                "no data set is given; name one of the Hub or a folder, as --data.path ylecun/mnist"
            )
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"Hugging Face data sets need {error.name}; install it with: pip install "
                "'visionmamba[data]'"
            ) from error
        folder = Path(self.path)
        if (folder / "dataset_dict.json").is_file():
            splits: Any = datasets.load_from_disk(self.path)
        else:
            splits = datasets.load_dataset(self.path, self.name, revision=self.revision)
        root = folder if folder.is_dir() else Path(datasets.config.HF_CACHE_HOME)
        train = self._open(splits, self.train_split, root)
        val = self._open(splits, self.val_split, root)
        check_classes(self.path, train.class_names, val.class_names)
        return ImageSplits(train, val)

    def _open(self, splits: Any, split: str, root: Path) -> "RowImages":
        import datasets

        if split not in splits:
            raise ValueError(
                f"{self.path} has no split {split}; it has {', '.join(splits)}: set train_split "
                "and val_split"
            )
        rows = splits[split]
        for column in (self.image_column, self.label_column):
            if column not in rows.column_names:
                raise ValueError(
                    f"{self.path} has no column {column}; it has {', '.join(rows.column_names)}: "
                    "set image_column and label_column"
                )
        labels = rows[self.label_column][:]
        feature = rows.features[self.label_column]
        names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        return RowImages(
            rows=rows.cast_column(self.image_column, datasets.Image(decode=False)),
            column=self.image_column,
            root=root.resolve(),
            name=f"{self.path}, {split}",
            labels=_checked_labels(labels, names, self.path),
            class_names=tuple(names or _numbered(labels)),
            on_unreadable=self.on_unreadable,
            max_pixels=self.max_pixels,
        )


@dataclass(frozen=True, kw_only=True)
class RowImages(LabelledImages):
    """Pictures in the rows of a `datasets.Dataset`."""

    rows: Any
    column: str
    root: Path
    """Folder that pictures lie in when the rows hold paths instead of bytes."""
    name: str
    max_pixels: int = MAX_PIXELS

    def image(self, index: int) -> Image.Image:
        """Decodes picture `index`; `UnreadableImageError` names a bad one by its row."""
        picture = self.rows[index][self.column] or {}
        name = f"{self.name}, row {index}"
        if picture.get("bytes"):
            return decode_image(picture["bytes"], name, max_pixels=self.max_pixels)
        if not picture.get("path"):
            raise UnreadableImageError(f"{name} holds no picture; remove it")
        path = Path(os.path.abspath(picture["path"]))
        if not path.is_relative_to(self.root):
            raise UnreadableImageError(
                f"{name} is the file {path}, outside of {self.root}; store pictures in the rows"
            )
        return open_image(path, max_pixels=self.max_pixels)


@dataclass(frozen=True, kw_only=True)
class TimmData:
    """A data set that timm opens: its folder reader, torch/NAME of torchvision, hfds/NAME."""

    name: str = ""
    """timm's name: "" for folders of pictures, torch/cifar10 and the like, hfds/NAME."""
    root: Path = Path("data")
    """Folder of the data; of the cache for hfds/."""
    train_split: str = "train"
    """Split to learn from; a folder of that name, or a synonym of it, is looked for."""
    val_split: str = "validation"
    """Split to judge on, likewise."""
    class_map: str = ""
    """Text file of class names, one a line, in the order of the numbers; folders only."""
    download: bool = False
    """Whether torchvision may download what is not there."""
    on_unreadable: OnUnreadable = "fail"
    """"fail" stops at the first picture that cannot be opened; "skip" goes on without it."""
    max_pixels: int = MAX_PIXELS
    """Largest picture, width times height; a larger one counts as unreadable."""

    def build(self) -> ImageSplits:
        """Returns the pictures of both splits.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: timm does not know the name or cannot open it, reads it in one direction
                only, or the classes of both splits disagree.
        """
        reader, slash, _ = self.name.partition("/")
        if slash and reader in _ONE_WAY_READERS:
            raise ValueError(
                f"timm reads {self.name} in one direction only, and training goes on from any "
                f"picture; use {_ONE_WAY_READERS[reader]}"
            )
        if reader != "hfds" and not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder {self.root}; wanted one for timm to read")
        train, val = self._open(self.train_split), self._open(self.val_split)
        check_classes(self.name or self.root, train.class_names, val.class_names)
        return ImageSplits(train, val)

    def _open(self, split: str) -> "TimmImages":
        from timm.data import create_dataset  # type: ignore[attr-defined]

        try:
            dataset = create_dataset(
                self.name,
                root=str(self.root),
                split=split,
                class_map=self.class_map,  # type: ignore[arg-type]  # also a file's name
                download=self.download,
            )
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"timm cannot open {self.name or self.root}, {split}: {error or 'unknown'}"
            ) from error
        labels, names = _labels_of(dataset)
        return TimmImages(
            dataset=dataset,
            labels=_checked_labels(labels, names, self.name or str(self.root)),
            class_names=tuple(names or _numbered(labels)),
            on_unreadable=self.on_unreadable,
            max_pixels=self.max_pixels,
        )


@dataclass(frozen=True, kw_only=True)
class TimmImages(LabelledImages):
    """Pictures of a data set that timm opened."""

    dataset: Any
    max_pixels: int = MAX_PIXELS

    def image(self, index: int) -> Image.Image:
        """Decodes picture `index`; `UnreadableImageError` names a bad one."""
        reader = getattr(self.dataset, "reader", None)
        if reader is None:
            return as_upright_eight_bit(self.dataset[index][0], f"picture {index}")
        with reader[index][0] as stream:
            content = stream.read()
        name = reader.filename(index, absolute=True) or f"picture {index}"
        return decode_image(content, name, max_pixels=self.max_pixels)


def _labels_of(dataset: Any) -> tuple[list[Any], list[str] | None]:
    """Returns the labels of a data set of timm or torchvision, and its class names if any."""
    reader = getattr(dataset, "reader", None)
    if reader is None:
        names = getattr(dataset, "classes", None)
        return [int(label) for label in dataset.targets], list(names) if names else None
    numbers: dict[str, int] = reader.class_to_idx
    names = sorted(numbers, key=numbers.__getitem__) or None
    if hasattr(reader, "iter_targets"):
        return list(reader.iter_targets()), names
    return [label for _, label in reader.samples], names


def _checked_labels(labels: Iterable[Any], names: list[str] | None, source: str) -> tuple[int, ...]:
    checked = tuple(labels)
    for row, label in enumerate(checked):
        is_number = isinstance(label, int) and label >= 0
        if not is_number or (names is not None and label >= len(names)):
            raise ValueError(
                f"{source} has the label {label!r} in row {row}, wanted a class number"
                f"{f' below {len(names)}' if names else ''}; encode or remove such rows"
            )
    return checked


def _numbered(labels: Iterable[int]) -> list[str]:
    return [str(number) for number in range(max(labels) + 1)]
