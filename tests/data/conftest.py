"""Image files, good and bad."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photo() -> Image.Image:
    """A colour picture of 40x30 px with a dark left half."""
    pixels = np.full((30, 40, 3), (200, 150, 100), dtype=np.uint8)
    pixels[:, :20] = (20, 30, 40)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path, photo: Image.Image) -> Path:
    """Two classes with three training and two validation pictures each."""
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                photo.save(tmp_path / split / name / f"{number}.png")
    return tmp_path
