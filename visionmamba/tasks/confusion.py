"""The files of an evaluation, with the picture of its matrix for ten classes as for a thousand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from visionmamba.tasks.files import csv_text, replace_file

_NUM_LABELLED = 40
_SIDE_PX = 880
_MARGIN_PX = 14
_TITLE_PX = 26
_MAX_NAME_LENGTH = 24
_FONT_PX = 12
_DARKEST = np.array([8.0, 48.0, 107.0])


def write_evaluation(
    folder: str | Path,
    values: Mapping[str, Any],
    per_class: Sequence[Sequence[object]],
    *,
    confusion: NDArray[np.int64],
    class_names: Sequence[str],
) -> Path:
    """Writes evaluation.json, per_class.csv, confusion.csv and confusion.png.

    Args:
        folder: made when missing; files of the same names are replaced.
        values: of evaluation.json, ready for JSON.
        per_class: rows of per_class.csv, its heading first.
        confusion: (classes, classes), true classes down, predicted ones across.
        class_names: one a row.

    Returns:
        The path of evaluation.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "per_class.csv", csv_text(per_class))
    matrix: list[Sequence[object]] = [("class", *class_names)]
    matrix += [(name, *row.tolist()) for name, row in zip(class_names, confusion, strict=True)]
    replace_file(folder / "confusion.csv", csv_text(matrix))
    replace_file(folder / "confusion.png", draw_confusion(confusion, class_names))
    target = folder / "evaluation.json"
    replace_file(target, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return target


def draw_confusion(counts: NDArray[np.int64], class_names: Sequence[str]) -> Image.Image:
    """Returns the matrix as shares of each row: white for none, dark blue for all.

    Up to 40 classes are named, their shares written into the cells (per cent); more are drawn by
    colour only.

    Args:
        counts: (classes, classes), true classes down, predicted ones across.
        class_names: one a row.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cell = max(1, _SIDE_PX // len(class_names))
    colours = np.round(255 - shares[:, :, None] ** 0.5 * (255 - _DARKEST)).astype(np.uint8)
    matrix = Image.fromarray(colours).resize(
        (cell * len(class_names),) * 2, Image.Resampling.NEAREST
    )
    font = ImageFont.load_default(size=_FONT_PX)
    is_labelled = len(class_names) <= _NUM_LABELLED
    names = [_shortened(name) for name in class_names] if is_labelled else []
    left = _MARGIN_PX + round(max((font.getlength(name) for name in names), default=0)) + 8
    top = _TITLE_PX + (left if names else 0)
    size = (left + matrix.width + _MARGIN_PX, top + matrix.height + _MARGIN_PX)
    canvas = Image.new("RGB", size, "white")
    canvas.paste(matrix, (left, top))
    draw = ImageDraw.Draw(canvas)
    frame = (left - 1, top - 1, left + matrix.width, top + matrix.height)
    draw.rectangle(frame, outline="#5b6770")
    draw.text((_MARGIN_PX, 8), "true class: rows; predicted: columns", fill="black", font=font)
    for index, name in enumerate(names):
        middle = index * cell + cell // 2
        draw.text((left - 8, top + middle), name, fill="black", font=font, anchor="rm")
        _write_upwards(canvas, name, (left + middle, top - 6), font)
        for column, share in enumerate(shares[index]):
            if counts[index, column]:
                place = (left + column * cell + cell // 2, top + middle)
                colour = "white" if share > 0.4 else "black"
                draw.text(place, f"{100 * share:.0f}", fill=colour, font=font, anchor="mm")
    return canvas


def _write_upwards(
    canvas: Image.Image,
    text: str,
    foot: tuple[int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Writes a text from bottom to top, ending above the point `foot`."""
    line = Image.new("L", (round(font.getlength(text)) + 2, _FONT_PX + 4), 0)
    ImageDraw.Draw(line).text((0, 0), text, fill=255, font=font)
    turned = line.rotate(90, expand=True)
    canvas.paste("black", (foot[0] - turned.width // 2, foot[1] - turned.height), turned)


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_NAME_LENGTH else f"{name[: _MAX_NAME_LENGTH - 1]}…"
