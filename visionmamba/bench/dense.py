"""DenseSpeed: what the measurements of segmenters and of detectors share, both modes in one run."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from visionmamba.bench.cases import TRAINING_ONLY, Mode, ModelName, Size
from visionmamba.bench.efficiency import Efficiency
from visionmamba.bench.machine import command_of
from visionmamba.bench.results import EfficiencyResult

if TYPE_CHECKING:
    from rich.console import Console

_PADDED_TO_PX = 32
_MODES: tuple[Mode, ...] = ("infer", "train")


@dataclass(frozen=True, kw_only=True)
class DenseSpeed:
    """Measure models with a head in inference and in training."""

    name: ClassVar[str]
    """What `visionmamba bench` calls it."""

    models: tuple[ModelName, ...] = ("vim", "deit")
    """What is measured; the others are compared with the first. Those that differ in training alone
    (vim-lean, deit-checkpoint) are left out of inference."""
    size: Size = "tiny"
    """tiny, small or base, as both papers name them."""
    num_classes: int = 1
    """Classes that are told apart."""
    resolutions: tuple[int, ...] = (512, 1024, 1536)
    """Sides of the square pictures in pixels, multiples of 32."""
    infer_batch: int = 4
    """Pictures in a pass of inference."""
    train_batch: int = 4
    """Pictures in a step of training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: weights and input in inference, autocast in training; auto takes it on a GPU."""
    threads: int | None = None
    """PyTorch's threads on the CPU; None leaves PyTorch's own choice."""
    repeats: int = 7
    """Timed turns of each model; the median counts."""
    warmup: int = 2
    """Turns before, not counted."""
    memory_limit_gb: float | None = None
    """On the CPU, count a case as out of memory when it grows by more; None asks the machine."""
    label: str = ""
    """Added to the names of the files, to keep several runs apart."""
    out: Path = Path("runs/bench")
    """Folder for the CSV, JSON, Markdown and PNG files."""

    def __post_init__(self) -> None:
        if any(side % _PADDED_TO_PX for side in self.resolutions):
            raise ValueError(
                f"resolutions must be multiples of {_PADDED_TO_PX}, which pictures are padded to; "
                f"got {self.resolutions}"
            )
        if all(model in TRAINING_ONLY for model in self.models):
            raise ValueError(
                f"models must name one that can be measured in inference; got {self.models}"
            )
        for mode in _MODES:
            self.half(mode)  # checks the rest before anything is measured

    @property
    def command(self) -> str:
        """The command that repeats this measurement."""
        return command_of(self, "bench", self.name)

    def half(self, mode: Mode) -> Efficiency:
        """Returns the measurement of one mode."""
        is_inference = mode == "infer"
        known = {field.name for field in fields(Efficiency)}
        options = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name in known
        }
        options["models"] = tuple(
            model for model in self.models if not (is_inference and model in TRAINING_ONLY)
        )
        batch = self.infer_batch if is_inference else self.train_batch
        return Efficiency(**options | self._head_options(), mode=mode, batch=(batch,))

    def _head_options(self) -> dict[str, Any]:
        """Returns the options of `Efficiency` that say which head is measured."""
        raise NotImplementedError

    def run(self) -> tuple[EfficiencyResult, EfficiencyResult]:
        """Measure both modes, print the tables and write the files of each into `out`.

        Returns:
            Inference and training.
        """
        from rich.console import Console

        from visionmamba.bench.tables import to_table

        console = Console()
        infer, train = (self._measure(mode, console) for mode in _MODES)
        for result in (infer, train):
            console.print(to_table(result))
            console.print(result.sentence())
        return infer, train

    def _measure(self, mode: Mode, console: "Console") -> EfficiencyResult:
        console.rule("inference" if mode == "infer" else "training")
        result = self.half(mode).measure(console)
        result = replace(result, machine=replace(result.machine, command=self.command))
        paths = result.save(self.out)
        console.print(f"wrote {len(paths)} files: {self.out}/{paths[0].stem}*", highlight=False)
        return result
