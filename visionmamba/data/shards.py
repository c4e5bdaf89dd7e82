"""WebDataset shards: tar files of pictures and labels, read in place through an index.

Nothing is unpacked, so no name in an archive ever becomes a path. The index makes a picture
addressable by its number, so that order, ranks, workers and resumption are those of any other set.
"""

import glob
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from visionmamba.data.image_files import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    UnreadableImageError,
    decode_image,
)
from visionmamba.data.sets import ImageSplits, LabelledImages, OnUnreadable, check_classes

_MAX_IMAGE_BYTES = 1 << 28
_MAX_LABEL_BYTES = 1 << 20
_MAX_CLASSES = 1_000_000
_LABEL_SUFFIXES = (".cls", ".json")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, kw_only=True)
class WebShards:
    """Tar files with members KEY.jpg (or png, webp, ...) and KEY.cls or KEY.json.

    A .cls file holds the number of the class, a .json file has it under "label" or "cls"; of both
    the .cls counts. The tar files must be local and uncompressed. Their headers are read once at
    the start; a picture's bytes when it is wanted.
    """

    train: tuple[str, ...] = ()
    """Files to learn from: paths, "*" and "?" allowed, and ranges as train-{0000..1023}.tar."""
    val: tuple[str, ...] = ()
    """Files to judge on, given likewise."""
    class_names: Path | None = None
    """Text file with a class name a line, in the order of the numbers; by default the numbers."""
    shuffle_shards: int | None = None
    """Pictures are shuffled among this many randomly chosen shards at a time, which makes the disk
    read shard after shard; None shuffles among all."""
    on_unreadable: OnUnreadable = "fail"
    """"fail" stops at the first bad member and names it; "skip" goes on without it and lists it."""
    max_pixels: int = MAX_PIXELS
    """Largest picture, width times height; a larger one counts as unreadable."""

    def __post_init__(self) -> None:
        if self.shuffle_shards is not None and self.shuffle_shards < 1:
            raise ValueError(
                f"shuffle_shards must be at least 1 or None, got {self.shuffle_shards}"
            )

    def build(self) -> ImageSplits:
        """Returns the pictures of both splits.

        Raises:
            FileNotFoundError: a shard or the file of class names is missing.
            ValueError: a shard is no plain tar file or holds no samples; with "fail" also a sample
                without picture or label; there are fewer than two classes, or more than names.
        """
        train, val = self._index(self.train, "train"), self._index(self.val, "val")
        largest = int(max(train.labels.max(), val.labels.max()))
        names = self._names(largest + 1)
        if largest >= len(names):
            raise ValueError(
                f"{self.class_names} names {len(names)} classes, but the shards hold a sample of "
                f"class {largest}, counted from 0; add the missing names"
            )
        check_classes(self.train[0], names, names)
        return ImageSplits(self._images(train, names), self._images(val, names))

    def _images(self, index: "_Index", names: tuple[str, ...]) -> "ShardImages":
        return ShardImages(
            index=index,
            labels=tuple(index.labels.tolist()),
            class_names=names,
            unreadable=index.unreadable,
            shuffle_shards=self.shuffle_shards,
            on_unreadable=self.on_unreadable,
            max_pixels=self.max_pixels,
        )

    def _index(self, patterns: tuple[str, ...], split: str) -> "_Index":
        if not patterns:
            raise ValueError(
                f"no shards are given to {split}; name them, as --data.{split} {split}-*.tar"
            )
        return _read_index(_shard_files(patterns), on_unreadable=self.on_unreadable)

    def _names(self, num_classes: int) -> tuple[str, ...]:
        if self.class_names is None:
            return tuple(map(str, range(num_classes)))
        if not self.class_names.is_file():
            raise FileNotFoundError(
                f"there is no file {self.class_names}; wanted one class name a line"
            )
        lines = self.class_names.read_text(encoding="utf-8").splitlines()
        return tuple(line.strip() for line in lines if line.strip())


@dataclass(frozen=True, kw_only=True)
class ShardImages(LabelledImages):
    """Pictures inside of tar files."""

    index: "_Index"
    """Where they are."""
    shuffle_shards: int | None = None
    max_pixels: int = MAX_PIXELS

    def image(self, index: int) -> Image.Image:
        """Reads picture `index`; `UnreadableImageError` names shard and member of a bad one."""
        shard = self.index.shards[self.index.shard_of[index]]
        header, start, size = self.index.places[index].tolist()
        try:
            with open(shard, "rb") as file:
                file.seek(start)
                content = file.read(size)
        except OSError as error:
            raise UnreadableImageError(f"{shard} cannot be read: {error.strerror}") from error
        try:
            if len(content) < size:
                raise UnreadableImageError("the picture is cut short; copy the shard again")
            return decode_image(content, "the picture", max_pixels=self.max_pixels)
        except UnreadableImageError as error:
            name = _member_name(shard, header)
            raise UnreadableImageError(f"{shard}, {name}: {error}") from error

    def order(self, generator: torch.Generator) -> Tensor:
        """Returns (num_images,) int64: a random order, shard group after shard group if asked."""
        if self.shuffle_shards is None:
            return super().order(generator)
        shard_of = torch.from_numpy(self.index.shard_of)
        shards = torch.randperm(len(self.index.shards), generator=generator)
        order: list[Tensor] = []
        for start in range(0, len(shards), self.shuffle_shards):
            group = shards[start : start + self.shuffle_shards]
            inside = torch.isin(shard_of, group).nonzero().flatten()
            order.append(inside[torch.randperm(len(inside), generator=generator)])
        return torch.cat(order)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Index:
    """Where the samples of some shards are."""

    shards: tuple[Path, ...]
    shard_of: NDArray[np.int64]
    """(num_images,) numbers of shards."""
    places: NDArray[np.int64]
    """(num_images, 3): first byte of the header, first byte of the picture, number of its bytes."""
    labels: NDArray[np.int64]
    """(num_images,)."""
    unreadable: tuple[str, ...]


