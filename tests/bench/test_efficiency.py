"""Vim beside DeiT: ratios, the crossing point, files, and rows that ran out of memory."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from visionmamba.bench.cases import Case, OutOfMemory, raise_if_out_of_memory
from visionmamba.bench.efficiency import Efficiency, EfficiencyResult, Measurement
from visionmamba.bench.machine import describe_machine
from visionmamba.bench.memory import peak_memory_gib

WEIGHTS_GIB = 7_148_008 * 4 / 2**30  # Vim-Ti, float32


def result_of(times: dict[int, tuple[float | None, float | None]]) -> EfficiencyResult:
    """A result with given milliseconds of (Vim, DeiT) at each resolution; 2 and 3 GiB."""
    settings = Efficiency(resolutions=tuple(times), device="cpu")
    rows = tuple(
        Measurement(
            model=model,
            resolution=side,
            num_tokens=(side // 16) ** 2,
            status="out of memory" if value is None else "ok",
            milliseconds=value,
            milliseconds_low=value,
            milliseconds_high=value,
            images_per_second=None if value is None else 1e3 / value,
            peak_memory_gib=None if value is None else gib,
        )
        for side, pair in times.items()
        for model, value, gib in zip(("vim", "deit"), pair, (2.0, 3.0), strict=True)
    )
    machine = describe_machine("cpu", command="visionmamba bench efficiency")
    return EfficiencyResult(settings=settings, machine=machine, measurements=rows)


def case_of(model: str, resolution: int = 64, mode: str = "infer") -> Case:
    return Case(
        model=model,
        size="tiny",
        resolution=resolution,
        batch=1,
        mode=mode,
        device="cpu",
        precision="float32",
        image=None,
    )


def test_ratios_are_deit_over_vim() -> None:
    result = result_of({224: (20.0, 10.0), 512: (10.0, 25.0)})
    assert result.speedup(224) == 0.5
    assert result.speedup(512) == 2.5
    assert result.memory_ratio(224) == 1.5


def test_crossing_is_where_the_interpolated_ratio_is_one() -> None:
    result = result_of({224: (20.0, 10.0), 512: (10.0, 20.0)})
    assert result.crossing_px() == pytest.approx(368)
    assert "from about 368 px on" in result.sentence()


def test_no_crossing_when_one_model_always_wins() -> None:
    result = result_of({224: (20.0, 10.0), 512: (20.0, 10.0)})
    assert result.crossing_px() is None
    assert result.sentence().startswith("DeiT-Ti is the faster one at every resolution measured")


def test_out_of_memory_rows_stay_without_numbers() -> None:
    result = result_of({224: (20.0, 10.0), 512: (20.0, None)})
    assert result.speedup(512) is None
    assert result.measurement("deit", 512).status == "out of memory"


def test_result_survives_json() -> None:
    result = result_of({224: (20.0, 10.0), 512: (20.0, None)})
    assert EfficiencyResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_measures_both_models_and_writes_files(
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
    assert "DeiT-Ti" in capsys.readouterr().out
    stem = tmp_path / "efficiency_cpu_tiny_infer"
    assert len(Path(f"{stem}.csv").read_text().splitlines()) == 3
    saved = EfficiencyResult.from_dict(json.loads(Path(f"{stem}.json").read_text()))
    assert saved == result
    assert "| 32 | 4 | " in Path(f"{stem}.md").read_text()
    with Image.open(f"{stem}_time_dark.png") as plot:
        assert plot.width > 500


def test_a_case_over_the_memory_limit_is_kept_and_marked(tmp_path: Path) -> None:
    settings = Efficiency(
        resolutions=(512,), repeats=1, device="cpu", memory_limit_gib=0.01, out=tmp_path
    )
    result = settings.run()
    assert [row.status for row in result.measurements] == ["out of memory"] * 2
    assert (tmp_path / "efficiency_cpu_tiny_infer_memory_light.png").is_file()


def test_peak_memory_holds_weights_and_grows_with_the_resolution() -> None:
    small = peak_memory_gib(case_of("vim", 64), threads=1)
    large = peak_memory_gib(case_of("vim", 448), threads=1)
    assert small is not None
    assert large is not None
    assert WEIGHTS_GIB < small < large < 1


def test_training_pass_leaves_no_gradients_behind() -> None:
    loaded = case_of("vim", 32, mode="train").load()
    loaded.run()
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    raise_if_out_of_memory(RuntimeError("shapes disagree"))
    with pytest.raises(OutOfMemory):
        raise_if_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))


def test_command_names_what_differs_from_the_defaults() -> None:
    settings = Efficiency(resolutions=(224, 512), threads=2)
    assert settings.command == "visionmamba bench efficiency --resolutions 224 512 --threads 2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolutions": (100,)}, "multiples of 16"),
        ({"resolutions": (512, 224)}, "ascend"),
        ({"resolutions": ()}, "multiples of 16"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"warmup": -1}, "warmup"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Efficiency(), **options)  # type: ignore[arg-type]


def test_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.jpg"):
        Efficiency(image=tmp_path / "nothing.jpg")
