"""Masks are decoded and filled as pycocotools does it, and nothing hostile is decoded at all."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as pycocotools_mask

from visionmamba.data import object_masks
from visionmamba.data.object_masks import (
    NoAreaError,
    SegmentTable,
    column_runs,
    decode_mask,
    decode_part,
    draw_runs,
    encode_mask,
    mask_area,
    mask_box,
    merge_masks,
    read_segment,
    segment_counts,
)

pytestmark = pytest.mark.once


def random_masks() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 9, (300, 2))
    return [
        (generator.random((height, width)) < generator.random()).astype(np.uint8)
        for height, width in sizes
    ]


def compressed(mask: np.ndarray) -> dict[str, Any]:
    encoded = pycocotools_mask.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def test_encoding_is_undone_by_decoding() -> None:
    for mask in random_masks():
        counts = encode_mask(mask)
        assert counts.sum() == mask.size and (counts[1:] > 0).all()
        assert np.array_equal(decode_mask(counts, *mask.shape), mask)


def test_parts_are_encoded_and_decoded_in_their_place() -> None:
    generator = np.random.default_rng(1)
    for mask in random_masks():
        top, bottom = np.sort(generator.choice(mask.shape[0] + 1, 2, replace=False))
        left, right = np.sort(generator.choice(mask.shape[1] + 1, 2, replace=False))
        part = mask[top:bottom, left:right]
        counts = encode_mask(mask)
        decoded = decode_part(counts, len(mask), rows=(top, bottom), columns=(left, right))
        assert np.array_equal(decoded, part)
        alone = np.zeros_like(mask)
        alone[top:bottom, left:right] = part
        placed = encode_mask(part, at=(top, left), size=mask.shape)
        assert np.array_equal(placed, encode_mask(alone))


def test_merged_masks_hold_what_any_holds() -> None:
    generator = np.random.default_rng(2)
    for mask in random_masks():
        others = [(generator.random(mask.shape) < 0.3).astype(np.uint8) for _ in range(2)]
        merged = merge_masks([encode_mask(one) for one in (mask, *others)])
        assert np.array_equal(merged, encode_mask(mask | others[0] | others[1]))
    assert np.array_equal(merge_masks([encode_mask(mask)]), encode_mask(mask))


def test_compressed_and_plain_lengths_are_read_as_pycocotools_writes_them() -> None:
    for mask in random_masks():
        plain = {"size": list(mask.shape), "counts": encode_mask(mask).tolist()}
        for written in (compressed(mask), plain):
            segment = read_segment(written, *mask.shape)
            counts = segment_counts(segment, *mask.shape)
            assert np.array_equal(decode_mask(counts, *mask.shape), mask)


def test_long_runs_are_read() -> None:
    mask = np.zeros((900, 1100), dtype=np.uint8)
    mask[100:800, 200:1000] = 1
    mask[::2, 500] ^= 1
    segment = read_segment(compressed(mask), 900, 1100)
    assert np.array_equal(decode_mask(segment_counts(segment, 900, 1100), 900, 1100), mask)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_outlines_are_filled_as_pycocotools_fills_them() -> None:
    generator = np.random.default_rng(1)
    for number in range(40):
        height, width = generator.integers(8, 60, 2).tolist()
        outlines = [
            (generator.uniform(-0.2, 1.2, (corners, 2)) * (width, height)).ravel().tolist()
            for corners in generator.integers(3, 8, 1 + number % 3)
        ]
        parts = pycocotools_mask.frPyObjects(outlines, height, width)
        expected = pycocotools_mask.decode(pycocotools_mask.merge(parts))
        counts = segment_counts(read_segment(outlines, height, width), height, width)
        assert np.array_equal(decode_mask(counts, height, width), expected)


def test_columns_of_several_masks_hold_their_pixels() -> None:
    generator = np.random.default_rng(2)
    for height, width in generator.integers(1, 9, (100, 2)):
        masks = generator.random((4, height, width)) < [[[0.3]], [[0.0]], [[1.0]], [[0.8]]]
        runs = column_runs([encode_mask(mask) for mask in masks], height, width)
        filled = np.zeros((4, height, width), dtype=np.int64)
        for number, column, top, bottom in zip(*runs, strict=True):
            assert top < bottom
            filled[number, top:bottom, column] += 1
        assert np.array_equal(filled, masks)
    assert [len(one) for one in column_runs([], 3, 4)] == [0] * 4


@pytest.mark.parametrize("at_once", [1, 7, 2**22])
def test_runs_are_drawn_as_the_masks_they_come_from(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_masks, "_DRAWN_AT_ONCE", at_once)
    masks = np.random.default_rng(3).random((5, 6, 9)) < 0.5
    masks[1] = False
    number, column, top, bottom = column_runs([encode_mask(mask) for mask in masks], 6, 9)
    runs = torch.from_numpy(np.stack([(number * 6 + top) * 9 + column, bottom - top]))
    drawn = draw_runs(runs, 5, (6, 9))
    assert drawn.dtype == torch.uint8
    assert np.array_equal(drawn, masks)


def test_no_runs_draw_empty_masks() -> None:
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert draw_runs(none, 0, (6, 9)).shape == (0, 6, 9)
    assert not draw_runs(none, 2, (6, 9)).any()


def test_box_and_area_of_run_lengths_are_those_of_the_mask() -> None:
    for mask in random_masks():
        counts = encode_mask(mask)
        rows, columns = np.nonzero(mask)
        expected = (
            (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else None
        )
        assert mask_box(counts, mask.shape[0]) == expected
        assert mask_area(counts) == mask.sum()


def test_table_gives_back_each_segment() -> None:
    triangle, square = [1.0, 1, 5, 1, 3, 4], [0.0, 0, 2, 0, 2, 2, 0, 2]
    run_lengths = {"size": [6, 6], "counts": [3, 5, 28]}
    segments = [read_segment(one, 6, 6) for one in ([triangle, square], run_lengths, [square])]
    table = SegmentTable.of(segments)
    for index, segment in enumerate(segments):
        assert table[index].is_outline == segment.is_outline
        for part, expected in zip(table[index].parts, segment.parts, strict=True):
            assert np.array_equal(part, expected)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("text", "list of outlines"),
        ({"size": [4, 4]}, "size and counts"),
        ({"size": [4, 5], "counts": [16]}, r"size \[4, 4\]"),
        ({"size": [4, 4], "counts": [15]}, "add up to 16"),
        ({"size": [4, 4], "counts": [20, -4]}, "at least 0"),
        ({"size": [4, 4], "counts": [10**400]}, "beyond a picture"),
        ({"size": [4, 4], "counts": [8.5, 7.5]}, "whole numbers"),
        ({"size": [4, 4], "counts": [True] * 16}, "lists of numbers"),
        ({"size": [4, 4], "counts": None}, "lists of numbers"),
        ({"size": [4, 4], "counts": ""}, "cut short"),
        ({"size": [4, 4], "counts": "oooo"}, "cut short"),
        ({"size": [4, 4], "counts": "o" * 50 + "0"}, "no picture has"),
        ({"size": [4, 4], "counts": "é"}, "characters"),
        ({"size": [4, 4], "counts": "@@@@@@"}, "at least 0"),
        ([[1, 2, 3, 4, 5, 6, 7]], "odd number"),
        ([[1, 2, 3, 4, "5", 6]], "lists of numbers"),
        ([1, 2, 3, 4, 5, 6], "lists of numbers"),
        ([[1, 2, 3, 4, 5, 1e300]], "leaves the picture"),
        ([[1, 2, 3, 4, 5, float("inf")]], "leaves the picture"),
        ([[1, 2, 3, 4, 5, -(10**400)]], "leaves the picture"),
        ([[0, 0, 4, 4] * 100], "longer outlines"),
    ],
)
def test_what_does_not_fit_the_picture_is_refused(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_segment(value, 4, 4)


def test_outlines_of_two_corners_have_no_area() -> None:
    with pytest.raises(NoAreaError, match="three corners"):
        read_segment([[0, 0, 1, 1]], 4, 4)


def test_outlines_name_the_library_that_fills_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    segment = read_segment([[0, 0, 3, 0, 3, 3]], 4, 4)
    with pytest.raises(ImportError, match=r"visionmamba\[detection\]"):
        segment_counts(segment, 4, 4)