def _shard_files(patterns: tuple[str, ...]) -> tuple[Path, ...]:
    files: list[Path] = []
    for pattern in patterns:
        for name in _expand(pattern):
            found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
            if not found or not all(Path(path).is_file() for path in found):
                raise FileNotFoundError(f"there is no shard {name}; check the path or the pattern")
            files += map(Path, found)
    return tuple(files)


def _expand(pattern: str) -> Iterator[str]:
    """Yields a pattern with each {first..last} replaced by its numbers, as wide as the first."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    first, last = braces.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expand(
            f"{pattern[: braces.start()]}{number:0{len(first)}}{pattern[braces.end() :]}"
        )


def _read_index(shards: tuple[Path, ...], *, on_unreadable: OnUnreadable) -> _Index:
    shard_of: list[int] = []
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    unreadable: list[str] = []
    for number, shard in enumerate(shards):
        before = len(labels)
        for sample in _samples_in(shard):
            if isinstance(sample, str):
                if on_unreadable == "fail":
                    raise ValueError(f'{sample}, or leave it out with on_unreadable="skip"')
                unreadable.append(sample)
                continue
            label, *place = sample
            labels.append(label)
            places.append((place[0], place[1], place[2]))
        shard_of += [number] * (len(labels) - before)
    if not labels:
        first = f"; the first problem: {unreadable[0]}" if unreadable else ""
        raise ValueError(
            f"{shards[0]}{' and the other shards hold' if shards[1:] else ' holds'} no samples; "
            f"wanted members KEY.jpg and KEY.cls{first}"
        )
    return _Index(
        shards=shards,
        shard_of=np.array(shard_of, dtype=np.int64),
        places=np.array(places, dtype=np.int64),
        labels=np.array(labels, dtype=np.int64),
        unreadable=tuple(unreadable),
    )


@dataclass
class _Members:
    """The members of one sample as far as they are of use."""

    key: str
    image: tarfile.TarInfo | None = None
    cls: tarfile.TarInfo | None = None
    json: tarfile.TarInfo | None = None


def _samples_in(shard: Path) -> Iterator[tuple[int, int, int, int] | str]:
    """Yields label, header, start and size of each sample's picture, or what is wrong with it."""
    try:
        with tarfile.open(shard, "r:") as archive:
            sample = _Members("")
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # a million would be kept
                if archive.offset <= member.offset:
                    raise tarfile.ReadError("a member of negative size")
                problem = _problem(member)
                if problem:
                    yield f"{shard} holds {_printable(member.name)}, {problem}"
                    continue
                key, suffix = _split_name(member.name)
                if suffix not in (*IMAGE_SUFFIXES, *_LABEL_SUFFIXES) or not member.isreg():
                    continue
                if key != sample.key:
                    yield from _finished(archive, shard, sample)
                    sample = _Members(key)
                if suffix == ".cls":
                    sample.cls = member
                elif suffix == ".json":
                    sample.json = member
                else:
                    sample.image = member
            yield from _finished(archive, shard, sample)
    except (tarfile.TarError, ValueError) as error:
        yield (
            f"{shard} is damaged, cut short, or no uncompressed tar file ({error}); copy it again "
            "or decompress it"
        )


def _finished(
    archive: tarfile.TarFile, shard: Path, sample: _Members
) -> Iterator[tuple[int, int, int, int] | str]:
    if not sample.key:
        return
    name = f"{shard} holds the sample {_printable(sample.key)}"
    labelled = sample.cls or sample.json
    if sample.image is None or labelled is None:
        lacks = "picture" if sample.image is None else "label (.cls or .json)"
        yield f"{name} without a {lacks}; add it"
        return
    content = archive.extractfile(labelled)
    label = _label(content.read() if content else b"", is_json=sample.cls is None)
    if label is None:
        wanted = f"a class number from 0 to {_MAX_CLASSES - 1}"
        yield f"{name} whose label is not {wanted}; correct {_printable(labelled.name)}"
        return
    yield label, sample.image.offset, sample.image.offset_data, sample.image.size


def _problem(member: tarfile.TarInfo) -> str:
    """Returns why a member is refused, empty for a good one."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        return "whose name leaves the archive; rename it"
    if member.issym() or member.islnk():
        return "which is a link; store the file itself"
    if member.issparse():
        return "which is stored as a sparse file; store it whole"
    limit = _MAX_LABEL_BYTES if path.suffix.lower() in _LABEL_SUFFIXES else _MAX_IMAGE_BYTES
    if member.isreg() and member.size > limit:
        return f"of {member.size} bytes, more than the limit of {limit}; remove it"
    return ""


def _split_name(name: str) -> tuple[str, str]:
    """Returns key and suffix as WebDataset defines them: the suffix starts at the first dot."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()


def _label(content: bytes, *, is_json: bool) -> int | None:
    try:
        found = _json_label(json.loads(content)) if is_json else int(content.decode("ascii"))
    except (ValueError, RecursionError):
        return None
    return found if found is not None and 0 <= found < _MAX_CLASSES else None


def _json_label(values: object) -> int | None:
    found = values.get("label", values.get("cls")) if isinstance(values, dict) else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _member_name(shard: Path, header: int) -> str:
    """Returns the name of the member whose header begins at a byte; names are kept nowhere else."""
    with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        file.seek(header)
        archive.offset = header
        return _printable(tarfile.TarInfo.fromtarfile(archive).name)


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)
