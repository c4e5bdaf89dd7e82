"""Measuring models beside each other: options, memory, error, files, rows out of memory."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from visionmamba.bench import efficiency
from visionmamba.bench.cases import (
    TRAINING_ONLY,
    Case,
    ModelName,
    OutOfMemory,
    telling_out_of_memory,
)
from visionmamba.bench.efficiency import Efficiency
from visionmamba.bench.memory import peak_bytes_on_cpu
from visionmamba.bench.passes import (
    Pass,
    Spread,
    capture,
    reference_output,
    relative_error,
    seconds_in_turns,
)
from visionmamba.bench.results import EfficiencyResult

WEIGHTS_BYTES = 7_148_008 * 4  # Vim-Ti, float32
FEWEST_WEIGHTS_BYTES = 5_600_000 * 2  # DeiT-Ti at 64 px, bfloat16
BFLOAT16_ERROR = 3e-2  # logits of 24 blocks whose activations have 8 bits
FLOAT32_ERROR = 1e-4  # other orders of summation


def case_of(model: ModelName, **options: object) -> Case:
    case = Case(
        model=model,
        size="tiny",
        resolution=32,
        batch=1,
        mode="infer",
        device="cpu",
        precision="float32",
    )
    return replace(case, **options)  # type: ignore[arg-type]


@pytest.mark.once
def test_measures_the_models_and_writes_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "teal").save(picture)
    settings = Efficiency(
        resolutions=(32,), repeats=2, warmup=1, image=picture, device="cpu", out=tmp_path
    )
    result = settings.run()
    assert [row.status for row in result.measurements] == ["ok"] * 2
    assert all(row.milliseconds for row in result.measurements)
    assert [row.launch for row in result.measurements] == ["eager"] * 2
    assert "DeiT-Ti" in capsys.readouterr().out
    stem = tmp_path / "efficiency_cpu_tiny_infer"
    assert len(Path(f"{stem}.csv").read_text().splitlines()) == 3
    saved = EfficiencyResult.from_dict(json.loads(Path(f"{stem}.json").read_text()))
    assert saved == result
    assert "| 32 | 1 | Vim-Ti | " in Path(f"{stem}.md").read_text()
    with Image.open(f"{stem}_speed_dark.png") as plot:
        assert plot.width > 500


@pytest.mark.once
def test_a_case_over_the_memory_limit_is_kept_and_marked(tmp_path: Path) -> None:
    settings = Efficiency(
        resolutions=(192,), repeats=1, device="cpu", memory_limit_gb=0.001, out=tmp_path
    )
    result = settings.run()
    assert [row.status for row in result.measurements] == ["out of memory"] * 2
    assert (tmp_path / "efficiency_cpu_tiny_infer_memory_light.png").is_file()


@pytest.mark.once
def test_peak_memory_holds_weights_and_grows_with_the_resolution() -> None:
    small = peak_bytes_on_cpu(case_of("vim", resolution=64), threads=1)
    large = peak_bytes_on_cpu(case_of("vim", resolution=448), threads=1)
    assert small is not None
    assert large is not None
    assert WEIGHTS_BYTES < small < large < 1e9


@pytest.mark.parametrize("pyramid", [False, True])
@pytest.mark.parametrize("model", ["vim", "deit", "deit-eager"])
def test_bfloat16_is_compared_with_the_models_own_float32(model: ModelName, pyramid: bool) -> None:
    case = case_of(model, precision="bfloat16", batch=3, pyramid=pyramid)
    error = relative_error(Pass(case).run(), reference_output(case))
    assert 0 < error < BFLOAT16_ERROR


@pytest.mark.parametrize("model", [*TRAINING_ONLY, "vim", "deit", "deit-eager"])
def test_variants_train_to_the_gradients_of_the_plain_model(model: ModelName) -> None:
    plain: ModelName = "vim" if model.startswith("vim") else "deit"
    gradients = []
    for name in (model, plain):
        one = Pass(case_of(name, mode="train", batch=2))
        one.prepare()
        named = dict(one.named_gradients())
        gradients.append(next(g for n, g in named.items() if "patch_embed" in n))
    assert relative_error(*gradients) < FLOAT32_ERROR


def test_compiled_model_is_compiled_at_its_first_call_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[bool] = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, *, dynamic: compiled.append(dynamic)
    )
    one = Pass(case_of("deit-compile"))
    assert compiled == []
    logits = [one.run() for _ in range(2)]
    assert compiled == [False]
    torch.testing.assert_close(logits[1], Pass(case_of("deit")).run())


def test_case_survives_the_way_to_another_process() -> None:
    case = case_of("vim", image=Path("picture.png"), pyramid=True)
    assert Case.from_json(case.to_json()) == case


def test_pyramid_gives_the_maps_of_four_strides() -> None:
    maps = Pass(case_of("vim", pyramid=True, resolution=64)).run()
    assert [one.shape for one in maps] == [(1, 256, side, side) for side in (16, 8, 4, 2)]


def test_a_turn_is_as_many_passes_as_fill_it_and_all_models_take_turns() -> None:
    calls: list[str] = []
    spreads = seconds_in_turns(
        {name: lambda name=name: calls.append(name) for name in ("a", "b")},  # type: ignore[misc]
        repeats=3,
        warmup=1,
        is_on_gpu=False,
    )
    assert calls[:2] == ["a", "b"]
    assert calls.count("a") == calls.count("b") > 3
    assert spreads["a"].low <= spreads["a"].median <= spreads["a"].high


def test_a_pass_that_runs_out_of_memory_is_left_out_of_the_times() -> None:
    def fail() -> None:
        raise MemoryError

    passes = {"good": lambda: None, "bad": fail}
    assert list(seconds_in_turns(passes, repeats=1, warmup=1, is_on_gpu=False)) == ["good"]


def test_models_that_do_not_fit_together_are_measured_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU that holds one waiting model, and never deit-eager."""
    waiting: list[ModelName] = []
    timed: list[list[ModelName]] = []

    def prepare(case: Case) -> tuple[SimpleNamespace, int]:
        if waiting or case.model == "deit-eager":
            raise OutOfMemory
        waiting.append(case.model)
        return SimpleNamespace(case=case, launch="graph", run=lambda: torch.ones(1, 2)), 2 * 10**9

    def clock(passes: dict[ModelName, object], **_: object) -> dict[ModelName, Spread]:
        timed.append(list(passes))
        waiting.clear()
        return {model: Spread(median=0.5, low=0.4, high=0.6) for model in passes}

    monkeypatch.setattr(efficiency, "prepare_on_gpu", prepare)
    monkeypatch.setattr(efficiency, "seconds_in_turns", clock)
    monkeypatch.setattr(efficiency, "_is_crowded", lambda: False)
    monkeypatch.setattr(efficiency, "reference_output", lambda case: torch.ones(1, 2))
    settings = Efficiency(models=("vim", "deit", "deit-eager"), resolutions=(64,), batch=(8,))
    vim, deit, eager = settings._measure_point(64, 8, "cuda")
    assert timed == [["vim"], ["deit"], []]
    assert (vim.status, deit.status, eager.status) == ("ok", "ok", "out of memory")
    assert (vim.milliseconds, vim.images_per_second) == (500, 16)
    assert (deit.peak_memory_gb, deit.relative_error, deit.launch) == (2, 0, "graph")
    assert eager.peak_memory_gb is None


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes disagree"), telling_out_of_memory():
        raise RuntimeError("shapes disagree")
    with pytest.raises(OutOfMemory), telling_out_of_memory():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def test_command_names_what_differs_from_the_defaults() -> None:
    settings = Efficiency(
        models=("vim", "deit-eager"), resolutions=(224, 224), batch=(1, 8), cuda_graphs=False
    )
    assert settings.command == (
        "visionmamba bench efficiency --models vim deit-eager --resolutions 224 224 --batch 1 8 "
        "--no-cuda-graphs"
    )


