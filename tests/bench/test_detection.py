"""Measuring detectors: both modes in one run, what they are made of, wrong options."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tests.bench.test_efficiency import case_of
from visionmamba.bench import efficiency, plots
from visionmamba.bench.cases import ModelName
from visionmamba.bench.detection import DetectionSpeed
from visionmamba.bench.efficiency import Efficiency
from visionmamba.bench.passes import Pass
from visionmamba.models import VimConfig, detection
from visionmamba.models.windows import WindowedDeiT

pytestmark = pytest.mark.once


@dataclass(frozen=True, kw_only=True)
class NarrowDetector(detection.DetectorConfig):
    """Narrow heads, as the published ones take seconds a picture on a CPU."""

    channels: int = 8
    box_width: int = 8
    num_proposals: int = 20
    num_sampled: int = 8


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "DetectorConfig", NarrowDetector)


@pytest.mark.usefixtures("small")
def test_measures_inference_and_training_and_writes_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The memory of each case, which takes a process of its own, is made up."""
    monkeypatch.setattr(efficiency, "peak_bytes_on_cpu", lambda case, **_: 2 * 10**9)
    monkeypatch.delitem(plots.PALETTES, "light")  # half of the pictures, which take longest
    settings = DetectionSpeed(
        models=("deit-window", "vim-lean"),
        head="mask",
        resolutions=(32,),
        train_batch=1,
        device="cpu",
        repeats=1,
        warmup=1,
        out=tmp_path,
    )
    infer, train = settings.run()
    assert [row.status for row in infer.measurements] == ["ok"]
    assert [row.status for row in train.measurements] == ["ok"] * 2
    assert {row.relative_error for row in infer.measurements} == {None}
    assert infer.machine.command == train.machine.command == settings.command
    assert settings.command.startswith("visionmamba bench detection --models deit-window vim-lean")
    assert "detectors (mask, 1 class)" in " ".join(capsys.readouterr().out.split())
    stem = "detection_mask_cpu_tiny"
    assert "| DeiT-Ti windows |" in (tmp_path / f"{stem}_train.md").read_text()
    for mode in ("infer", "train"):
        for what in ("memory", "speed"):
            assert (tmp_path / f"{stem}_{mode}_{what}_dark.png").is_file()


def model_of(name: ModelName) -> detection.DetectionModel:
    with torch.device("meta"):
        case = case_of(name, detector="cascade", resolution=1024, num_classes=1, device="meta")
        model = case.build_model()
    assert isinstance(model, detection.DetectionModel)
    return model


def test_models_are_those_of_the_paper() -> None:
    vim, deit, windows = (model_of(name) for name in ("vim", "deit", "deit-window"))
    assert isinstance(vim.config.backbone, VimConfig)
    assert vim.config.backbone.readout == "mean"
    assert isinstance(windows.backbone, WindowedDeiT)
    assert (windows.config.window_size, deit.config.window_size) == (14, None)
    assert {one.config.score_threshold for one in (vim, deit, windows)} == {0.0}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("model", ["deit-window", "deit-checkpoint"])
def test_training_step_reaches_every_parameter(model: ModelName) -> None:
    one = Pass(case_of(model, detector="mask", mode="train", num_classes=2))
    one.prepare()
    one.run()
    names = {name for name, _ in one.named_gradients()}
    assert names == {name for name, _ in one._model.named_parameters()}
    assert one.launch == "eager"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolutions": (48,)}, "multiples of 32"),
        ({"models": ("vim-lean",)}, "can be measured in inference"),
        ({"models": ("vim", "deit-compile")}, "detectors are not compiled"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DetectionSpeed(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("deit-window",)}, "deit-window is for detectors"),
        ({"detector": "cascade"}, "cannot be recorded"),
        ({"detector": "mask", "segmenter": "upernet"}, "exclude each other"),
    ],
)
def test_what_is_for_detectors_stays_with_them(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Efficiency(), **options)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.usefixtures("usual_algorithms")
@pytest.mark.filterwarnings("ignore:cuDNN Attention defaults to a non-deterministic:UserWarning")
def test_gpu_rows_have_time_and_memory(tmp_path: Path) -> None:
    settings = DetectionSpeed(
        resolutions=(128,), train_batch=1, device="cuda", repeats=1, out=tmp_path
    )
    for result in settings.run():
        for row in result.measurements:
            assert row.launch == "eager"
            assert row.peak_memory_gb is not None
            assert row.images_per_second is not None
