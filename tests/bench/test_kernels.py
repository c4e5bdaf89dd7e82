"""The table of the ops: every op in every pass, answers that agree, floors of a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from visionmamba.bench import gpu_kernels
from visionmamba.bench.ceilings import Ceilings
from visionmamba.bench.kernel_results import KernelsResult
from visionmamba.bench.kernels import Kernels
from visionmamba.bench.op_cases import Dtype, _mixer_scan_on_cpu, op_cases
from visionmamba.bench.passes import Spread
from visionmamba.models import BidirectionalMixer
from visionmamba.ops import backends, bidirectional_scan

FLOAT32_TOLERANCE = 1e-4  # sums over the state in another order
BFLOAT16_TOLERANCE = 1e-2  # inputs of a mixer's second half have 8 bits

H200 = Ceilings(num_multiprocessors=132, clock_ghz=1.98, bytes_per_second=4.28e12)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> KernelsResult:
    folder = tmp_path_factory.mktemp("kernels")
    return Kernels(quick=True, repeats=1, device="cpu", out=folder).run()


def test_times_every_op_compares_the_backends_and_leaves_the_choice(result: KernelsResult) -> None:
    on_cpu = {status.op for status in backends() if status.device == "cpu"}
    assert {row.op for row in result.timings} == on_cpu
    assert {row.direction for row in result.timings} == {"forward", "forward + backward"}
    assert all(row.milliseconds > 0 for row in result.timings)
    assert all((row.difference or 0) < FLOAT32_TOLERANCE for row in result.timings)
    assert Kernels(device="cpu").command == "visionmamba bench kernels --device cpu"


def test_writes_a_table_of_every_kind(result: KernelsResult, tmp_path: Path) -> None:
    assert [path.name for path in result.save(tmp_path)] == [
        "kernels_cpu.csv",
        "kernels_cpu.json",
        "kernels_cpu.md",
    ]
    header = "| op | shape | dtype | pass | backend | ms | GB/s | difference |"
    assert (tmp_path / "kernels_cpu.md").read_text().startswith(header)


def test_floors_are_shown_beside_the_times_of_a_gpu(result: KernelsResult) -> None:
    rows = tuple(
        replace(row, floor_milliseconds=row.milliseconds / 4, launch="graph")
        for row in result.timings
    )
    text = replace(result, ceilings=H200, timings=rows).to_markdown()
    assert "| floor, ms | share of floor |" in text
    assert " | 0.25 | " in text
    assert "132 multiprocessors x 16 exponentials a clock at 1.98 GHz" in text


def test_floor_is_that_of_the_exponentials_or_of_the_memory() -> None:
    elements = 2 * 8 * 6085 * 384
    scan = H200.floor_seconds(num_exponentials=elements * 18, num_bytes=0)
    assert scan == pytest.approx(161e-6, rel=0.01)  # docs/kernels.md
    assert H200.floor_seconds(num_exponentials=0, num_bytes=428 * 10**9) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", FLOAT32_TOLERANCE), ("bfloat16", BFLOAT16_TOLERANCE)]
)
def test_first_sample_is_that_of_the_batch(dtype: Dtype, tolerance: float) -> None:
    for case in op_cases(batch=3, length=20, device="cpu", dtype=dtype):
        case.train()
        whole = case.first_sample(case.forward("cpp")[0]).float()
        alone = case.first_sample_on_cpu()
        assert (whole - alone).norm() <= tolerance * alone.norm(), case.op


def test_scans_of_the_mixer_have_a_counterpart_on_the_cpu() -> None:
    mixer = BidirectionalMixer(192)
    rank, d_state = mixer.directions[0].dt_rank, mixer.directions[0].d_state
    u, projected = torch.randn(1, 30, 384), torch.randn(1, 30, rank + 2 * d_state)
    weights = [torch.nn.functional.pad(one.dt_weight, (0, 4)) for one in mixer.directions]
    A, D, bias = (
        torch.stack([getattr(one, name) for one in mixer.directions])
        for name in ("A", "D", "dt_bias")
    )
    both = torch.stack((projected, projected))
    y = _mixer_scan_on_cpu(
        *(rank, d_state, torch.stack((u, u)), torch.nn.functional.pad(both, (0, 4))),
        *(torch.stack(weights), bias, A, D),
    )
    expected = bidirectional_scan(
        (u, u),
        (projected, projected),
        tuple(one.dt_weight for one in mixer.directions),
        tuple(bias),
        tuple(A),
        tuple(D),
        z=None,
    )
    assert (y.sum(0) - expected).norm() < FLOAT32_TOLERANCE * expected.norm()


def test_gpu_times_are_those_of_one_set_of_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's measurement on the CPU's ops, with a clock that says 6 ms for every graph."""
    graphs: list[int] = []

    def on_cpu(*, batch: int, length: int, device: str, dtype: Dtype, seed: int):
        assert device == "cuda"
        return op_cases(batch=batch, length=length, device="cpu", dtype=dtype, seed=seed)

    def clock(passes, **_: object) -> dict[int, Spread]:
        passes[0]()
        graphs.append(1)
        return {0: Spread(median=6e-3, low=5e-3, high=7e-3)}

    monkeypatch.setattr(gpu_kernels, "_QUICK_SHAPES", ((3, 16),))
    monkeypatch.setattr(gpu_kernels, "_num_sets", lambda batch, length: 2)
    monkeypatch.setattr(gpu_kernels, "op_cases", on_cpu)
    monkeypatch.setattr(gpu_kernels, "measure_ceilings", lambda: H200)
    monkeypatch.setattr(gpu_kernels, "capture", lambda step: step)
    monkeypatch.setattr(gpu_kernels, "seconds_in_turns", clock)
    ceilings, rows = gpu_kernels.time_on_gpu(quick=True, repeats=1, say=lambda text: None)
    assert ceilings == H200
    assert len(rows) == len(graphs) == 18  # 5 ops, 2 dtypes, 2 passes, but 2 float32 gradients
    assert {row.milliseconds for row in rows} == {3.0}
    assert all((row.difference or 0) < BFLOAT16_TOLERANCE for row in rows)
    assert all(row.floor_milliseconds for row in rows)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        Kernels(repeats=0)


@pytest.mark.gpu
def test_gpu_rows_are_graphs_that_agree_with_the_cpu(tmp_path: Path) -> None:
    rows = Kernels(quick=True, repeats=1, device="cuda", out=tmp_path).run().timings
    assert {row.op for row in rows} >= {"fused_mixer", "both scans of the mixer", "rms_norm"}
    assert all(row.launch == "graph" for row in rows)
    assert all((row.difference or 0) < BFLOAT16_TOLERANCE for row in rows)
    assert all(row.floor_milliseconds for row in rows)