def test_one_batch_holds_for_all_resolutions_and_several_for_one_each() -> None:
    assert Efficiency(resolutions=(32, 64), batch=(8,)).points == ((32, 8), (64, 8))
    assert Efficiency(resolutions=(64, 32), batch=(8, 1)).points == ((64, 8), (32, 1))


def test_automatic_precision_is_the_devices() -> None:
    assert Efficiency().precision_on("cpu") == "float32"
    assert Efficiency().precision_on("cuda") == "bfloat16"
    assert Efficiency(precision="float32").precision_on("cuda") == "float32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolutions": (100,)}, "multiples of 16"),
        ({"resolutions": (512, 224)}, "ascend"),
        ({"resolutions": (224, 224), "batch": (8, 8)}, "without repetition"),
        ({"resolutions": ()}, "multiples of 16"),
        ({"batch": (1, 2)}, "one for each of the 6 resolutions"),
        ({"batch": (0,)}, "one positive number"),
        ({"models": ("vim", "vim")}, "once each"),
        ({"models": ("vim-lean",)}, "vim-lean differs from vim in training only"),
        ({"models": ("deit-checkpoint",)}, "differs from deit in training only"),
        ({"pyramid": True, "mode": "train"}, "no loss"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"warmup": 0}, "warmup must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Efficiency(), **options)  # type: ignore[arg-type]


def test_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.jpg"):
        Efficiency(image=tmp_path / "nothing.jpg")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:cuDNN Attention defaults to a non-deterministic:UserWarning")
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_gpu_rows_are_graphs_with_time_memory_and_error(mode: str, tmp_path: Path) -> None:
    settings = Efficiency(
        resolutions=(64,), batch=(2,), mode=mode, device="cuda", repeats=1, out=tmp_path
    )
    for row in settings.run().measurements:
        assert row.launch == "graph"
        assert row.milliseconds is not None
        assert row.peak_memory_gb is not None
        assert row.peak_memory_gb * 1e9 > FEWEST_WEIGHTS_BYTES
        assert row.relative_error is not None
        assert row.relative_error < BFLOAT16_ERROR


@pytest.mark.gpu
def test_what_cannot_be_captured_is_refused_and_harms_nothing() -> None:
    with pytest.raises(RuntimeError):
        capture(lambda: torch.ones(1, device="cuda").item())
    assert capture(lambda: torch.ones(2, device="cuda") + 1)().tolist() == [2, 2]


@pytest.mark.gpu
def test_gpu_case_that_is_too_large_is_kept_and_leaves_its_memory_to_the_next(
    tmp_path: Path,
) -> None:
    settings = Efficiency(
        models=("vim", "deit-eager"), resolutions=(64,), device="cuda", repeats=1, out=tmp_path
    )
    settings.run()  # takes the libraries' workspaces
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 1e9  # bytes; at 2048 px one attention matrix is 1.6e9
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        rows = replace(settings, resolutions=(64, 2048)).run().measurements
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [row.status for row in rows[:2]] == ["ok"] * 2
    assert rows[3].status == "out of memory"
