"""Reading masks: numbers as they are stored, or one sentence that says why not."""

import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.drawn_masks import bands, mask_folder, pixels, save_image, save_mask
from tests.data.test_image_files import png_that_claims
from visionmamba.data import IGNORE, ArrayMasks, FileMasks, MaskError, MaskFolder
from visionmamba.data.masks import read_numbers

pytestmark = pytest.mark.once


@pytest.fixture
def train(tmp_path: Path) -> FileMasks:
    return MaskFolder(root=mask_folder(tmp_path)).open("train")


def narrow_gray(bits: int, numbers: list[int]) -> bytes:
    """A gray PNG of one row with fewer than 8 bits a pixel."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    packed = int("".join(f"{number:0{bits}b}" for number in numbers), 2)
    row = b"\0" + packed.to_bytes(len(numbers) * bits // 8, "big")
    header = struct.pack(">IIBBBBB", len(numbers), 1, bits, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("index", [0, 1], ids=["palette", "gray"])
def test_mask_holds_the_stored_numbers(train: FileMasks, index: int) -> None:
    mask = train.mask(index)
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, bands(*train.size(index)))


@pytest.mark.parametrize(
    ("bits", "numbers"), [(1, [0, 1] * 4), (2, [0, 1, 2, 3]), (4, [0, 1, 7, 15])]
)
def test_narrow_gray_keeps_its_numbers(tmp_path: Path, bits: int, numbers: list[int]) -> None:
    (tmp_path / "mask.png").write_bytes(narrow_gray(bits, numbers))
    assert read_numbers(tmp_path / "mask.png").tolist() == [numbers]


@pytest.mark.parametrize("number", [3, 254, 256, 65535])
def test_number_of_no_class_is_named_with_its_place(train: FileMasks, number: int) -> None:
    stored = bands(*train.size(0)).astype(np.uint16)
    stored[4, 5] = number
    Image.fromarray(stored).save(train.mask_files[0])
    with pytest.raises(MaskError, match=rf"0.png holds the number {number} at row 4, column 5 \(1"):
        train.mask(0)


def test_sixteen_bits_are_read(train: FileMasks) -> None:
    stored = bands(*train.size(0))
    Image.fromarray(stored.astype(np.uint16)).save(train.mask_files[0])
    assert np.array_equal(train.mask(0), stored)


def test_size_that_differs_is_named(train: FileMasks) -> None:
    save_mask(train.mask_files[0], bands(7, 8))
    with pytest.raises(MaskError, match=r"0.png is 8x7 px, its picture .*0.png 16x12"):
        train.mask(0)


def test_error_reaches_other_processes_whole(train: FileMasks) -> None:
    save_mask(train.mask_files[0], bands(7, 8))
    with pytest.raises(MaskError) as caught:
        train.mask(0)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.kind, str(copy)) == ("wrong size", str(caught.value))


def test_colours_are_refused(train: FileMasks) -> None:
    pixels(12, 16).save(train.mask_files[0])
    with pytest.raises(MaskError, match=r"holds colours \(Pillow's mode RGB\), wanted one class"):
        train.mask(0)


def test_picture_turned_by_its_camera_has_the_size_it_is_seen_in(
    train: FileMasks, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels(16, 12).save(train.image_files[0], exif=exif)
    assert train.size(0) == (12, 16) == train.image(0).size[::-1]


def test_large_mask_is_refused_before_it_is_decoded(train: FileMasks) -> None:
    train.mask_files[0].write_bytes(png_that_claims(60_000, 60_000))
    with pytest.raises(MaskError, match="more than the limit"):
        train.mask(0)


def test_damaged_mask_is_named(train: FileMasks) -> None:
    content = train.mask_files[0].read_bytes()
    train.mask_files[0].write_bytes(content[: len(content) // 2])
    with pytest.raises(MaskError, match=r"0.png is damaged or cut short"):
        train.mask(0)


def test_gray_picture_becomes_rgb(train: FileMasks) -> None:
    save_image(train.image_files[0], pixels(12, 16).convert("L"))
    assert train.image(0).mode == "RGB"


def test_arrays_are_checked() -> None:
    colours = np.zeros((2, 4, 5, 3), np.uint8)
    masks = np.full((2, 4, 5), IGNORE, np.uint8)
    found = ArrayMasks(pixels=colours, masks=masks, class_names=("a", "b"))
    assert (len(found), found.size(0), found.file(0)) == (2, (4, 5), None)
    masks[0, 0, 0] = 2
    with pytest.raises(ValueError, match="below 2 or 255, got 2"):
        ArrayMasks(pixels=colours, masks=masks, class_names=("a", "b"))
    with pytest.raises(ValueError, match=r"\(N, H, W, 3\)"):
        ArrayMasks(pixels=colours[:1], masks=masks, class_names=("a", "b"))
