"""Where kernels compiled at first use are kept: private to the user, whole or not at all.

A file's name holds the key it was asked for by and the digest of its own bytes, so a stale or
damaged file is never loaded. It is written under a temporary name and renamed, so processes may
start together or die half-way without harm.
"""

import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_ABANDONED_SECONDS = 3600
_REMEDY = "set XDG_CACHE_HOME to a directory of your own"


class UnavailableError(Exception):
    """Compiled kernels cannot be had here; the message says why and what would help."""


def cached_file(key: str, suffix: str, write: Callable[[Path], object]) -> Path:
    """Return the file kept under a key, writing it first when there is none.

    Args:
        key: all that decides the file's bytes, as a name without separators.
        suffix: ending of the file's name, with its dot.
        write: writes the file to the path that it is given.

    Raises:
        UnavailableError: the cache cannot be used or is not private; or `write` raised it.
    """
    directory = _private_directory()
    try:
        for path in directory.glob(f"{key}-*{suffix}"):
            with suppress(FileNotFoundError):  # another process has removed a damaged one
                if path.name == _name(key, suffix, path):
                    return path
                path.unlink()
        _remove_abandoned(directory)
        handle, name = tempfile.mkstemp(prefix=".compiling-", dir=directory)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            path = directory / _name(key, suffix, temporary)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UnavailableError(
            f"the kernels could not be stored in {directory} ({error}); {_REMEDY}"
        ) from error
    return path


def _private_directory() -> Path:
    """Return the per-user cache, of mode 0700; refuse one that others own or can write to."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    parent = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    directory = parent / "visionmamba"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        if os.name == "posix":
            _require_private(directory)
    except OSError as error:
        raise UnavailableError(
            f"the cache {directory} cannot be used ({error}); {_REMEDY}"
        ) from error
    return directory


def _require_private(directory: Path) -> None:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise UnavailableError(f"the cache {directory} is not a plain directory; {_REMEDY}")
    if found.st_uid != os.getuid():
        raise UnavailableError(f"the cache {directory} belongs to another user; {_REMEDY}")
    if found.st_mode & 0o022:
        raise UnavailableError(
            f"the cache {directory} can be written by other users; delete it, or {_REMEDY}"
        )
    if stat.S_IMODE(found.st_mode) != 0o700:
        directory.chmod(0o700)


def _name(key: str, suffix: str, file: Path) -> str:
    return f"{key}-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}{suffix}"


def _remove_abandoned(directory: Path) -> None:
    """Delete what compilations that were killed left behind."""
    for path in directory.glob(".compiling-*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            path.unlink(missing_ok=True)
