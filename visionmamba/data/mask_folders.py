"""Folders of pictures with masks: ADE20K, Cityscapes, and any folder with a file of classes."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from visionmamba.data.class_files import (
    CLASS_FILES,
    is_outside,
    read_ade20k_names,
    read_classes,
    say_outside,
)
from visionmamba.data.class_tables import ADE20K_CLASSES, CITYSCAPES_CLASSES, CITYSCAPES_MAX_ID
from visionmamba.data.image_files import IMAGE_SUFFIXES, MAX_PIXELS
from visionmamba.data.masks import (
    IGNORE,
    FileMasks,
    MaskError,
    MaskProblem,
    SegmentationSet,
    SegmentationSplits,
)
from visionmamba.data.sets import OnUnreadable
from visionmamba.data.shapes import Shapes

MaskSplit = Literal["train", "val", "test"]
MaskFormat = Literal["ade20k", "cityscapes", "folder"]

LAYOUTS = (
    "train/images, train/masks and classes.txt (any folder), images/training and "
    "annotations/training (ADE20K), or leftImg8bit and gtFine (Cityscapes)"
)
"""What pictures with masks may lie in, for messages."""

_UNKNOWN = -1  # as in FileMasks.class_of
_ADE20K_FOLDERS = {"train": "training", "val": "validation"}


@dataclass(frozen=True, kw_only=True)
class MaskFolder:
    """Any folder `root/{train,val,test}/{images,masks}/*`; a picture's mask has its name and .png.

    Masks are palette or gray PNG files of class numbers; 255 is ignored. The classes stand in
    root/classes.txt, a name a line in the order of their numbers, or in root/classes.json:
    {"classes": [names], "palette": [[red, green, blue], ...], "ignore_index": number}, of which
    palette and ignore_index may be missing. Pixels of ignore_index are ignored, like those of 255.
    """

    root: Path = Path("data")
    """Folder of the splits and of the file of classes."""
    val_split: str = "val"
    """Folder in root of the pictures to judge on."""
    on_unreadable: OnUnreadable = "fail"
    """"fail" stops at the first picture or mask that cannot be used and names it; "skip" goes on
    without it: training takes the next one, evaluation leaves it out; both list it."""
    max_pixels: int = MAX_PIXELS
    """Largest picture, width times height; a larger one counts as unreadable."""

    def build(self) -> SegmentationSplits:
        """Returns the pictures of both splits.

        Raises:
            FileNotFoundError: a folder or the file of classes is missing.
            ValueError: a split holds no pictures, the file of classes cannot be used, or with
                on_unreadable "fail" a mask is missing.
        """
        return SegmentationSplits(self.open("train"), self.open("val"))

    def open(self, split: MaskSplit) -> FileMasks:
        """Returns the pictures of one split, "val" being that in val_split; raises as `build`."""
        _check_root(self.root, "train/images, train/masks and a file of classes")
        classes = read_classes(self.root)
        name = self.val_split if split == "val" else split
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"val_split must be the name of a folder in {self.root}, got {name!r}")
        images, masks = self.root / name / "images", self.root / name / "masks"
        class_of = list(range(len(classes.names)))
        class_of += [_UNKNOWN] * (IGNORE + 1 - len(class_of))
        class_of[IGNORE] = class_of[classes.ignore_index] = IGNORE
        return _open(
            _Listing(self.root, images, masks, lambda image: f"{image.stem}.png"),
            class_names=classes.names,
            class_of=class_of,
            palette=classes.palette,
            on_unreadable=self.on_unreadable,
            max_pixels=self.max_pixels,
        )


@dataclass(frozen=True, kw_only=True)
class ADE20K:
    """The scene parsing benchmark of ADE20K, unpacked from ADEChallengeData2016.zip.

    Pictures in root/images/{training,validation}, masks in root/annotations/{training,validation}:
    150 classes, which the files count from 1; their 0, "other", is ignored. The classes have the
    first names in root/objectInfo150.txt, or where that is missing those known here.
    """

    root: Path = Path("ADEChallengeData2016")
    """Folder of images/ and annotations/."""
    on_unreadable: OnUnreadable = "fail"
    """"fail" stops at the first picture or mask that cannot be used and names it; "skip" goes on
    without it: training takes the next one, evaluation leaves it out; both list it."""
    max_pixels: int = MAX_PIXELS
    """Largest picture, width times height; a larger one counts as unreadable."""

    def build(self) -> SegmentationSplits:
        """Returns the pictures of both splits.

        Raises:
            FileNotFoundError: a folder is missing.
            ValueError: a split holds no pictures, objectInfo150.txt cannot be used, or with
                on_unreadable "fail" a mask is missing.
        """
        return SegmentationSplits(self.open("train"), self.open("val"))

    def open(self, split: MaskSplit) -> FileMasks:
        """Returns the pictures of "train" or "val"; raises as `build`."""
        _check_root(self.root, "images/training and annotations/training")
        if split not in _ADE20K_FOLDERS:
            raise ValueError(f"ADE20K has no masks of the split {split}; take train or val")
        folder = _ADE20K_FOLDERS[split]
        images, masks = self.root / "images" / folder, self.root / "annotations" / folder
        return _open(
            _Listing(self.root, images, masks, lambda image: f"{image.stem}.png"),
            class_names=read_ade20k_names(self.root),
            class_of=[IGNORE, *range(len(ADE20K_CLASSES))],
            palette=None,
            on_unreadable=self.on_unreadable,
            max_pixels=self.max_pixels,
        )


@dataclass(frozen=True, kw_only=True)
class Cityscapes:
    """Cityscapes, unpacked from leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip.

    Pictures in root/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, masks in root/gtFine/SPLIT/CITY:
    *_gtFine_labelTrainIds.png where the authors' scripts have made them, *_gtFine_labelIds.png
    otherwise. Of their numbers the 19 classes that are judged count, all others are ignored.
    """

    root: Path = Path("cityscapes")
    """Folder of leftImg8bit/ and gtFine/."""
    on_unreadable: OnUnreadable = "fail"
    """"fail" stops at the first picture or mask that cannot be used and names it; "skip" goes on
    without it: training takes the next one, evaluation leaves it out; both list it."""
    max_pixels: int = MAX_PIXELS
    """Largest picture, width times height; a larger one counts as unreadable."""

    def build(self) -> SegmentationSplits:
        """Returns the pictures of both splits.

        Raises:
            FileNotFoundError: a folder is missing.
            ValueError: a split holds no pictures, or with on_unreadable "fail" a mask is missing.
        """
        return SegmentationSplits(self.open("train"), self.open("val"))

    def open(self, split: MaskSplit) -> FileMasks:
        """Returns the pictures of "train" or "val"; raises as `build`."""
        _check_root(self.root, "leftImg8bit/train and gtFine/train")
        if split == "test":
            raise ValueError("Cityscapes keeps the masks of its test split; take train or val")
        images, masks = self.root / "leftImg8bit" / split, self.root / "gtFine" / split
        kind = "labelTrainIds" if _any_ends(masks, "_labelTrainIds.png") else "labelIds"
        ending = f"_gtFine_{kind}.png"
        return _open(
            _Listing(
                self.root,
                images,
                masks,
                lambda image: image.stem.removesuffix("_leftImg8bit") + ending,
                in_subfolders=True,
                image_ending="_leftImg8bit.png",
                mask_ending=ending,
            ),
            class_names=tuple(name for name, _, _ in CITYSCAPES_CLASSES),
            class_of=_cityscapes_numbers(kind),
            palette=tuple(colour for _, _, colour in CITYSCAPES_CLASSES),
            on_unreadable=self.on_unreadable,
            max_pixels=self.max_pixels,
        )


SegmentationSource = ADE20K | Cityscapes | MaskFolder | Shapes
"""What a recipe can learn from; each has `build() -> SegmentationSplits` and `open(split)`."""


def open_masks(
    data: str | Path,
    *,
    split: MaskSplit = "val",
    format: MaskFormat | None = None,
    on_unreadable: OnUnreadable = "fail",
    max_pixels: int = MAX_PIXELS,
) -> SegmentationSet:
    """Returns the pictures of one split of "shapes" or of a folder.

    Args:
        data: "shapes", or the root of `ADE20K`, `Cityscapes` or a `MaskFolder`.
        split: which part is wanted.
        format: which of them it is; None finds out by the folders in it.
        on_unreadable: see `MaskFolder`.
        max_pixels: see `MaskFolder`.

    Raises:
        FileNotFoundError: there is no such folder, or a part of it is missing.
        ValueError: it is none of them, or the source refuses it.
    """
    if str(data) == "shapes" and format is None:
        return Shapes().open(split)
    source = mask_source(
        Path(data), format=format, on_unreadable=on_unreadable, max_pixels=max_pixels
    )
    return source.open(split)


def mask_source(
    root: Path,
    *,
    format: MaskFormat | None = None,
    on_unreadable: OnUnreadable = "fail",
    max_pixels: int = MAX_PIXELS,
) -> ADE20K | Cityscapes | MaskFolder:
    """Returns the source that a folder belongs to; arguments and errors as of `open_masks`."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; wanted one of pictures with masks")
    kinds: dict[str, type[ADE20K] | type[Cityscapes] | type[MaskFolder]] = {
        "ade20k": ADE20K,
        "cityscapes": Cityscapes,
        "folder": MaskFolder,
    }
    found = format or _format_of(root)
    if found not in kinds:
        raise ValueError(f"format must be one of {', '.join(kinds)}, got {found!r}")
    return kinds[found](root=root, on_unreadable=on_unreadable, max_pixels=max_pixels)


