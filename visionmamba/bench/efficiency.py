"""Vim beside DeiT over the resolution: time, peak memory and error, on a CPU or a GPU.

All models are measured in one run and take turns, so that a busy moment hits all of them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from visionmamba.bench.cases import (
    PATCH_SIDE_PX,
    TRAINING_ONLY,
    Case,
    DetectorHead,
    Mode,
    ModelName,
    OutOfMemory,
    Precision,
    SegmenterHead,
    Size,
    check_available,
    is_vim,
    telling_out_of_memory,
)
from visionmamba.bench.compile_ahead import compile_ahead
from visionmamba.bench.machine import choose_device, command_of, describe_machine
from visionmamba.bench.memory import free_gpu_memory, peak_bytes_on_cpu, prepare_on_gpu
from visionmamba.bench.passes import (
    Outputs,
    Pass,
    Spread,
    reference_output,
    relative_error,
    seconds_in_turns,
)
from visionmamba.bench.results import EfficiencyResult, Measurement

if TYPE_CHECKING:
    from rich.console import Console

_TOGETHER_SHARE = 0.4
"""Share of a GPU's memory that waiting models may hold while another one is prepared."""


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Measure models over the resolution: time, peak memory, error, ratios, a table and plots."""

    models: tuple[ModelName, ...] = ("vim", "deit")
    """What is measured; the others are compared with the first. deit has fused attention,
    deit-eager the paper's; -lean and -checkpoint keep the input of each block alone in training;
    vim-mamba-ssm runs the published kernels where they are installed."""
    size: Size = "tiny"
    """tiny, small or base, as both papers name them."""
    resolutions: tuple[int, ...] = (224, 384, 512, 768, 1024, 1248)
    """Sides of the square inputs in pixels, multiples of 16."""
    batch: tuple[int, ...] = (1,)
    """Images in one pass: one number for all, or one for each resolution."""
    mode: Mode = "infer"
    """infer: forward without gradients; train: forward, cross-entropy and backward."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: weights and input in inference, autocast in training; auto takes it on a GPU."""
    pyramid: bool = False
    """Measure backbone and feature pyramid without classifier, as the paper's figures 3 and 4."""
    segmenter: SegmenterHead | None = None
    """Measure segmenters with this head; `bench segmentation` does, in both modes."""
    detector: DetectorHead | None = None
    """Measure detectors with these heads; `bench detection` does, in both modes."""
    num_classes: int = 1000
    """Outputs of the classifier, or of every pixel, or classes of the objects."""
    cuda_graphs: bool = True
    """On a GPU replay every pass of every model from a CUDA graph, where it can be captured."""
    threads: int | None = None
    """PyTorch's threads on the CPU; None leaves PyTorch's own choice."""
    repeats: int = 7
    """Timed turns of each model; the median counts."""
    warmup: int = 2
    """Turns before, not counted."""
    image: Path | None = None
    """A picture resized to every resolution; None takes noise."""
    memory_limit_gb: float | None = None
    """On the CPU, count a case as out of memory when it grows by more; None asks the machine."""
    label: str = ""
    """Added to the names of the files, to keep several runs apart."""
    out: Path = Path("runs/bench")
    """Folder for the CSV, JSON, Markdown and PNG files."""

    def __post_init__(self) -> None:
        self._check_models()
        sides = self.resolutions
        if not sides or any(side < PATCH_SIDE_PX or side % PATCH_SIDE_PX for side in sides):
            raise ValueError(
                f"resolutions must be positive multiples of {PATCH_SIDE_PX}, the side of a patch; "
                f"got {sides}"
            )
        if len(self.batch) not in (1, len(sides)) or min(self.batch) < 1:
            raise ValueError(
                f"batch must be one positive number, or one for each of the {len(sides)} "
                f"resolutions; got {self.batch}"
            )
        if len(set(self.points)) < len(self.points) or (
            len(self.batch) == 1 and list(sides) != sorted(sides)
        ):
            raise ValueError(
                f"resolutions must ascend without repetition, or differ in batch; got {sides}"
            )
        for name in ("repeats", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1; got {self.threads}")
        if self.image is not None and not self.image.is_file():
            raise FileNotFoundError(
                f"there is no picture {self.image}; leave --image out for noise"
            )

    def _check_models(self) -> None:
        if not self.models or len(set(self.models)) < len(self.models):
            raise ValueError(f"models must be named once each, at least one; got {self.models}")
        for model in self.models:
            check_available(model)
            if model in TRAINING_ONLY and self.mode == "infer":
                raise ValueError(
                    f"{model} differs from {model.partition('-')[0]} in training only; add "
                    "--mode train or leave it out"
                )
            if model == "deit-window" and self.detector is None:
                raise ValueError("deit-window is for detectors; leave it out, or add --detector")
            if model == "deit-compile" and self.detector is not None:
                raise ValueError("detectors are not compiled; leave out deit-compile")
        if self.pyramid and self.mode == "train":
            raise ValueError("pyramid has no loss to train with; leave out --mode train")
        heads = (self.pyramid, self.segmenter is not None, self.detector is not None)
        if sum(heads) > 1:
            raise ValueError("pyramid, segmenter and detector exclude each other; give one")
        if self.detector is not None and self.cuda_graphs:
            raise ValueError(
                "the passes of a detector cannot be recorded, as they hang on the boxes found; "
                "add --no-cuda-graphs"
            )
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1; got {self.num_classes}")

    @property
    def what(self) -> Literal["classifiers", "segmenters", "detectors"]:
        """What is measured, by what the models put out."""
        if self.detector is not None:
            return "detectors"
        return "classifiers" if self.segmenter is None else "segmenters"

    @property
    def points(self) -> tuple[tuple[int, int], ...]:
        """Resolution and batch of every row, in the order measured."""
        batches = self.batch if len(self.batch) > 1 else self.batch * len(self.resolutions)
        return tuple(zip(self.resolutions, batches, strict=True))

    @property
    def command(self) -> str:
        """The command that repeats this measurement."""
        return command_of(self, "bench", "efficiency")

    def precision_on(self, device: str) -> Precision:
        """What `precision` means on a device."""
        if self.precision == "auto":
            return "bfloat16" if device.startswith("cuda") else "float32"
        return self.precision

    def run(self) -> EfficiencyResult:
        """Measure, print the table and write the files into `out`."""
        from rich.console import Console

        from visionmamba.bench.tables import to_table

        console = Console()
        result = self.measure(console)
        console.print(to_table(result))
        console.print(result.sentence())
        paths = result.save(self.out)
        console.print(f"wrote {len(paths)} files: {self.out}/{paths[0].stem}*", highlight=False)
        return result

    def measure(self, console: "Console") -> EfficiencyResult:
        """Measure with a progress bar on the console, and write nothing.

        Raises:
            ValueError: device "cuda" without a CUDA device.
        """
        import torch
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        device = choose_device(self.device)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        machine = describe_machine(device, command=self.command)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        measurements: list[Measurement] = []
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("compiling", total=len(self.points))
            if device == "cuda" and "deit-compile" in self.models and len(self.points) > 1:
                compile_ahead(
                    [self._case("deit-compile", side, batch, device) for side, batch in self.points]
                )
            for side, batch in self.points:
                progress.update(task, description=f"measuring {batch} x {side} px")
                rows = self._measure_point(side, batch, device)
                console.print(f"{batch} x {side} px: {_summary(rows)}", highlight=False)
                measurements += rows
                progress.advance(task)
        return EfficiencyResult(settings=self, machine=machine, measurements=tuple(measurements))

    def _case(self, model: ModelName, side: int, batch: int, device: str) -> Case:
        return Case(
            model=model,
            size=self.size,
            resolution=side,
            batch=batch,
            mode=self.mode,
            device=device,
            precision=self.precision_on(device),
            pyramid=self.pyramid,
            segmenter=self.segmenter,
            detector=self.detector,
            num_classes=self.num_classes,
            cuda_graphs=self.cuda_graphs,
            image=self.image,
        )

    def _measure_point(self, side: int, batch: int, device: str) -> list[Measurement]:
        cases = [self._case(model, side, batch, device) for model in self.models]
        found: dict[ModelName, Measurement] = {}
        waiting: list[_Ready] = []
        references: dict[bool, Outputs] = {}
        for case in cases:
            if waiting and case.is_on_gpu and _is_crowded():
                found |= self._time(waiting)
                waiting = []
            fits = self._prepare(case, references, waiting)
            if not fits and waiting and case.is_on_gpu:  # alone it may fit
                found |= self._time(waiting)
                waiting = []
                self._prepare(case, references, waiting)
        found |= self._time(waiting)
        return [found.get(case.model) or _row(case) for case in cases]

    def _prepare(
        self, case: Case, references: "dict[bool, Outputs]", waiting: "list[_Ready]"
    ) -> bool:
        """Load a case, measure its memory and error and let it wait; False when memory ran out.

        Args:
            case: what is prepared.
            references: float32 outputs of Vim (True) and DeiT (False), made when missing.
            waiting: what it joins.
        """
        import torch

        # the objects that untrained detectors find in bfloat16 are not those of float32
        has_reference = case.precision != "float32" and case.detector is None
        try:
            with telling_out_of_memory():
                if has_reference and is_vim(case.model) not in references:
                    references[is_vim(case.model)] = reference_output(case)
            peak_bytes: int | None
            if case.is_on_gpu:
                loaded, peak_bytes = prepare_on_gpu(case)
            else:
                peak_bytes = peak_bytes_on_cpu(
                    case, threads=torch.get_num_threads(), limit_gb=self.memory_limit_gb
                )
                with telling_out_of_memory():
                    loaded = Pass(case)
            error = None
            if has_reference:
                with telling_out_of_memory():
                    error = relative_error(loaded.run(), references[is_vim(case.model)])
        except OutOfMemory:
            return False
        waiting.append(_Ready(loaded=loaded, peak_bytes=peak_bytes, error=error))
        return True

    def _time(self, waiting: "list[_Ready]") -> dict[ModelName, Measurement]:
        """Time passes in turns and let go of them."""
        spreads = seconds_in_turns(
            {ready.loaded.case.model: ready.loaded.run for ready in waiting},
            repeats=self.repeats,
            warmup=self.warmup,
            is_on_gpu=any(ready.loaded.case.is_on_gpu for ready in waiting),
        )
        rows = {}
        for ready in waiting:
            case = ready.loaded.case
            rows[case.model] = _row(case, ready, spreads.get(case.model))
        return rows


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A pass that waits for its turns."""

    loaded: Pass
    peak_bytes: int | None
    error: float | None


def _summary(rows: list[Measurement]) -> str:
    return ", ".join(
        f"{row.model} {row.status if row.milliseconds is None else f'{row.milliseconds:.2f} ms'}"
        for row in rows
    )


def _is_crowded() -> bool:
    import torch

    free_gpu_memory()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return torch.cuda.memory_reserved() > _TOGETHER_SHARE * total


def _row(case: Case, ready: _Ready | None = None, spread: Spread | None = None) -> Measurement:
    """Return a case's row; without a spread it ran out of memory."""
    is_ok = ready is not None and spread is not None
    return Measurement(
        model=case.model,
        resolution=case.resolution,
        batch=case.batch,
        num_tokens=case.num_tokens,
        status="ok" if is_ok else "out of memory",
        launch=ready.loaded.launch if ready and is_ok else None,
        milliseconds=spread.median * 1e3 if spread else None,
        milliseconds_low=spread.low * 1e3 if spread else None,
        milliseconds_high=spread.high * 1e3 if spread else None,
        images_per_second=case.batch / spread.median if spread else None,
        peak_memory_gb=ready.peak_bytes / 1e9 if ready and ready.peak_bytes and is_ok else None,
        relative_error=ready.error if ready and is_ok else None,
    )
