"""Files that are whole or absent, and checkpoints that hold no code."""

from pathlib import Path

import pytest
import torch

from visionmamba.training.checkpoint import read_checkpoint, replace_file

pytestmark = pytest.mark.once


def test_failed_write_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"former")

    def fail(file: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert path.read_bytes() == b"former"


def test_written_file_replaces_the_former(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"former")
    replace_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"weights": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"last\.ckpt is not a whole checkpoint .* delete it to"):
        read_checkpoint(path)


def test_checkpoint_with_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"weights": print}, path)
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        read_checkpoint(path)