def holds_masks(root: Path) -> bool:
    """Whether a folder has one of the layouts of pictures with masks."""
    return _known_format(root) is not None


def _format_of(root: Path) -> MaskFormat:
    found = _known_format(root)
    if found is None:
        raise ValueError(f"{root} holds no pictures with masks in a known layout; wanted {LAYOUTS}")
    return found


def _known_format(root: Path) -> MaskFormat | None:
    if (root / "images" / "training").is_dir() or (root / "images" / "validation").is_dir():
        return "ade20k"
    if (root / "leftImg8bit").is_dir():
        return "cityscapes"
    if any((root / name).is_file() for name in CLASS_FILES) or any(root.glob("*/masks")):
        return "folder"
    return None


@dataclass(frozen=True)
class _Listing:
    """Where pictures and masks are, and how a picture's mask is called."""

    root: Path
    images: Path
    masks: Path
    mask_name: Callable[[Path], str]
    in_subfolders: bool = False
    image_ending: str = ""
    mask_ending: str = ".png"


def _open(
    listing: _Listing,
    *,
    class_names: tuple[str, ...],
    class_of: Sequence[int],
    palette: tuple[tuple[int, int, int], ...] | None,
    on_unreadable: OnUnreadable,
    max_pixels: int,
) -> FileMasks:
    images, problems = _files(listing, listing.images, listing.image_ending, IMAGE_SUFFIXES)
    masks, outside = _files(listing, listing.masks, listing.mask_ending, (".png",))
    problems += outside
    if not images and not problems:
        raise ValueError(
            f"{listing.images} holds no images; add some ({', '.join(IMAGE_SUFFIXES)})"
        )
    mask_of = {image: _mask_of(listing, image) for image in images}
    present, refused = set(masks), {problem.file for problem in outside}
    missing = [
        MaskProblem(
            "missing mask",
            image,
            f"{image} has no mask {mask}; add it or remove the picture",
        )
        for image, mask in mask_of.items()
        if mask not in present and mask not in refused
    ]
    wanted = set(mask_of.values())
    lonely = [
        MaskProblem(
            "missing image", mask, f"{mask} has no picture in {listing.images}; add it or remove it"
        )
        for mask in masks
        if mask not in wanted
    ]
    if on_unreadable == "fail" and (problems or missing):
        raise _first_of(problems, missing, num_images=len(images), folder=listing.images)
    pairs = [(image, mask) for image, mask in mask_of.items() if mask in present]
    return FileMasks(
        image_files=tuple(image for image, _ in pairs),
        mask_files=tuple(mask for _, mask in pairs),
        class_names=class_names,
        class_of=tuple(class_of),
        palette=palette,
        problems=(*problems, *missing, *lonely),
        on_unreadable=on_unreadable,
        max_pixels=max_pixels,
    )


