"""Pictures of results: colours of classes, masks and boxes laid over photographs, legends."""

import colorsys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from visionmamba.data import IGNORE
from visionmamba.data.object_masks import Counts, decode_part, mask_box

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
_BRIGHT = 140.0  # of 255: colours above carry black letters


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
    _check_opacity(opacity)
    return Image.blend(
        picture.convert("RGB"), paint_labels(labels, palette).convert("RGB"), opacity
    )


def draw_objects(
    picture: Image.Image,
    *,
    boxes: NDArray[np.floating],
    labels: NDArray[np.integer],
    class_names: Sequence[str],
    palette: Palette,
    masks: Sequence[Counts] | None = None,
    scores: NDArray[np.floating] | None = None,
    opacity: float = 0.5,
    scale: int = 1,
) -> Image.Image:
    """Returns the picture with its objects, "RGB"; the first lie on top.

    Objects have the colours of their classes, or each its own where there is one class. Name and
    score stand where the box is wide enough for them.

    Args:
        picture: upright.
        boxes: (n, 4) left, top, right, bottom in pixels.
        labels: (n,) from 1, classes.
        class_names: label k is the k-th, counted from 1.
        palette: one colour a class.
        masks: run lengths of each object; None draws boxes only.
        scores: (n,) from 0 to 1, if there are any.
        opacity: of the masks, 0 to 1.
        scale: how many times larger the result is than the picture, so that boxes of a small one
            do not hide it.

    Raises:
        ValueError: the opacity is out of range.
    """
    _check_opacity(opacity)
    colours = [
        palette[label - 1] if len(class_names) > 1 else _spread_colour(number)
        for number, label in enumerate(labels.tolist())
    ]
    pixels = np.array(picture.convert("RGB"))
    for counts, colour in reversed(list(zip(masks or (), colours, strict=masks is not None))):
        _blend_mask(pixels, counts, colour, opacity)
    size = (picture.width * scale, picture.height * scale)
    canvas = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    unit = max(1.0, max(canvas.size) / _LEGEND_WIDTH_PX)
    font = ImageFont.load_default(size=unit * _FONT_PX)
    names = ["" if len(class_names) == 1 else _shortened(name) for name in class_names]
    for number in reversed(range(len(colours))):
        left, top, right, bottom = (float(side) * scale for side in boxes[number])
        outline = (left, top, max(left, right - 1), max(top, bottom - 1))
        draw.rectangle(outline, outline=colours[number], width=round(unit))
        score = "" if scores is None else f"{scores[number]:.2f}"
        text = f"{names[int(labels[number]) - 1]} {score}".strip()
        if text and font.getlength(text) + 4 * unit <= right - left:
            _write_tag(draw, text, (left, top), colours[number], font, unit)
    return canvas


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


def _check_opacity(opacity: float) -> None:
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must lie between 0 and 1, got {opacity}")


def _blend_mask(
    pixels: NDArray[np.uint8], counts: Counts, colour: tuple[int, int, int], opacity: float
) -> None:
    """Colours the pixels (H, W, 3) of a mask in place."""
    box = mask_box(counts, len(pixels))
    if box is None:
        return
    left, top, right, bottom = box
    inside = decode_part(counts, len(pixels), rows=(top, bottom), columns=(left, right)) > 0
    part = pixels[top:bottom, left:right]
    mixed = (1 - opacity) * part[inside] + opacity * np.array(colour)
    part[inside] = mixed.round().astype(np.uint8)


def _write_tag(
    draw: ImageDraw.ImageDraw,
    text: str,
    corner: tuple[float, float],
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    unit: float,
) -> None:
    """Writes a text on its colour above a corner, or below where the picture ends there."""
    left, top = corner
    height = unit * (_FONT_PX + 4)
    top = top - height if top >= height else top
    draw.rectangle((left, top, left + font.getlength(text) + 4 * unit, top + height), fill=colour)
    red, green, blue = colour
    letters = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > _BRIGHT else "white"
    middle = (left + 2 * unit, top + height / 2)
    draw.text(middle, text, letters, font=font, anchor="lm")


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
