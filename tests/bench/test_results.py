"""What a comparison says: ratios, crossing points, files, tables and pictures."""

import json
from pathlib import Path

import pytest
from PIL import Image

from visionmamba.bench.cases import ModelName
from visionmamba.bench.efficiency import Efficiency
from visionmamba.bench.machine import describe_machine
from visionmamba.bench.plots import plot_memory, plot_speed
from visionmamba.bench.results import EfficiencyResult, Measurement
from visionmamba.bench.tables import to_markdown

Times = tuple[float | None, ...]
MODELS: tuple[ModelName, ...] = ("vim", "deit", "deit-eager")


def result_of(
    times: dict[int, Times], *, batch: tuple[int, ...] = (1,), peaks_gb: Times = (2.0, 3.0, 90.0)
) -> EfficiencyResult:
    """A result with given milliseconds of Vim, DeiT and so on at each resolution."""
    models = MODELS[: len(next(iter(times.values())))]
    settings = Efficiency(models=models, resolutions=tuple(times), batch=batch, device="cpu")
    rows = tuple(
        Measurement(
            model=model,
            resolution=side,
            batch=images,
            num_tokens=(side // 16) ** 2,
            status="out of memory" if value is None else "ok",
            launch=None if value is None else "eager",
            milliseconds=value,
            milliseconds_low=value,
            milliseconds_high=value,
            images_per_second=None if value is None else images * 1e3 / value,
            peak_memory_gb=None if value is None else gigabytes,
            relative_error=None if value is None else 3e-3,
        )
        for side, images in settings.points
        for model, value, gigabytes in zip(models, times[side], peaks_gb, strict=False)
    )
    machine = describe_machine("cpu", command="visionmamba bench efficiency")
    return EfficiencyResult(settings=settings, machine=machine, measurements=rows)


def test_ratios_are_those_to_the_first_model() -> None:
    result = result_of({224: (20.0, 10.0), 512: (10.0, 25.0)})
    assert result.time_ratio(result.measurement("deit", 224)) == 0.5
    assert result.time_ratio(result.measurement("deit", 512)) == 2.5
    assert result.memory_ratio(result.measurement("deit", 224)) == 1.5


def test_crossing_is_where_the_interpolated_ratio_is_one() -> None:
    result = result_of({224: (20.0, 10.0, 40.0), 512: (10.0, 20.0, 40.0)})
    assert result.crossing_px("deit") == pytest.approx(368)
    assert result.crossing_px("deit-eager") is None
    assert "Vim-Ti is faster than DeiT-Ti from about 368 px on" in result.sentence()
    assert "Vim-Ti is faster than DeiT-Ti eager everywhere" in result.sentence()


def test_no_crossing_when_one_model_always_wins() -> None:
    result = result_of({224: (20.0, 10.0), 512: (20.0, 10.0)})
    assert result.crossing_px("deit") is None
    assert result.sentence().startswith("DeiT-Ti is faster than Vim-Ti everywhere; it takes 2.00x")


def test_no_curve_and_no_crossing_when_batches_differ(tmp_path: Path) -> None:
    result = result_of({224: (20.0, 10.0), 512: (10.0, 20.0)}, batch=(8, 1))
    assert result.crossing_px("deit") is None
    assert result.sentence().startswith("Vim-Ti is faster than DeiT-Ti in 1 of 2 cases")
    assert {path.suffix for path in result.save(tmp_path)} == {".csv", ".json", ".md"}


def test_out_of_memory_rows_stay_without_numbers() -> None:
    result = result_of({224: (20.0, 10.0), 512: (20.0, None)})
    row = result.measurement("deit", 512)
    assert result.time_ratio(row) is None
    assert "| 512 | 1 | DeiT-Ti | out of memory |  | - | - |  |" in to_markdown(result)


def test_rows_beyond_the_papers_card_are_marked(tmp_path: Path) -> None:
    result = result_of({224: (20.0, 10.0, 40.0)})
    assert [row.fits_paper_card for row in result.measurements] == [True, True, False]
    assert "| 90 * |" in to_markdown(result)
    assert "* does not fit the paper's card (80 GB)" in to_markdown(result)
    result.save(tmp_path)
    lines = (tmp_path / "efficiency_cpu_tiny_infer.csv").read_text().splitlines()
    assert [line.split(",")[-1] for line in lines] == ["fits_paper_card", "True", "True", "False"]


def test_measurement_of_what_was_not_measured_is_refused() -> None:
    result = result_of({224: (20.0, 10.0)})
    with pytest.raises(ValueError, match="deit-eager at 224 px, batch any, was not measured"):
        result.measurement("deit-eager", 224)


def test_result_survives_json() -> None:
    result = result_of({224: (20.0, 10.0), 512: (20.0, None)})
    assert EfficiencyResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_label_keeps_runs_apart() -> None:
    settings = Efficiency(label="cases", pyramid=True, device="cpu")
    machine = describe_machine("cpu", command=settings.command)
    result = EfficiencyResult(settings=settings, machine=machine, measurements=())
    assert result.stem == "efficiency_cpu_tiny_infer_pyramid_cases"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("plot", [plot_speed, plot_memory])
def test_pictures_of_several_models_are_drawn(plot, theme, tmp_path: Path) -> None:
    result = result_of({224: (20.0, 10.0, 40.0), 512: (10.0, 20.0, None)})
    (tmp_path / "plot.png").write_bytes(plot(result, theme))
    with Image.open(tmp_path / "plot.png") as picture:
        assert min(picture.size) > 500
