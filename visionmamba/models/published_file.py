"""The authors' files, read without running what they hold.

A .pth file is a pickle, which can call any function; only what an allow-list names is built.
"""

import argparse
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from visionmamba.models.weights import METADATA_KEY, read_metadata, read_tensors, require_file

Which = Literal["model", "model_ema"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights in the authors' format and what came with them."""

    name: str
    """File, or "the state_dict"."""
    state: dict[str, Tensor]
    """Tensors by the authors' names."""
    args: Mapping[str, Any] | None = None
    """Options of the training command."""
    unused: tuple[str, ...] = ()
    """Other entries of the file."""


def read_checkpoint(source: str | os.PathLike[str] | Mapping[str, Any], which: Which) -> Checkpoint:
    """Return the weights in a file or a mapping: a checkpoint of training, or a bare state_dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read safely, has no such entry, or holds no tensors.
    """
    if which not in get_args(Which):
        raise ValueError(f"which must be 'model' or 'model_ema'; got {which!r}")
    if isinstance(source, Mapping):
        return _find_state(source, "the state_dict", which)
    return _find_state(_read(source), os.fspath(source), which)


def _read(path: str | os.PathLike[str]) -> object:
    require_file(path)
    if Path(path).suffix != ".safetensors":
        return _unpickle(path)
    if METADATA_KEY in read_metadata(path):
        raise ValueError(f"{path} is a file of visionmamba; load it with visionmamba.load")
    return read_tensors(path)


def _find_state(contents: object, name: str, which: Which) -> Checkpoint:
    """Return the state_dict in a checkpoint, or the contents when they are one themselves."""
    state, args, unused = contents, None, []
    if isinstance(contents, Mapping) and any(entry in contents for entry in get_args(Which)):
        if which not in contents:
            other = "model" if which == "model_ema" else "model_ema"
            raise ValueError(f"{name} has no entry {which!r}; use which={other!r}")
        state = contents[which]
        if isinstance(contents.get("args"), argparse.Namespace):
            args = vars(contents["args"])
        unused = [str(key) for key in contents if key not in (which, "args")]
    elif which != "model":
        raise ValueError(f"{name} is no checkpoint with an entry {which!r}; leave `which` out")
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{name} holds no state_dict of tensors; wanted the authors' checkpoint")
    return Checkpoint(name=name, state=dict(state), args=args, unused=tuple(unused))


def _unpickle(path: str | os.PathLike[str]) -> object:
    """Return what a torch file holds, through torch's allow-list and a few plain types."""
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        argparse.Namespace,
        (_NumberKind, "numpy.dtype"),
        (_number, "numpy.core.multiarray.scalar"),
        (_number, "numpy._core.multiarray.scalar"),
    ]
    try:
        with (
            torch.serialization.safe_globals(allowed),
            warnings.catch_warnings(action="ignore"),  # advice about pickle protocols
        ):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except _UNPICKLING_ERRORS as error:
        asked = re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error))
        reason = f"it asks to run {asked[1]}, which was refused" if asked else "it is damaged"
        raise ValueError(
            f"{os.fspath(path)} cannot be read safely: {reason}; "
            "get the file again from its authors"
        ) from None


_UNPICKLING_ERRORS = (  # what torch raises on files that are damaged or made to harm
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class _NumberKind:
    """Stands for a numpy.dtype in a pickle: real ones crash on a state that is made up."""

    def __init__(self, code: str, *_copying: object) -> None:
        if not re.fullmatch(r"[biuf][1248]", code):
            raise pickle.UnpicklingError(f"{code!r} is no type of a plain number")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            self.code = f">{self.code}"


def _number(kind: _NumberKind, data: bytes) -> bool | int | float:
    """Stand for numpy's scalar in a pickle."""
    number: bool | int | float = np.frombuffer(data, kind.code, count=1)[0].item()
    return number
