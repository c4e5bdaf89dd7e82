"""Operations and bytes: the paper's formulas, closed forms, and a count known from elsewhere."""

from pathlib import Path

import pytest

from visionmamba.bench.complexity import Complexity, floor_steps, layer_steps
from visionmamba.models import VimConfig

D, E, N, R, DEPTH = 192, 384, 16, 12, 24  # Vim-Ti
VIM_LINEAR_AND_CONVOLUTION = 1.293  # 10^9 multiply-adds at 224 px, worked out from the shapes


def moved(steps) -> int:
    return sum(step.reads + step.writes for step in steps)


def test_attention_counts_what_the_formula_says() -> None:
    (row,) = Complexity(resolutions=(512,)).count().operations
    tokens = 32 * 32 + 1
    assert row.num_tokens == tokens
    assert row.attention_formula == pytest.approx((4 * tokens * D**2 + 2 * tokens**2 * D) / 1e9)
    assert row.attention_counted == pytest.approx(row.attention_formula)


def test_both_scans_count_twice_the_formula_and_the_step_sizes() -> None:
    (row,) = Complexity(resolutions=(224,)).count().operations
    assert row.ssm_formula == pytest.approx(4 * 197 * 2 * D * N / 1e9)
    assert row.ssm_counted == pytest.approx(2 * row.ssm_formula + 2 * 197 * E * R / 1e9)


def test_whole_vim_counts_its_products_convolutions_and_scans() -> None:
    (row,) = Complexity(resolutions=(224,)).count().operations
    scans = DEPTH * 2 * row.ssm_formula
    assert row.vim_counted == pytest.approx(VIM_LINEAR_AND_CONVOLUTION + scans, rel=1e-3)


def test_attention_grows_with_the_square_and_vim_in_proportion() -> None:
    small, large = Complexity(resolutions=(512, 2048)).count().operations
    tokens = large.num_tokens / small.num_tokens
    assert large.vim_counted / small.vim_counted == pytest.approx(tokens, rel=1e-2)
    assert large.attention_counted / small.attention_counted > 10 * tokens


def test_layer_moves_more_than_its_floor() -> None:
    config = VimConfig.tiny()
    floor = 2 * D * 4 + 2 * D * 2 + 2 * (2 * E) * 2  # residual, branch, x and z: each out and in
    assert moved(floor_steps(config)) == floor == 5376
    assert floor < moved(layer_steps(config)) < 3 * floor


def test_what_a_kernel_writes_the_next_one_reads() -> None:
    norm, in_proj, convolutions, scans, gate = layer_steps(VimConfig.tiny())
    assert norm.reads == gate.writes + 4 * D  # the rest is the residual stream
    assert in_proj.reads == norm.writes - 4 * D
    assert convolutions.reads == in_proj.writes / 2  # x; z goes to the gate
    assert scans.reads == convolutions.writes
    assert gate.reads == scans.writes + 2 * E


def test_layers_whose_projections_are_not_fused_move_the_tensors_between() -> None:
    tiny, small = (layer_steps(config) for config in (VimConfig.tiny(), VimConfig.small()))
    assert len(small) == len(tiny) + 2
    assert moved(small) > 2 * moved(tiny)


def test_tables_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Complexity(resolutions=(224, 2048), out=tmp_path).run()
    assert "a layer" in capsys.readouterr().out
    text = (tmp_path / "complexity_tiny.md").read_text()
    assert "| 224 | 197 | 0.044 | 0.044 | 0.00484 |" in text
    assert "4 M D² + 2 M² D" in text
    assert len((tmp_path / "complexity_tiny.csv").read_text().splitlines()) == 3
    assert (tmp_path / "complexity_tiny.json").is_file()


def test_wrong_resolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        Complexity(resolutions=(100,))
