"""Reads COCO's annotation files and checks every line of them. Not for pictures: those are coco.py.

Nothing is believed: sizes, numbers and names are checked, and what is wrong is named by the ids of
image and annotation.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from visionmamba.data.image_files import MAX_PIXELS
from visionmamba.data.object_masks import NoAreaError, Segment, SegmentTable, read_segment
from visionmamba.data.sets import OnUnreadable

MAX_JSON_BYTES = 2 * 1024**3
"""Largest annotation file that is read by default."""

_BOX_SLACK_PX = 2.0  # how far boxes may leave the picture; rounding in published files does
_MAX_ID = 2**53
_MAX_NAME_LENGTH = 1024
_MAX_PART_BYTES = 255  # between slashes; no file system takes more
_MAX_OBJECTS = 10_000  # of one picture
_MAX_SHOWN = 80
_MAX_SHOWN_VALUES = 8


class AnnotationError(ValueError):
    """Annotations that cannot be used; the message names the file, the ids and what is wrong."""


class CocoImage(NamedTuple):
    """A picture as an annotation file lists it."""

    id: int
    file_name: str
    """Relative, without a step to a folder above."""
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class CocoTable:
    """What an annotation file says, in a few arrays."""

    images: tuple[CocoImage, ...]
    """In the order of the file."""
    category_ids: tuple[int, ...]
    """In rising order; label k stands for the k-th, counted from 1."""
    class_names: tuple[str, ...]
    """One a category; a name that comes up twice has the id behind it."""
    first: NDArray[np.int64]
    """(images + 1,): rows first[k] to first[k + 1] of the rest belong to image k."""
    boxes: NDArray[np.float64]
    """(rows, 4): left, top, right, bottom in pixels, inside the picture."""
    labels: NDArray[np.int64]
    """(rows,), from 1."""
    is_crowd: NDArray[np.bool_]
    """(rows,): regions of objects too many to tell apart."""
    areas: NDArray[np.float64]
    """(rows,): pixels of each object; NaN where the file does not say."""
    segments: SegmentTable | None
    """Masks of the rows; None when no object has one."""
    problems: tuple[str, ...]
    """Images and objects that are broken, one sentence each."""
    without_area: tuple[str, ...]
    """Objects that nothing is seen of, which do not count, one sentence each."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Everything that cannot be used."""
        return (*self.problems, *self.without_area)


def read_coco(
    path: Path,
    *,
    on_broken: OnUnreadable = "fail",
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_JSON_BYTES,
) -> CocoTable:
    """Returns the annotations of one file.

    Boxes are cut off at the picture's edges, which they may leave by up to two pixels. Objects
    without width, height or area are left out and listed: published files hold some.

    Args:
        path: the JSON file.
        on_broken: "fail" stops at broken annotations and images, "skip" leaves them out and lists
            them.
        max_pixels: width times height that a picture may have.
        max_bytes: size that the file may have.

    Raises:
        FileNotFoundError: there is no such file.
        AnnotationError: it is too large, no JSON, not COCO's, without categories or annotations,
            or holds something broken.
    """
    content = _load(path, max_bytes)
    categories = _read_categories(path, content["categories"])
    if not content["annotations"]:
        raise AnnotationError(
            f"{path} has an empty list of annotations, so there is nothing to learn or to judge; "
            "add objects or take another file"
        )
    problems: list[str] = []
    images = _read_images(path, content["images"], max_pixels, problems)
    reader = _Reader(path, images, categories, problems)
    for number, annotation in enumerate(content["annotations"]):
        reader.read(number, annotation)
    reader.require_masks_of_all_or_none()
    if problems and on_broken == "fail":
        more = len(problems) - 1
        rest = f"; {more} more like this" if more else ""
        raise AnnotationError(
            f'{problems[0]}{rest}: correct the file, or leave such out with on_unreadable="skip"'
        )
    return reader.table()


def _load(path: Path, max_bytes: int) -> dict[str, list[object]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no annotation file {path}; wanted one in COCO's format")
    size = path.stat().st_size
    if size > max_bytes:
        raise AnnotationError(
            f"{path} has {size} bytes, more than the limit of {max_bytes}; divide it, or if you "
            "trust it, read it with Coco(max_json_bytes=...)"
        )
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise AnnotationError(
            f"{path} is not valid JSON ({error.msg} at {where}); export it again"
        ) from error
    except RecursionError as error:
        raise AnnotationError(
            f"{path} is not valid JSON (nested too deeply); export it again"
        ) from error
    except ValueError as error:
        raise AnnotationError(
            f"{path} is not valid JSON ({_short(str(error))}); export it again"
        ) from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in lists):
        found = ", ".join(map(_shown, list(content)[:5])) if isinstance(content, dict) else ""
        raise AnnotationError(
            f"{path} is not in COCO's format: wanted an object with the lists images, annotations "
            f"and categories, got {found or type(content).__name__}; export it as COCO instances"
        )
    return {name: content[name] for name in lists}


def _refuse_constant(name: str) -> float:
    raise ValueError(f"the number {name}")


