"""COCO's run lengths, read back by a decoder written from the format's description alone."""

import numpy as np
import pytest
from numpy.typing import NDArray

from visionmamba.tasks.run_lengths import RunLengths, encode_labels

pytestmark = pytest.mark.once


def numbers_of(text: str) -> list[int]:
    """Characters of five bits, lowest first; 32 says more follow, 16 of the last is the sign."""
    numbers: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
            value = shift = 0
    return numbers


def decoded(mask: RunLengths) -> NDArray[np.bool_]:
    height, width = mask["size"]
    counts = numbers_of(mask["counts"])
    line = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return line.reshape(width, height).T


def test_known_mask_has_the_known_text() -> None:
    # counts 2 3 1 1 of COCO's documentation for [0 0 1 1 1 0 1]; the fourth is written as 1 - 3
    labels = np.array([[0, 0, 1, 1, 1, 0, 1]], np.uint8)
    assert encode_labels(labels)[1] == {"size": [1, 7], "counts": "231N"}


def test_columns_come_before_rows() -> None:
    labels = np.array([[1, 0], [1, 0]], np.uint8)
    assert numbers_of(encode_labels(labels)[1]["counts"]) == [0, 2, 2]


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (63, 47), (300, 500)])
@pytest.mark.parametrize("num_classes", [1, 2, 9])
def test_masks_come_back_as_they_were(shape: tuple[int, int], num_classes: int) -> None:
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, num_classes, (shape[0] // 7 + 1, shape[1] // 7 + 1), np.uint8)
    labels = np.kron(blocks, np.ones((7, 7), np.uint8))[: shape[0], : shape[1]]
    masks = encode_labels(labels)
    assert list(masks) == np.unique(labels).tolist()
    for label, mask in masks.items():
        np.testing.assert_array_equal(decoded(mask), labels == label)


def test_long_runs_and_steps_down_come_back() -> None:
    labels = np.zeros((2000, 1500), np.uint8)
    labels[3:, 0] = 4
    labels[5:9, 700] = 4
    labels[0, 1499] = 4
    np.testing.assert_array_equal(decoded(encode_labels(labels)[4]), labels == 4)


def test_every_pixel_alone_comes_back() -> None:
    labels = np.indices((20, 21)).sum(axis=0).astype(np.uint8) % 2
    for label, mask in encode_labels(labels).items():
        np.testing.assert_array_equal(decoded(mask), labels == label)
