"""Files that are replaced whole or not at all, and checkpoints written that way."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pytorch_lightning.plugins import CheckpointIO
from typing_extensions import override


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file under a temporary name, forces it to the disk, and only then renames it.

    A process killed at any moment leaves the former file whole; the temporary one is overwritten by
    the next attempt.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def replace_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a small JSON file by `replace_file`."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


def read_checkpoint(path: str | Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """Returns a checkpoint; only tensors and plain values are ever unpickled.

    Raises:
        ValueError: the file is damaged or holds anything else.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is not a whole checkpoint ({reason}); delete it to train from the start"
        ) from error
    return checkpoint


class AtomicCheckpointIO(CheckpointIO):
    """Lets pytorch-lightning write by `replace_file` and read by `read_checkpoint`."""

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        replace_file(Path(path), lambda file: torch.save(checkpoint, file))

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return read_checkpoint(path, map_location=map_location)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