def _read_categories(path: Path, values: list[object]) -> dict[int, str]:
    """Returns the names of the categories by id, in rising order of the ids."""
    names: dict[int, str] = {}
    for value in values:
        category = value if isinstance(value, dict) else {}
        category_id, name = category.get("id"), category.get("name")
        if not _is_id(category_id) or not _is_text(name) or category_id in names:
            raise AnnotationError(
                f"{path} has the category {_shown(value)}; wanted an object with an id of its own, "
                "a whole number, and a name"
            )
        names[category_id] = name
    if not names:
        raise AnnotationError(f"{path} has an empty list of categories; name at least one")
    return dict(sorted(names.items()))


def _read_images(
    path: Path, values: list[object], max_pixels: int, problems: list[str]
) -> dict[int, CocoImage | None]:
    """Returns the images by id; None stands for one that cannot be used."""
    images: dict[int, CocoImage | None] = {}
    for number, value in enumerate(values):
        image = value if isinstance(value, dict) else {}
        image_id, name = image.get("id"), image.get("file_name")
        if not _is_id(image_id):
            problems.append(
                f"{path}: image number {number} has the id {_shown(image_id)}, wanted a whole "
                "number of its own"
            )
            continue
        title = f"{path}: image {image_id} ({_shown(name)})"
        if image_id in images:
            problems.append(f"{title} has the id of another image")
            continue
        images[image_id] = None
        reason = _name_problem(name) or _size_problem(image, max_pixels)
        if reason:
            problems.append(f"{title} {reason}")
            continue
        images[image_id] = CocoImage(image_id, str(name), image["height"], image["width"])
    return images


def _name_problem(name: object) -> str | None:
    if not _is_text(name):
        return "has no usable file_name, wanted a path relative to the folder of images"
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute() or path.anchor or ".." in path.parts:
            return "has a file_name that leads out of the data set's folder"
    if any(len(part.encode()) > _MAX_PART_BYTES for part in PurePosixPath(name).parts):
        return f"has a file_name with a part of more than {_MAX_PART_BYTES} bytes"
    return None


def _size_problem(image: Mapping[str, object], max_pixels: int) -> str | None:
    height, width = image.get("height"), image.get("width")
    if not _is_id(height) or not _is_id(width) or min(height, width) < 1:
        return (
            f"has the height {_shown(height)} and the width {_shown(width)}, wanted whole numbers "
            "of pixels"
        )
    if height * width > max_pixels:
        return f"has {_shown(width)}x{_shown(height)} pixels, more than the limit of {max_pixels}"
    return None


class _Object(NamedTuple):
    id: int
    box: tuple[float, float, float, float]
    label: int
    is_crowd: bool
    area: float
    segment: Segment | None