def _first_of(
    problems: Sequence[MaskProblem],
    missing: Sequence[MaskProblem],
    *,
    num_images: int,
    folder: Path,
) -> MaskError:
    skip = 'or leave such pictures out with on_unreadable="skip"'
    if problems:
        return MaskError(f"{problems[0].message}, {skip}", problems[0].kind)
    count = f"{len(missing)} of the {num_images} images in {folder} have no mask"
    return MaskError(f"{count}, the first: {missing[0].message}, {skip}", "missing mask")


def _mask_of(listing: _Listing, image: Path) -> Path:
    return listing.masks / image.relative_to(listing.images).parent / listing.mask_name(image)


def _files(
    listing: _Listing, folder: Path, ending: str, suffixes: tuple[str, ...]
) -> tuple[list[Path], list[MaskProblem]]:
    """Returns the files of a folder in the order of their names, and links that leave the root."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; wanted {listing.images} and {listing.masks} with the "
            "pictures and their masks"
        )
    folders = [folder]
    if listing.in_subfolders:
        folders = sorted(
            path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
    homes = (listing.root.resolve(), folder.resolve())  # users may link whole folders
    files: list[Path] = []
    problems: list[MaskProblem] = []
    for one in folders:
        with os.scandir(one) as entries:
            for entry in entries:
                path = one / entry.name
                is_wanted = path.suffix.lower() in suffixes and entry.name.endswith(ending)
                if not is_wanted or entry.name.startswith(".") or not entry.is_file():
                    continue
                if entry.is_symlink() and is_outside(path, *homes):
                    problems.append(MaskProblem("outside", path, say_outside(path, listing.root)))
                    continue
                files.append(path)
    return sorted(files), sorted(problems)


def _check_root(root: Path, wanted: str) -> None:
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; wanted one that holds {wanted}")


def _cityscapes_numbers(kind: str) -> list[int]:
    numbers = [_UNKNOWN] * IGNORE + [IGNORE]
    if kind == "labelTrainIds":
        numbers[: len(CITYSCAPES_CLASSES)] = range(len(CITYSCAPES_CLASSES))
        return numbers
    numbers[: CITYSCAPES_MAX_ID + 1] = [IGNORE] * (CITYSCAPES_MAX_ID + 1)
    for index, (_, number, _) in enumerate(CITYSCAPES_CLASSES):
        numbers[number] = index
    return numbers


def _any_ends(folder: Path, ending: str) -> bool:
    return folder.is_dir() and any(True for _ in folder.glob(f"*/*{ending}"))
