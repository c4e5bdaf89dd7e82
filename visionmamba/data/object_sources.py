"""Data with objects by a word or a path: the drawn set, a folder in COCO's layout, or one file."""

from pathlib import Path

import numpy as np

from visionmamba.data.coco import Coco, DetectionSet, FileObjects
from visionmamba.data.coco_json import CocoImage, read_coco
from visionmamba.data.drawn_objects import DrawnObjects
from visionmamba.data.image_files import MAX_PIXELS
from visionmamba.data.sets import OnUnreadable

DetectionSource = Coco | DrawnObjects
"""What a detector can learn from; each has `build() -> DetectionSplits` and `open(split)`."""


def open_objects(
    data: str | Path,
    *,
    split: str = "val",
    images: Path | None = None,
    on_unreadable: OnUnreadable = "fail",
    max_pixels: int = MAX_PIXELS,
) -> DetectionSet:
    """Returns pictures with objects: one split of "objects" or of a folder, or those of one file.

    Args:
        data: "objects" for `DrawnObjects`, the root of a `Coco`, or an annotation file.
        split: "train" or "val"; a file is its own.
        images: folder that file names count from when `data` is an annotation file; None looks for
            the first image beside it and in folders called images.
        on_unreadable: see `Coco`.
        max_pixels: see `Coco`.

    Raises:
        FileNotFoundError: the folder, the file or the pictures are missing.
        ValueError: the annotations are broken, or there is no such split.
    """
    path = Path(data)
    if path.suffix == ".json":
        return open_annotations(
            path, images=images, on_unreadable=on_unreadable, max_pixels=max_pixels
        )
    if images is not None:
        raise ValueError(
            f"a folder of images is only wanted beside an annotation file (.json), got {data}; "
            "leave it out"
        )
    if str(data) == "objects":
        return DrawnObjects().open(split)
    return Coco(root=path, on_unreadable=on_unreadable, max_pixels=max_pixels).open(split)


def open_annotations(
    file: Path,
    *,
    images: Path | None = None,
    on_unreadable: OnUnreadable = "fail",
    max_pixels: int = MAX_PIXELS,
) -> FileObjects:
    """Returns all pictures of one annotation file; arguments and errors as of `open_objects`."""
    table = read_coco(file, on_broken=on_unreadable, max_pixels=max_pixels)
    folder = _folder_of(file, table.images[0]) if images is None else images
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of images {folder}; check the path")
    return FileObjects(
        folder=folder,
        homes=(folder.resolve(),),
        table=table,
        pictures=np.arange(len(table.images)),
        on_unreadable=on_unreadable,
        max_pixels=max_pixels,
    )


def _folder_of(file: Path, first: CocoImage) -> Path:
    above = file.absolute().parent
    places = (above, above / "images", above.parent / "images", above.parent)
    for place in places:
        if (place / first.file_name).is_file():
            return place
    raise FileNotFoundError(
        f"the image {first.file_name} of {file} is neither beside it nor in a folder called images "
        "there or above; set images, on the command line --images"
    )
