"""Measuring the loader: sources, files, wrong options."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from visionmamba.bench.loader import LoaderSpeed
from visionmamba.cli import main

pytestmark = pytest.mark.once


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with one small picture each, and the same as a shard."""
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for label, name in enumerate(("cat", "dog")):
            path = tmp_path / "train" / name / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (20, 20)).save(path)
            archive.add(path, arcname=f"{name}.png")
            info = tarfile.TarInfo(f"{name}.cls")
            info.size = 1
            archive.addfile(info, io.BytesIO(str(label).encode()))
    return tmp_path


def test_drawn_pictures_are_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--workers",
        "0",
        "1",
        "--image-size",
        "32",
        "--batch-size",
        "2",
        "--seconds",
        "0.05",
        "--device",
        "cpu",
    ]
    assert main(["bench", "loader", *options, "--out", str(tmp_path)]) == 0
    assert "drawn JPEGs of 500x375 px, 32 px, changes: published" in capsys.readouterr().out
    result = json.loads((tmp_path / "loader.json").read_text())
    assert [row["num_workers"] for row in result["rows"]] == [0, 1]
    assert all(row["images_per_second"] > 0 for row in result["rows"])
    assert result["eaten_per_second"] is None
    assert result["machine"]["command"].startswith("visionmamba bench loader --workers 0 1")


@pytest.mark.parametrize("source", ["root", "shards"])
def test_other_sources_are_measured(folder: Path, source: str) -> None:
    given: dict[str, Any] = {
        "root": {"root": folder},
        "shards": {"shards": (str(folder / "*.tar"),)},
    }[source]
    speed = LoaderSpeed(
        workers=(0,), image_size=16, batch_size=2, seconds=0.01, device="cpu", **given
    )
    (row,) = speed.measure().rows
    assert row.images_per_second > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": Path("x"), "shards": ("y",)}, "give one of root, shards and hugging_face"),
        ({"image_size": 100}, "image_size must be a positive multiple of 16, got 100"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seconds": 0.0}, "seconds must be positive, got 0"),
        ({"workers": (-1,)}, "workers must be at least 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderSpeed(**options)


@pytest.mark.gpu
def test_appetite_of_vim_is_measured_beside_it() -> None:
    speed = LoaderSpeed(workers=(2,), image_size=32, batch_size=8, seconds=0.2, device="cuda")
    result = speed.measure()
    assert result.eaten_per_second is not None
    assert result.eaten_per_second > 0
