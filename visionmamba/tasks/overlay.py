"""Pictures of label maps: colours of classes, masks laid over photographs, legends."""

import colorsys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from visionmamba.data import IGNORE

Palette = tuple[tuple[int, int, int], ...]
"""Red, green and blue, 0 to 255, of each class."""

_IGNORE_COLOUR = (255, 255, 255)
_GOLDEN_RATIO = 0.618034
_LEGEND_WIDTH_PX = 900
_LINE_PX = 18
_SWATCH_PX = 12
_FONT_PX = 12
_MAX_NAME_LENGTH = 28
_MAX_LEGEND_CLASSES = 24


def palette_of(colours: Sequence[Sequence[int]] | NDArray[np.uint8] | None, count: int) -> Palette:
    """Returns one colour a class: those given, or hues as far apart as `count` lets them be.

    Raises:
        ValueError: there are not `count` colours of three values from 0 to 255.
    """
    if colours is None:
        return tuple(_spread_colour(index) for index in range(count))
    given = [[int(value) for value in colour] for colour in colours]
    if len(given) != count or any(
        len(colour) != 3 or not all(0 <= value <= 255 for value in colour) for colour in given
    ):
        raise ValueError(
            f"a palette must have a colour of three values from 0 to 255 for each of the {count} "
            f"classes; got {len(given)} colours"
        )
    return tuple((red, green, blue) for red, green, blue in given)


def paint_labels(labels: NDArray[np.uint8], palette: Palette) -> Image.Image:
    """Returns (H, W) labels as a palette image "P", whose pixels are the labels.

    `IGNORE` is white.
    """
    colours = np.full((256, 3), 255, np.uint8)
    colours[: len(palette)] = palette
    colours[IGNORE] = _IGNORE_COLOUR
    image = Image.fromarray(labels)
    image.putpalette(colours.tobytes())
    return image


def blend_labels(
    picture: Image.Image, labels: NDArray[np.uint8], palette: Palette, *, opacity: float
) -> Image.Image:
    """Returns the picture with the classes' colours on it, "RGB".

    Args:
        picture: of the labels' size.
        labels: (H, W).
        palette: one colour a class.
        opacity: of the colours, 0 to 1.

    Raises:
        ValueError: the opacity is out of range.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must lie between 0 and 1, got {opacity}")
    return Image.blend(
        picture.convert("RGB"), paint_labels(labels, palette).convert("RGB"), opacity
    )


def add_legend(
    picture: Image.Image, entries: Sequence[tuple[str, tuple[int, int, int]]]
) -> Image.Image:
    """Returns the picture above a legend of texts and their colours, the first 24 of them.

    Letters grow with a picture of more than 900 pixels across.
    """
    unit = max(1.0, picture.width / _LEGEND_WIDTH_PX)
    line, swatch, gap = (round(unit * size) for size in (_LINE_PX, _SWATCH_PX, 4))
    font = ImageFont.load_default(size=unit * _FONT_PX)
    hidden = len(entries) - _MAX_LEGEND_CLASSES
    shown = [(_shortened(text), colour) for text, colour in entries[:_MAX_LEGEND_CLASSES]]
    longest = max((font.getlength(text) for text, _ in shown), default=0)
    column = round(longest) + swatch + 4 * gap
    width = max(picture.width, column + gap)
    num_columns = max(1, width // column)
    num_lines = -(-len(shown) // num_columns) + (hidden > 0)
    canvas = Image.new("RGB", (width, picture.height + num_lines * line + 2 * gap), "white")
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    for number, (text, colour) in enumerate(shown):
        left = gap + number % num_columns * column
        top = picture.height + gap + number // num_columns * line
        draw.rectangle((left, top, left + swatch, top + swatch), fill=colour, outline="#5b6770")
        draw.text((left + swatch + gap, top + swatch // 2), text, "black", font=font, anchor="lm")
    if hidden > 0:
        top = picture.height + gap + (num_lines - 1) * line
        draw.text((gap, top + swatch // 2), f"and {hidden} more", "black", font=font, anchor="lm")
    return canvas


def draw_rows(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], *, side: int = 256
) -> Image.Image:
    """Returns pictures in a table, each shrunk or enlarged to fit a square, under titles.

    Photographs are smoothed, palette images are not.
    """
    font = ImageFont.load_default(size=_FONT_PX)
    gap = 4
    fitted = [[_fitted(picture, side) for picture in row] for row in rows]
    width = max(picture.width for row in fitted for picture in row) + gap
    heights = [max(picture.height for picture in row) + gap for row in fitted]
    canvas = Image.new("RGB", (gap + width * len(titles), _LINE_PX + sum(heights)), "#30363c")
    draw = ImageDraw.Draw(canvas)
    for number, title in enumerate(titles):
        draw.text((gap + number * width, 2), title, fill="white", font=font)
    top = _LINE_PX
    for row, height in zip(fitted, heights, strict=True):
        for number, picture in enumerate(row):
            canvas.paste(picture, (gap + number * width, top))
        top += height
    return canvas


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    is_labels = picture.mode == "P"
    filter_ = Image.Resampling.NEAREST if is_labels or scale > 1 else Image.Resampling.BILINEAR
    return picture.resize(size, filter_).convert("RGB")


def _spread_colour(index: int) -> tuple[int, int, int]:
    hue = (0.58 + index * _GOLDEN_RATIO) % 1.0
    saturation = (0.75, 0.5, 0.95)[index // 7 % 3]
    value = (0.9, 0.65, 0.8)[index // 5 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_NAME_LENGTH else f"{name[: _MAX_NAME_LENGTH - 1]}…"
