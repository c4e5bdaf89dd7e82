"""The table of the ops: every op in every pass, and answers that agree with the PyTorch path."""

from pathlib import Path

import pytest

from visionmamba.bench.kernels import Kernels
from visionmamba.ops import backends

FLOAT32_TOLERANCE = 1e-4  # sums over the state in another order


def test_times_every_op_compares_the_backends_and_leaves_the_choice(tmp_path: Path) -> None:
    chosen = backends()
    result = Kernels(quick=True, repeats=1, device="cpu", out=tmp_path).run()
    assert backends() == chosen
    assert {row.op for row in result.timings} == {status.op for status in chosen}
    assert {row.direction for row in result.timings} == {"forward", "forward + backward"}
    assert all(row.milliseconds > 0 for row in result.timings)
    assert all((row.difference or 0) < FLOAT32_TOLERANCE for row in result.timings)
    assert (tmp_path / "kernels_cpu.csv").is_file()
    assert (tmp_path / "kernels_cpu.json").is_file()


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        Kernels(repeats=0)