class _Reader:
    """Collects the objects of each image, and what is wrong with others."""

    def __init__(
        self,
        path: Path,
        images: dict[int, CocoImage | None],
        categories: dict[int, str],
        problems: list[str],
    ) -> None:
        self._path = path
        self._images = images
        self._categories = categories
        self._labels = {category: label for label, category in enumerate(categories, start=1)}
        self._objects: dict[int, list[_Object]] = {
            image_id: [] for image_id, image in images.items() if image is not None
        }
        self._annotation_ids: set[int] = set()
        self._problems = problems
        self._without_area: list[str] = []

    def read(self, number: int, value: object) -> None:
        """Takes one line of "annotations"."""
        annotation = value if isinstance(value, dict) else {}
        annotation_id, image_id = annotation.get("id"), annotation.get("image_id")
        if not _is_id(annotation_id) or annotation_id in self._annotation_ids:
            self._problems.append(
                f"{self._title(annotation)}, number {number} of the list, has no id of its own, "
                "wanted a whole number"
            )
            return
        self._annotation_ids.add(annotation_id)
        if not _is_id(image_id) or image_id not in self._images:
            self._problems.append(f"{self._title(annotation)} belongs to no image of the file")
            return
        image = self._images[image_id]
        if image is None:  # named already
            return
        try:
            found = self._object(annotation_id, annotation, image)
        except NoAreaError as error:
            self._without_area.append(f"{self._title(annotation, image)} {error}")
        except ValueError as error:
            self._problems.append(f"{self._title(annotation, image)} {error}")
        else:
            self._objects[image_id].append(found)

    def require_masks_of_all_or_none(self) -> None:
        """Takes objects without a mask for broken when there are others with one."""
        rows = [found for image_objects in self._objects.values() for found in image_objects]
        if len({found.segment is None for found in rows}) < 2:
            return
        for image_id, image_objects in self._objects.items():
            self._problems += [
                f"{self._title({'id': found.id, 'image_id': image_id}, self._images[image_id])} "
                "has no segmentation while others have one"
                for found in image_objects
                if found.segment is None
            ]
            self._objects[image_id] = [one for one in image_objects if one.segment is not None]

    def table(self) -> CocoTable:
        """Returns all that was collected."""
        images = tuple(image for image in self._images.values() if image is not None)
        rows = [found for image in images for found in self._objects[image.id]]
        if not rows:
            first = [*self._problems, *self._without_area][0]
            raise AnnotationError(
                f"{self._path} has no object that can be used; the first problem: {first}"
            )
        with_mask = [found.segment for found in rows if found.segment is not None]
        for image in images:
            self._check_number(image)
        uses = Counter(self._categories.values())
        return CocoTable(
            images=images,
            category_ids=tuple(self._categories),
            class_names=tuple(
                f"{name} ({category})" if uses[name] > 1 else name
                for category, name in self._categories.items()
            ),
            first=np.cumsum([0, *(len(self._objects[image.id]) for image in images)]),
            boxes=np.array([found.box for found in rows], dtype=np.float64).reshape(-1, 4),
            labels=np.array([found.label for found in rows], dtype=np.int64),
            is_crowd=np.array([found.is_crowd for found in rows], dtype=np.bool_),
            areas=np.array([found.area for found in rows], dtype=np.float64),
            segments=SegmentTable.of(with_mask) if with_mask else None,
            problems=tuple(self._problems),
            without_area=tuple(self._without_area),
        )

    def _title(self, annotation: Mapping[str, object], image: CocoImage | None = None) -> str:
        ids = _shown(annotation.get("id")), _shown(annotation.get("image_id"))
        name = f" ({_shown(image.file_name)})" if image else ""
        return f"{self._path}: annotation {ids[0]} of image {ids[1]}{name}"

    def _object(
        self, annotation_id: int, annotation: Mapping[str, object], image: CocoImage
    ) -> _Object:
        """Returns one object; ValueError's message completes "annotation 5 of image 3 ..."."""
        category = annotation.get("category_id")
        if not _is_id(category) or category not in self._labels:
            known = ", ".join(map(str, list(self._categories)[:10]))
            more = ", ..." if len(self._categories) > 10 else ""
            raise ValueError(
                f"has the category_id {_shown(category)}, which is none of the file's "
                f"{len(self._categories)} categories ({known}{more})"
            )
        is_crowd = annotation.get("iscrowd", 0)
        if is_crowd not in (0, 1):
            raise ValueError(f"has iscrowd {_shown(is_crowd)}, wanted 0 or 1")
        area = annotation.get("area")
        if area is not None and not (_is_number(area) and area >= 0):
            raise ValueError(f"has the area {_shown(area)}, wanted a number of at least 0")
        box = _read_box(annotation.get("bbox"), image)
        segmentation = annotation.get("segmentation")
        segment = None
        if segmentation:
            try:
                segment = read_segment(segmentation, image.height, image.width)
            except NoAreaError as error:
                raise NoAreaError(f"has a segmentation that {error}") from error
            except ValueError as error:
                raise ValueError(f"has a segmentation that {error}") from error
        return _Object(
            annotation_id,
            box,
            self._labels[category],
            bool(is_crowd),
            math.nan if area is None else float(area),
            segment,
        )

    def _check_number(self, image: CocoImage) -> None:
        count = len(self._objects[image.id])
        if count > _MAX_OBJECTS:
            raise AnnotationError(
                f"{self._path}: image {image.id} ({_shown(image.file_name)}) has {count} objects, "
                f"more than the limit of {_MAX_OBJECTS}; cut it into smaller pictures"
            )


def _read_box(value: object, image: CocoImage) -> tuple[float, float, float, float]:
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
        raise ValueError(
            f"has the bbox {_shown(value)}, wanted four numbers: left, top, width, height"
        )
    left, top, width, height = map(float, value)
    if width < 0 or height < 0:
        raise ValueError(f"has the bbox {_shown(value)} of negative size")
    outside = max(-left, -top, left + width - image.width, top + height - image.height)
    if outside > _BOX_SLACK_PX:
        raise ValueError(
            f"has the bbox {_shown(value)} (left, top, width, height), which reaches outside "
            f"the image of {image.width}x{image.height} px"
        )
    right, bottom = min(left + width, image.width), min(top + height, image.height)
    left, top = max(left, 0.0), max(top, 0.0)
    if right <= left or bottom <= top:
        raise NoAreaError(f"has the bbox {_shown(value)}, without area inside the image")
    return left, top, right, bottom


def _is_id(value: object) -> TypeGuard[int]:
    return type(value) is int and abs(value) < _MAX_ID


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it can be shown, and be a part of a file's name."""
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME_LENGTH:
        return False
    return not any(sign < " " or "\ud800" <= sign <= "\udfff" for sign in value)


def _is_number(value: object) -> TypeGuard[int | float]:
    if type(value) is int:
        return abs(value) < _MAX_ID
    return isinstance(value, float) and math.isfinite(value)


def _shown(value: object) -> str:
    """Returns a value of the file as a short text that any terminal can show."""
    if isinstance(value, dict):
        return f"an object of length {len(value)}"
    if isinstance(value, list) and (
        len(value) > _MAX_SHOWN_VALUES or any(isinstance(one, list | dict) for one in value)
    ):
        return f"a list of length {len(value)}"
    if isinstance(value, str) and value.isprintable():
        return _short(value)
    return _short(ascii(value))


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
