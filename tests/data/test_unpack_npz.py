"""The example that unpacks .npz archives into folders."""

import io
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visionmamba.data import ImageFolder

pytestmark = pytest.mark.once

EXAMPLE = Path(__file__).parents[2] / "examples" / "unpack_npz.py"


def picture(level: int, kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9), (level,) * 3).save(file, format=kind)
    return file.getvalue()


def archive(path: Path, **changes: Any) -> Path:
    """Three pictures a split, of the classes 1, 0, 1."""
    files = [picture(10, "PNG"), picture(20, "JPEG"), picture(30, "WEBP")]
    entries: dict[str, Any] = {"classes": np.array(["cat", "dog"])}
    for split in ("train", "test"):
        entries[f"{split}_data"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        entries[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        entries[f"{split}_labels"] = np.array([1, 0, 1])
    np.savez(path, **(entries | changes))
    return path


def unpack(source: Path, out: Path) -> None:
    runpy.run_path(str(EXAMPLE))["main"](source, out, val="test")


def test_archive_becomes_a_folder_that_can_be_read(tmp_path: Path) -> None:
    unpack(archive(tmp_path / "x.npz"), tmp_path / "data")
    train, val = ImageFolder(root=tmp_path / "data").build()
    assert train.class_names == val.class_names == ("cat", "dog")
    files = [str(train.file(index)) for index in range(3)]
    assert [Path(file).name for file in files] == ["0000001.jpg", "0000000.png", "0000002.webp"]
    assert train.labels == (0, 1, 1)
    assert train.image(1).getpixel((0, 0)) == (10, 10, 10)
    assert not (tmp_path / "data.partial").exists()


@pytest.mark.parametrize("name", ["../evil", "/etc", "..", "a\\b", ""])
def test_class_names_never_leave_the_folder(tmp_path: Path, name: str) -> None:
    source = archive(tmp_path / "x.npz", classes=np.array(["cat", name]))
    with pytest.raises(ValueError, match="cannot be the name of a folder"):
        unpack(source, tmp_path / "data")
    assert sorted(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.array([1, 0])}, "one more than the 2 labels, got 4"),
        ({"train_labels": np.array([1, 0, 2])}, "points beyond its data or its 2 classes"),
        ({"train_offsets": np.array([0, 1, 2, 10**9])}, "points beyond its data"),
        ({"train_offsets": np.array([0, 9, 3, 12])}, "must ascend from 0"),
    ],
)
def test_entries_that_disagree_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(archive(tmp_path / "x.npz", **changes), tmp_path / "data")


def test_missing_entries_and_existing_folders_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", classes=np.array(["a", "b"]))
    with pytest.raises(ValueError, match=r"x\.npz holds no train_data; it holds classes"):
        unpack(tmp_path / "x.npz", tmp_path / "data")
    with pytest.raises(FileExistsError, match="exists; give another folder or remove it"):
        unpack(tmp_path / "x.npz", tmp_path)
