"""The examples learn what they say, in fewer steps than they take by themselves."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.once


def test_digits_are_segmented_by_dpt() -> None:
    main = runpy.run_path(str(EXAMPLES / "segment_digits.py"))["main"]
    assert main(steps=20) > 0.35  # 0.14 before the first step


def test_digits_are_detected_by_fcos() -> None:
    main = runpy.run_path(str(EXAMPLES / "detect_digits.py"))["main"]
    recall, precision = main(steps=30)
    assert recall > 0.8 and precision > 0.8


def test_shapes_are_segmented_by_mask2former() -> None:
    main = runpy.run_path(str(EXAMPLES / "segment_shapes_mask2former.py"))["main"]
    assert main(steps=60) > 0.35  # 0.19 where all is taken for ground
