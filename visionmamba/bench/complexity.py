"""What the models compute and move: the paper's formulas beside counted operations and bytes.

Operations are multiply-adds. Matrix products are counted by torch's flop counter on tensors without
storage; of the ops that it does not know, the counts stand below. Bytes are those of the GPU's
inference in bfloat16, derived from what each kernel of a layer reads and writes.
"""

import csv
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionmamba.bench.cases import PATCH_SIDE_PX, Case, ModelName, Size, display_name
from visionmamba.bench.machine import Machine, command_of, describe_machine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from visionmamba.models.config import VimConfig

SCAN_MULTIPLY_ADDS = 4
"""Of a scan for each token, channel and state: dt A, exp(dt A) h + dt x B (a product and a
multiply-add), and C h; the exponential is counted by itself."""
_HALF, _SINGLE = 2, 4  # bytes of bfloat16 and float32
_FUSED_WIDTHS = (192, 384)
"""D and E whose x_proj and out_proj run in one kernel with what is before them (Hopper). So does
in_proj with the norm up to 16,384 tokens, which is not counted here."""


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Multiply-adds of one image at one resolution, in 10^9."""

    resolution: int
    """Side of the square input in pixels."""
    num_tokens: int
    """M: patches and the class token."""
    attention_formula: float
    """One self-attention by the paper, 4 M D^2 + 2 M^2 D."""
    attention_counted: float
    """One attention of DeiT: its projections and both products with the M x M matrix."""
    ssm_formula: float
    """One SSM by the paper, 3 M (2D) N + M (2D) N, one direction."""
    ssm_counted: float
    """Both scans of one mixer: `SCAN_MULTIPLY_ADDS` each and the projection of the step sizes."""
    deit_counted: float
    """The whole DeiT."""
    vim_counted: float
    """The whole Vim, which has twice as many layers of half the size."""
    vim_exponentials: float
    """Exponentials of the whole Vim: one a token, channel and state in each direction, and two each
    for softplus and SiLU."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One kernel of a layer and the device memory that it touches for a token, in bytes."""

    name: str
    """What it does."""
    reads: int
    """Bytes read."""
    writes: int
    """Bytes written."""


