"""Opening image files: the one place where bytes become a picture, or are refused."""

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""Largest picture, width times height, that is opened by default; where Pillow sees a bomb."""

IMAGE_SUFFIXES = (
    ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Endings (lower case) of the files that count as images in a folder."""

_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION = 0x0112  # EXIF: how the camera was held
_TURNED = (5, 6, 7, 8)  # by a quarter, so that height and width change places
_PNG_EXIF = {"exif", "Raw profile type exif"}  # where Pillow finds it before the pixels
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
_bomb_limit_lock = threading.Lock()


class UnreadableImageError(ValueError):
    """A file that cannot be used as an image; the message names it and says why."""


def open_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns the picture in a file, upright, as 8-bit "L" when it is gray and "RGB" otherwise.

    Rotation from EXIF is applied, transparency is laid on white, 16 bits become 8, palette and CMYK
    become RGB; of an animation or a multi-page file the first picture is taken.

    Args:
        path: the file; its ending does not matter.
        max_pixels: width times height beyond which the file is refused before it is decoded.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableImageError: it is no image, damaged, cut short, too large or of a kind without
            a known range.
    """
    path = Path(path)
    if path.is_dir():
        raise UnreadableImageError(f"{path} is a folder, not an image; give the files in it")
    return _open(path, path, max_pixels)


def decode_image(content: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns the picture in an encoded file's bytes, as `open_image` does.

    Args:
        content: JPEG, PNG, WebP or another known format.
        name: what messages call it.
        max_pixels: width times height beyond which it is refused before it is decoded.

    Raises:
        UnreadableImageError: as for `open_image`.
    """
    return _open(io.BytesIO(content), name, max_pixels)


def image_size(path: Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Returns (height, width) of the upright picture in a file, from its header alone.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableImageError: it is no image, or too large.
    """
    with opened_image(path, path, max_pixels=max_pixels) as image:
        return image.size if _is_turned(image) else (image.height, image.width)


@contextmanager
def opened_image(
    source: Path | io.BytesIO, name: str | Path, *, max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """Opens a picture as it is stored, not decoded yet, and explains what goes wrong meanwhile.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableImageError: it is no image, too large, or the body met a damaged part.
    """
    if isinstance(source, Path) and not source.exists():
        raise FileNotFoundError(f"there is no image {source}; check the path")
    try:
        with warnings.catch_warnings(), _without_pillow_limit(), Image.open(source) as image:
            # damaged EXIF and the like: Pillow warns and carries on, and so do we
            warnings.filterwarnings("ignore", module="PIL")
            width, height = image.size
            if width * height > max_pixels:
                raise UnreadableImageError(
                    f"{name} would decompress to {width}x{height} = {width * height} pixels, "
                    "more than the limit "
                    f"of {max_pixels}; raise max_pixels if you trust the file"
                )
            yield image
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError(
            f"{name} is not an image in any known format, whatever its name says; remove or "
            "replace it"
        ) from None
    except _DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UnreadableImageError(f"{name} cannot be read: {error.strerror}") from error
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise UnreadableImageError(
            f"{name} is damaged or cut short ({reason}); remove it or copy it again"
        ) from error


def _open(source: Path | io.BytesIO, name: str | Path, max_pixels: int) -> Image.Image:
    with opened_image(source, name, max_pixels=max_pixels) as image:
        image.load()
        return as_upright_eight_bit(image, name)


def _is_turned(image: Image.Image) -> bool:
    if image.format == "PNG" and not _PNG_EXIF & image.info.keys():
        return False  # Pillow would decode all pixels to look for EXIF behind them
    return image.getexif().get(_ORIENTATION) in _TURNED


def as_upright_eight_bit(image: Image.Image, name: str | Path) -> Image.Image:
    """Returns a picture turned as its EXIF says and in the mode that `open_image` would give it.

    Raises:
        UnreadableImageError: its pixels have no known range; the message calls it by name.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BIT_MODES or image.mode == "I":
        return _from_sixteen_bit(np.asarray(image), name)
    if image.mode == "F":
        raise UnreadableImageError(
            f"{name} holds floating-point pixels, whose range is unknown; save it as 8- or 16-bit"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        gray_source = False
    else:
        gray_source = image.mode in ("1", "L")
    return image.convert("L" if gray_source else "RGB")


def _from_sixteen_bit(pixels: NDArray[np.integer], name: str | Path) -> Image.Image:
    if pixels.min() < 0 or pixels.max() > 65535:
        raise UnreadableImageError(
            f"{name} holds integers from {pixels.min()} to {pixels.max()}, wanted 0 to 65535; "
            "save it as 16-bit"
        )
    return Image.fromarray((pixels.astype(np.uint32) // 257).astype(np.uint8))


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Turns off Pillow's process-wide limit: `open_image` checks its own, which may be higher."""
    with _bomb_limit_lock:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit
