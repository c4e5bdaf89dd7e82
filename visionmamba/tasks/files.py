"""Results on disk: texts and pictures that are there whole or not at all."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def replace_file(target: Path, content: str | Image.Image) -> None:
    """Writes a text or a PNG under a temporary name first, so that it is never there by half."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            content.save(temporary, format="PNG")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def plain_name(name: str) -> str:
    """Returns a name under which files can be written into a folder without leaving it.

    Raises:
        ValueError: it is empty or holds a separator of folders.
    """
    if not name or any(sign in name for sign in "/\\\0"):
        raise ValueError(f"a name of files must be plain, without folders, got {name!r}")
    return name


def csv_text(rows: Sequence[Sequence[object]]) -> str:
    """Returns rows as comma-separated values."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
