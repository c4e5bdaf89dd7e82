"""Files become upright 8-bit pictures, or are refused in one sentence that names them."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionmamba.data import UnreadableImageError, open_image

MAX_JPEG_ERROR = 6  # grey levels; quality 95 on flat areas


def png_that_claims(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no image .*none\.jpg; check the path"):
        open_image(tmp_path / "none.jpg")


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match="is a folder, not an image"):
        open_image(tmp_path)


def test_text_file_named_jpg_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.jpg").write_text("buy milk")
    with pytest.raises(
        UnreadableImageError, match=r"note\.jpg is not an image in any known format"
    ):
        open_image(tmp_path / "note.jpg")


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(UnreadableImageError, match=r"empty\.png is not an image"):
        open_image(tmp_path / "empty.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif", "bmp"])
def test_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableImageError, match=rf"cut\.{suffix} is (damaged|not an image)"):
        open_image(path)


def test_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_that_claims(100_000, 100_000))
    with pytest.raises(UnreadableImageError, match="would decompress to 100000x100000") as caught:
        open_image(tmp_path / "bomb.png")
    assert "raise max_pixels" in str(caught.value)


def test_limit_of_pixels_can_be_lowered(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "photo.png")
    with pytest.raises(UnreadableImageError, match="more than the limit of 1199"):
        open_image(tmp_path / "photo.png", max_pixels=1199)
    assert open_image(tmp_path / "photo.png", max_pixels=1200).size == (40, 30)


def test_limit_of_pixels_can_be_raised_beyond_pillows(
    tmp_path: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo.save(tmp_path / "photo.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert open_image(tmp_path / "photo.png").size == (40, 30)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path: Path) -> None:
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    image = open_image(tmp_path / "deep.png")
    assert image.mode == "L"
    assert np.asarray(image).tolist() == [[0, 1, 128, 255]]


def test_integers_beyond_sixteen_bit_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[70000]], dtype=np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(
        UnreadableImageError, match="integers from 70000 to 70000, wanted 0 to 65535"
    ):
        open_image(tmp_path / "wide.tif")


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UnreadableImageError, match="floating-point pixels, whose range is unknown"):
        open_image(tmp_path / "float.tif")


def test_palette_keeps_its_colours(tmp_path: Path, photo: Image.Image) -> None:
    photo.quantize(2).save(tmp_path / "palette.png")
    image = open_image(tmp_path / "palette.png")
    assert image.mode == "RGB"
    assert image.getpixel((30, 15)) == (200, 150, 100)


def test_cmyk_becomes_rgb(tmp_path: Path, photo: Image.Image) -> None:
    photo.convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    pixels = np.asarray(open_image(tmp_path / "print.jpg"), dtype=int)
    assert abs(pixels[15, 30] - [200, 150, 100]).max() <= MAX_JPEG_ERROR


def test_transparency_is_laid_on_white(tmp_path: Path, photo: Image.Image) -> None:
    photo.putalpha(0)
    photo.save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path: Path, photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise
    photo.save(tmp_path / "turned.png", exif=exif)
    image = open_image(tmp_path / "turned.png")
    assert image.size == (30, 40)
    assert image.getpixel((15, 5)) == (20, 30, 40)


def test_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.png").getpixel((0, 0)) == (255, 0, 0)


def test_gray_stays_gray(tmp_path: Path, photo: Image.Image) -> None:
    photo.convert("L").save(tmp_path / "gray.jpg")
    assert open_image(tmp_path / "gray.jpg").mode == "L"


def test_symbolic_link_is_followed(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "photo.png")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "photo.png")
    assert open_image(tmp_path / "link.jpg").size == (40, 30)