@dataclass(frozen=True, kw_only=True)
class ComplexityResult:
    """Operations over the resolution and bytes of a layer."""

    size: Size
    """tiny, small or base."""
    machine: Machine
    """Where it was counted."""
    operations: tuple[Operations, ...]
    """One for each resolution."""
    steps: tuple[Step, ...]
    """The kernels of a Vim layer in inference."""
    floor: tuple[Step, ...]
    """The layer in two kernels that keep everything else on the chip."""

    def tables(self) -> "tuple[Table, Table]":
        """Return the operations and the bytes as tables for the terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        built = []
        titles = ("Multiply-adds of one image, 10^9", "Bytes of a token in one layer of Vim")
        for title, rows in zip(titles, self._rows(), strict=True):
            table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title)
            for i, heading in enumerate(rows[0]):
                words = heading.replace(",", "").replace(" ", "\n")
                table.add_column(words, justify="right" if i else "left")
            for row in rows[1:]:
                table.add_row(*row)
            built.append(table)
        return built[0], built[1]

    def to_markdown(self) -> str:
        """Return both tables for a document, with the assumptions below."""
        texts = []
        for rows in self._rows():
            lines = ["| " + " | ".join(row) + " |" for row in rows]
            texts.append("\n".join((lines[0], "|---" * len(rows[0]) + "|", *lines[1:], "")))
        operations, layers = texts
        return "\n".join(
            (operations, _COUNTED, "", layers, _MOVED, "", self.machine.sentence(), "")
        )

    def sentence(self) -> str:
        """Say how the bytes of a layer compare with the floor."""
        ours, floor = (_total(steps) for steps in (self.steps, self.floor))
        return (
            f"A token moves {ours:,} bytes in a layer, {ours / floor:.1f}x the floor of {floor:,}."
        )

    def _rows(self) -> "tuple[list[Sequence[str]], list[Sequence[str]]]":
        names = [display_name(model, self.size) for model in ("vim", "deit")]
        operations: list[Sequence[str]] = [
            (
                "side, px",
                "tokens M",
                "attention, formula",
                "attention, counted",
                "SSM, formula",
                "scans, counted",
                f"{names[1]}, counted",
                f"{names[0]}, counted",
                f"{names[0]}, exp",
            )
        ]
        for row in self.operations:
            values = [_digits(getattr(row, field.name)) for field in fields(row)[2:]]
            operations.append((str(row.resolution), str(row.num_tokens), *values))
        steps: list[Sequence[str]] = [("kernel", "read", "written", "together")]
        for title, part in (("ours, sum", self.steps), ("floor, sum", self.floor)):
            for step in part:
                cells = (step.reads, step.writes, step.reads + step.writes)
                steps.append((step.name, *(f"{cell:,}" for cell in cells)))
            reads, writes = sum(s.reads for s in part), sum(s.writes for s in part)
            steps.append((title, f"{reads:,}", f"{writes:,}", f"{reads + writes:,}"))
        return operations, steps

    def save(self, folder: Path) -> list[Path]:
        """Write CSV (the operations), JSON and Markdown into a folder and return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"complexity_{self.size}"
        table, record = folder / f"{stem}.csv", folder / f"{stem}.json"
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Operations)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.operations)
        record.write_text(json.dumps(asdict(self), indent=2) + "\n")
        summary = folder / f"{stem}.md"
        summary.write_text(self.to_markdown(), encoding="utf-8")
        return [table, record, summary]


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """Count operations and bytes of Vim and DeiT and print them beside the paper's formulas."""

    size: Size = "tiny"
    """tiny, small or base, as both papers name them."""
    resolutions: tuple[int, ...] = (224, 512, 640, 736, 1024, 1248, 2048)
    """Sides of the square inputs in pixels, multiples of 16."""
    out: Path = Path("runs/bench")
    """Folder for the CSV, JSON and Markdown files."""

    def __post_init__(self) -> None:
        sides = self.resolutions
        if not sides or any(side < PATCH_SIDE_PX or side % PATCH_SIDE_PX for side in sides):
            raise ValueError(
                f"resolutions must be positive multiples of {PATCH_SIDE_PX}, the side of a patch; "
                f"got {sides}"
            )

    @property
    def command(self) -> str:
        """The command that repeats this count."""
        return command_of(self, "bench", "complexity")

    def run(self) -> ComplexityResult:
        """Count, print the tables and write the files into `out`."""
        from rich.console import Console

        console = Console()
        result = self.count()
        for table in result.tables():
            console.print(table)
        console.print(result.sentence())
        paths = result.save(self.out)
        console.print(f"wrote {len(paths)} files: {self.out}/{paths[0].stem}*", highlight=False)
        return result

    def count(self) -> ComplexityResult:
        """Count, and write nothing."""
        from visionmamba.models.config import VimConfig

        sizes = {"tiny": VimConfig.tiny, "small": VimConfig.small, "base": VimConfig.base}
        config = sizes[self.size]()
        return ComplexityResult(
            size=self.size,
            machine=describe_machine("cpu", command=self.command),
            operations=tuple(self._operations(side, config) for side in self.resolutions),
            steps=layer_steps(config),
            floor=floor_steps(config),
        )

    def _operations(self, side: int, config: "VimConfig") -> Operations:
        tokens = (side // PATCH_SIDE_PX) ** 2 + 1
        d_model, d_state = config.d_model, config.d_state
        d_inner, rank = config.d_inner, config.resolved_dt_rank
        deit, vim = (self._count(model, side) for model in ("deit", "vim"))
        per_channel = 2 * (d_state + 2 + 2) + 2  # both scans, softplus and SiLU; the gate's SiLU
        counts = {
            "attention_formula": 4 * tokens * d_model**2 + 2 * tokens**2 * d_model,
            "attention_counted": deit["blocks.0.attn"],
            "ssm_formula": 4 * tokens * 2 * d_model * d_state,
            "ssm_counted": 2 * tokens * d_inner * (SCAN_MULTIPLY_ADDS * d_state + rank),
            "deit_counted": deit["Global"],
            "vim_counted": vim["Global"],
            "vim_exponentials": config.depth * tokens * d_inner * per_channel,
        }
        assert vim["blocks.0.mixer"] > counts["ssm_counted"]
        billions = {name: value / 1e9 for name, value in counts.items()}
        return Operations(resolution=side, num_tokens=tokens, **billions)

    def _count(self, model: ModelName, side: int) -> dict[str, float]:
        """Return the multiply-adds of a model and its modules, by name, for one image."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        case = Case(
            model=model,
            size=self.size,
            resolution=side,
            batch=1,
            mode="infer",
            device="meta",
            precision="float32",
        )
        network = case.build_model()
        images = torch.empty(1, 3, side, side, device="meta")
        ops = torch.ops.visionmamba
        known = {
            ops.bidirectional_scan: _scan_flops,
            ops.bidirectional_conv1d: _convolution_flops,
        }
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=known) as counter:
            network(images)
        return {
            name.removeprefix(f"{type(network).__name__}."): sum(by_op.values()) / 2
            for name, by_op in counter.get_flop_counts().items()
        }


def layer_steps(config: "VimConfig") -> tuple[Step, ...]:
    """Return the kernels of a Vim layer as ops/cuda/mixer.py launches them for many tokens."""
    d_model, d_inner, projected = _widths(config)
    hidden, inner = _HALF * d_model, _HALF * d_inner  # a row of D or E values in bfloat16
    stream, both, small = _SINGLE * d_model, 2 * inner, 2 * _HALF * projected
    convolve: tuple[Step, ...] = (
        Step(name="both convolutions, SiLU", reads=inner, writes=both),
        Step(name="both x_proj", reads=both, writes=small),
    )
    gate: tuple[Step, ...] = (
        Step(name="sum, gate", reads=both + inner, writes=inner),
        Step(name="out_proj", reads=inner, writes=hidden),
    )
    if (d_model, d_inner) == _FUSED_WIDTHS:
        convolve = (Step(name="both convolutions, SiLU, x_proj", reads=inner, writes=both + small),)
        gate = (Step(name="sum, gate, out_proj", reads=both + inner, writes=hidden),)
    return (
        Step(name="add, RMSNorm", reads=hidden + stream, writes=stream + hidden),
        Step(name="in_proj", reads=hidden, writes=both),
        *convolve,
        Step(name="both scans, dt_proj, softplus", reads=both + small, writes=both),
        *gate,
    )


def floor_steps(config: "VimConfig") -> tuple[Step, ...]:
    """Return a layer that moves only what one kernel cannot keep for the other.

    Both scans need the whole sequence of x and z before the first token is finished, so a layer is
    two kernels at least: residual stream and branch pass through the first, x and z lie between.
    """
    d_model, d_inner, _ = _widths(config)
    hidden, stream, both = _HALF * d_model, _SINGLE * d_model, 2 * _HALF * d_inner
    return (
        Step(name="add, RMSNorm, in_proj", reads=hidden + stream, writes=stream + both),
        Step(name="convolutions, scans, gate, out_proj", reads=both, writes=hidden),
    )


def _widths(config: "VimConfig") -> tuple[int, int, int]:
    from visionmamba.ops.cuda.pack import MixerSizes

    sizes = MixerSizes(
        d_model=config.d_model,
        d_inner=config.d_inner,
        d_state=config.d_state,
        d_conv=config.d_conv,
        dt_rank=config.resolved_dt_rank,
    )
    return sizes.d_model, sizes.d_inner, sizes.projected_width


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _total(steps: tuple[Step, ...]) -> int:
    return sum(step.reads + step.writes for step in steps)


def _scan_flops(x: Any, _: Any, projected: Any, *rest: Any, **shapes: Any) -> int:
    """Count both scans and the projections of their step sizes, from the shapes of the inputs."""
    batch, length, d_inner = x
    rank = rest[1][1]  # dt_weight (E, R)
    d_state = (projected[2] - rank) // 2
    per_channel: int = SCAN_MULTIPLY_ADDS * d_state + rank
    return int(2 * 2 * batch * length * d_inner * per_channel)


def _convolution_flops(x: Any, weight: Any, *_: Any, **shapes: Any) -> int:
    """Count both convolutions, from the shapes of the inputs."""
    batch, length, d_inner = x
    return int(2 * 2 * batch * length * d_inner * weight[1])


_COUNTED = (
    "Formulas: self-attention 4 M D² + 2 M² D, SSM 3 M (2D) N + M (2D) N (paper), one of each. "
    "Counted: matrix products by torch.utils.flop_counter, two floating-point operations being one "
    f"multiply-add; a scan {SCAN_MULTIPLY_ADDS} a token, channel and state; a convolution one a "
    "tap; norms, activations and sums left out."
)
_MOVED = (
    "Inference in bfloat16 with a float32 residual stream; every tensor counted as read and "
    "written once by each kernel that takes it, as if no cache held it; weights left out. The "
    "floor is two kernels a layer with everything else kept on the chip."
)
