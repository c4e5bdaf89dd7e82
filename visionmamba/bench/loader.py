"""How many images a second the loader prepares, beside what Vim-Ti eats in training.

Python's share of a loader is the augmentation; the rest is decoding and resizing JPEGs. Both need
cores of the host: where the loader gives less than the GPU takes, the GPU waits.
"""

import json
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from visionmamba.bench.cases import PATCH_SIDE_PX, Case
from visionmamba.bench.machine import Machine, choose_device, describe_machine

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from rich.table import Table

    from visionmamba.data import Augmentation, ImageSet, TrainBatches

Changes = Literal["published", "crop", "none"]

_EPOCH_IMAGES = 1 << 20  # so that no epoch ends, and no worker starts anew, while time is taken
_NUM_DRAWN = 32
_DRAWN_SIZE_PX = (375, 500)  # height and width of most pictures of ImageNet
_DRAWN_QUALITY = 90
_GPU_REPEATS, _GPU_WARMUP = 7, 2


@dataclass(frozen=True, kw_only=True)
class LoaderRow:
    """What some workers prepare."""

    num_workers: int
    """Processes beside the main one; 0 prepares in the main one."""
    images_per_second: float
    """Prepared, collated and handed to the main process."""


@dataclass(frozen=True, kw_only=True)
class LoaderResult:
    """The loader's pace over the number of workers."""

    source: str
    """Where the pictures came from."""
    image_size: int
    """Side of the tensors in pixels."""
    changes: Changes
    """Random changes of the pictures."""
    machine: Machine
    """Where it was measured."""
    rows: tuple[LoaderRow, ...]
    """One for each number of workers."""
    eaten_per_second: float | None
    """Images a second of forward and backward of Vim-Ti on the GPU; None without one."""

    def to_table(self) -> "Table":
        """Return the rows as a table for the terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        eats = (
            ""
            if self.eaten_per_second is None
            else f"; Vim-Ti takes {self.eaten_per_second:,.0f} images/s in training"
        )
        table = Table(
            box=SIMPLE_HEAD,
            pad_edge=False,
            title=f"{self.source}, {self.image_size} px, changes: {self.changes}",
            caption=f"{self.machine.accelerator or self.machine.processor}, "
            f"{self.machine.num_cores} cores, {self.machine.date}{eats}",
        )
        for heading in ("workers", "images/s", "a worker", "of what Vim-Ti takes"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            pace = row.images_per_second
            share = "" if self.eaten_per_second is None else f"{pace / self.eaten_per_second:.0%}"
            each = pace / max(row.num_workers, 1)
            table.add_row(str(row.num_workers), f"{pace:,.0f}", f"{each:,.0f}", share)
        return table

    def save(self, folder: Path) -> Path:
        """Write loader.json into a folder, made when missing, and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "loader.json"
        temporary = target.with_name("loader.json.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return temporary.replace(target)


@dataclass(frozen=True, kw_only=True)
class LoaderSpeed:
    """Measure the images a second of the training loader over the number of workers."""

    root: Path | None = None
    """Folder with train/CLASS/*.jpg and val/CLASS/*.jpg; without any source JPEGs of 500x375 px are
    drawn."""
    shards: tuple[str, ...] = ()
    """WebDataset shards instead: paths, * and {0000..0099} allowed."""
    hugging_face: str | None = None
    """Data set of the Hugging Face Hub instead, with the columns image and label."""
    workers: tuple[int, ...] = ()
    """Numbers of workers; by default 0, 1, 2, 4, ... up to the cores."""
    image_size: int = 224
    """Side of the tensors in pixels, a multiple of 16."""
    batch_size: int = 128
    """Images in a batch."""
    changes: Changes = "published"
    """published: crop, flip, RandAugment and erasing; crop: crop and flip; none: centred crop."""
    seconds: float = 5.0
    """Time of each measurement, without the start of the workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto measures Vim-Ti too when there is a GPU."""
    out: Path = Path("runs/bench")
    """Folder for loader.json."""

    def __post_init__(self) -> None:
        sources = [bool(self.root), bool(self.shards), bool(self.hugging_face)]
        if sum(sources) > 1:
            raise ValueError("give one of root, shards and hugging_face, not several")
        if self.image_size < PATCH_SIDE_PX or self.image_size % PATCH_SIDE_PX:
            raise ValueError(
                f"image_size must be a positive multiple of {PATCH_SIDE_PX}, got {self.image_size}"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.seconds <= 0:
            raise ValueError(f"seconds must be positive, got {self.seconds:g}")
        if any(number < 0 for number in self.workers):
            raise ValueError(f"workers must be at least 0, got {self.workers}")

    def run(self) -> LoaderResult:
        """Measure, print the table and write loader.json into `out`."""
        from rich.console import Console

        result = self.measure()
        console = Console()
        console.print(result.to_table())
        console.print(f"wrote {result.save(self.out)}", highlight=False)
        return result

    def measure(self) -> LoaderResult:
        """Measure and write nothing.

        Raises:
            FileNotFoundError, ValueError: the source is missing or wrong.
            UnreadableImageError: a picture cannot be opened.
        """
        device = choose_device(self.device)
        machine = describe_machine(device, command=self._command())
        eaten = self._eaten_per_second() if device == "cuda" else None
        with self._images() as (images, source):
            rows = tuple(
                LoaderRow(
                    num_workers=number,
                    images_per_second=_pace(self._batches(images, number), number, self.seconds),
                )
                for number in self.workers or _doubling(machine.num_cores)
            )
        return LoaderResult(
            source=source,
            image_size=self.image_size,
            changes=self.changes,
            machine=machine,
            rows=rows,
            eaten_per_second=eaten,
        )

    def _command(self) -> str:
        words = ["visionmamba", "bench", "loader"]
        for name in ("root", "shards", "hugging_face"):
            value = getattr(self, name)
            if value:
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--{name.replace('_', '-')}", *map(str, values)]
        if self.workers:
            words += ["--workers", *map(str, self.workers)]
        options = ("image_size", "batch_size", "changes", "seconds")
        words += [f"--{name.replace('_', '-')}={getattr(self, name)}" for name in options]
        return shlex.join(words)

    @contextmanager
    def _images(self) -> "Iterator[tuple[ImageSet, str]]":
        from visionmamba.data import HuggingFaceData, ImageFolder, WebShards

        if self.root is not None:
            yield ImageFolder(root=self.root).open("train"), str(self.root)
        elif self.shards:
            yield WebShards(train=self.shards, val=self.shards[:1]).build().train, self.shards[0]
        elif self.hugging_face is not None:
            data = HuggingFaceData(path=self.hugging_face, val_split="train")
            yield data.build().train, self.hugging_face
        else:
            with tempfile.TemporaryDirectory() as folder:
                _draw_pictures(Path(folder))
                yield ImageFolder(root=Path(folder)).open("train"), "drawn JPEGs of 500x375 px"

    def _batches(self, images: "ImageSet", num_workers: int) -> "TrainBatches":
        from visionmamba.data import Preprocessing, TrainBatches

        return TrainBatches(
            _Endless(images),
            Preprocessing(image_size=self.image_size).build(self._augmentation()),
            batch_size=self.batch_size,
            seed=0,
            num_workers=num_workers,
        )

    def _augmentation(self) -> "Augmentation":
        from visionmamba.data import Augmentation

        if self.changes == "none":
            return Augmentation()
        if self.changes == "crop":
            return Augmentation(min_crop_area=0.08, horizontal_flip=True)
        return Augmentation(
            min_crop_area=0.08,
            horizontal_flip=True,
            auto_augment="rand-m9-mstd0.5-inc1",
            erase_probability=0.25,
        )

    def _eaten_per_second(self) -> float:
        from visionmamba.bench.memory import free_gpu_memory
        from visionmamba.bench.passes import Pass, seconds_in_turns

        case = Case(
            model="vim",
            size="tiny",
            resolution=self.image_size,
            batch=self.batch_size,
            mode="train",
            device="cuda",
            precision="bfloat16",
        )
        loaded = Pass(case)
        loaded.prepare()
        spreads = seconds_in_turns(
            {"vim": loaded.run}, repeats=_GPU_REPEATS, warmup=_GPU_WARMUP, is_on_gpu=True
        )
        del loaded
        free_gpu_memory()
        return self.batch_size / spreads["vim"].median


class _Endless:
    """A set whose pictures come up again under higher numbers."""

    def __init__(self, images: "ImageSet") -> None:
        self._images = images
        self.labels = images.labels * -(-_EPOCH_IMAGES // len(images))
        self.class_names = images.class_names
        self.unreadable = images.unreadable
        self.on_unreadable = images.on_unreadable

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> "Image.Image":
        return self._images.image(index % len(self._images))

    def file(self, index: int) -> Path | None:
        return self._images.file(index % len(self._images))

    def order(self, generator: "torch.Generator") -> "torch.Tensor":
        import torch

        firsts = torch.arange(0, len(self), len(self._images))
        return (firsts[:, None] + self._images.order(generator)).flatten()


def _pace(batches: "TrainBatches", num_workers: int, seconds: float) -> float:
    """Return the images a second once every worker has given its first batch."""
    stream = iter(batches)
    for _ in range(num_workers + 1):
        next(stream)
    number = 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        number += len(next(stream).labels)
    return number / (time.perf_counter() - begin)


def _doubling(num_cores: int) -> tuple[int, ...]:
    numbers = [0, 1]
    while numbers[-1] * 2 < num_cores:
        numbers.append(numbers[-1] * 2)
    return tuple(dict.fromkeys((*numbers, num_cores)))


def _draw_pictures(folder: Path) -> None:
    """Write JPEGs whose detail, and so whose bytes, are about those of photographs."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    height, width = _DRAWN_SIZE_PX
    for number in range(_NUM_DRAWN):
        pixels = generator.normal(128, 8, (height, width, 3))
        for side, strength in ((6, 60), (40, 30), (160, 15)):
            noise = generator.normal(128, strength, (side, side, 3)).clip(0, 255).astype(np.uint8)
            layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            pixels += np.asarray(layer) - 128.0
        target = folder / "train" / str(number % 2) / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target, quality=_DRAWN_QUALITY)
