"""The files that name the classes of a folder of masks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionmamba.data.class_tables import ADE20K_CLASSES
from visionmamba.data.masks import IGNORE, MAX_CLASSES

CLASS_FILES = ("classes.json", "classes.txt")
"""Names of the files that `read_classes` takes, the first that is there."""

_MAX_BYTES = 1 << 20
_MAX_NAME_LENGTH = 200


@dataclass(frozen=True)
class Classes:
    """What a folder says of its classes."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...] | None = None
    ignore_index: int = IGNORE


def read_classes(root: Path) -> Classes:
    """Returns what root/classes.json or root/classes.txt says, as `MaskFolder` describes them.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the file cannot be used.
    """
    files = [root / name for name in CLASS_FILES if (root / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"there is no {root / CLASS_FILES[0]} and no {root / CLASS_FILES[1]}; write the "
            "names of the classes into classes.txt, one a line in the order of their numbers"
        )
    file = files[0]
    text = _read_text(file, root)
    if file.suffix == ".txt":
        names = [line.strip() for line in text.splitlines() if line.strip()]
        return Classes(_checked_names(names, file))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}); correct it") from None
    if not isinstance(content, dict) or "classes" not in content:
        raise ValueError(f'{file} names no classes; wanted {{"classes": ["road", "car", ...]}}')
    class_names = _checked_names(content["classes"], file)
    return Classes(
        class_names,
        _checked_palette(content.get("palette"), len(class_names), file),
        _checked_ignore_index(content.get("ignore_index", IGNORE), file),
    )


def read_ade20k_names(root: Path) -> tuple[str, ...]:
    """Returns the first names in root/objectInfo150.txt, or the known ones where it is missing.

    Raises:
        ValueError: the file cannot be used.
    """
    file = root / "objectInfo150.txt"
    if not file.is_file():
        return ADE20K_CLASSES
    rows = [line.split("\t") for line in _read_text(file, root).splitlines()[1:] if line.strip()]
    if len(rows) != len(ADE20K_CLASSES):
        raise ValueError(
            f"{file} describes {len(rows)} classes, wanted {len(ADE20K_CLASSES)}; unpack it again "
            "or remove it"
        )
    return _checked_names([row[-1].split(",")[0].strip() for row in rows], file)


def _read_text(file: Path, root: Path) -> str:
    if is_outside(file, root.resolve()):
        raise ValueError(say_outside(file, root))
    size = file.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"{file} has {size} bytes, too many for a list of classes; check the file")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error}); save it as such") from None


def _checked_names(names: Any, file: Path) -> tuple[str, ...]:
    if not isinstance(names, list) or not 2 <= len(names) <= MAX_CLASSES:
        count = len(names) if isinstance(names, list) else "no list of them"
        raise ValueError(f"{file} must name 2 to {MAX_CLASSES} classes, got {count}")
    for name in names:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ValueError(f"{file} has the class {name!r:.80}, wanted one of printable text")
        if len(name) > _MAX_NAME_LENGTH:
            raise ValueError(
                f"{file} has a class name of {len(name)} characters, more than "
                f"{_MAX_NAME_LENGTH}; shorten it"
            )
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"{file} names the class {repeated} more than once; rename one")
    return tuple(names)


def _checked_palette(
    palette: Any, num_classes: int, file: Path
) -> tuple[tuple[int, int, int], ...] | None:
    if palette is None:
        return None
    rows = palette if isinstance(palette, list) else []
    colours = [row for row in rows if isinstance(row, list) and len(row) == 3]
    is_good = len(colours) == len(rows) == num_classes and all(
        type(value) is int and 0 <= value <= 255 for colour in colours for value in colour
    )
    if not is_good:
        raise ValueError(
            f"{file} must give its palette as {num_classes} lists of red, green and blue, 0 to "
            "255, one a class; correct or remove it"
        )
    return tuple((red, green, blue) for red, green, blue in colours)


def _checked_ignore_index(number: Any, file: Path) -> int:
    if type(number) is not int or not 0 <= number <= 255:
        raise ValueError(f"{file} must give ignore_index from 0 to 255, got {number!r:.80}")
    return number


def is_outside(path: Path, *homes: Path) -> bool:
    """Returns whether a file lies in none of some folders, links followed; these are resolved."""
    return not any(map(path.resolve().is_relative_to, homes))


def say_outside(path: Path, root: Path) -> str:
    """Returns the sentence about a link that leaves the root."""
    return f"{path} is a link to {path.resolve()}, outside of {root}; put the file itself there"
