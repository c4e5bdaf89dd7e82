"""Measuring segmenters: both modes in one run, variants that learn alike, wrong options."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.test_efficiency import FLOAT32_ERROR, case_of
from visionmamba.bench import efficiency
from visionmamba.bench.cases import ModelName, OutOfMemory
from visionmamba.bench.passes import Pass, relative_error
from visionmamba.bench.segmentation import SegmentationSpeed

pytestmark = pytest.mark.once


def test_measures_inference_and_training_and_writes_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The memory of each case, which takes a process of its own, is made up: DeiT has too little
    in training."""

    def peak_bytes(case, **_: object) -> int:  # type: ignore[no-untyped-def]
        if (case.model, case.mode) == ("deit", "train"):
            raise OutOfMemory
        return 2 * 10**9

    monkeypatch.setattr(efficiency, "peak_bytes_on_cpu", peak_bytes)
    settings = SegmentationSpeed(
        models=("vim", "deit", "vim-lean"),
        head="segmenter",
        num_classes=3,
        resolutions=(32,),
        infer_batch=1,
        train_batch=1,
        device="cpu",
        repeats=1,
        warmup=1,
        out=tmp_path,
    )
    infer, train = settings.run()
    assert [row.status for row in infer.measurements] == ["ok"] * 2
    assert [row.status for row in train.measurements] == ["ok", "out of memory", "ok"]
    assert infer.machine.command == train.machine.command == settings.command
    assert settings.command.startswith("visionmamba bench segmentation --models vim deit vim-lean")
    assert "3 classes" in capsys.readouterr().out
    stem = "segmentation_segmenter_cpu_tiny"
    table = (tmp_path / f"{stem}_train.md").read_text()
    assert "| side, px | batch | model | ms | images/s | peak GB |" in table
    assert "| 32 | 1 | DeiT-Ti | out of memory |" in table
    for mode in ("infer", "train"):
        for what in ("memory", "speed"):
            assert (tmp_path / f"{stem}_{mode}_{what}_dark.png").is_file()


def test_checkpointed_segmenter_trains_to_the_gradients_of_the_plain_one() -> None:
    gradients = []
    names: tuple[ModelName, ...] = ("deit-checkpoint", "deit")
    for name in names:
        one = Pass(case_of(name, mode="train", segmenter="segmenter", num_classes=3))
        one.prepare()
        named = dict(one.named_gradients())
        gradients.append(next(g for n, g in named.items() if "patch_embed" in n))
    assert relative_error(*gradients) < FLOAT32_ERROR


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolutions": (48,)}, "multiples of 32"),
        ({"train_batch": 1}, "at least 2 for UperNet"),
        ({"models": ("vim-lean",)}, "can be measured in inference"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SegmentationSpeed(), **options)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:cuDNN Attention defaults to a non-deterministic:UserWarning")
@pytest.mark.parametrize("head", ["upernet", "segmenter"])
def test_gpu_rows_are_graphs_with_time_memory_and_error(head: str, tmp_path: Path) -> None:
    settings = SegmentationSpeed(
        head=head,  # type: ignore[arg-type]
        num_classes=3,
        resolutions=(64,),
        infer_batch=2,
        train_batch=2,
        device="cuda",
        repeats=1,
        out=tmp_path,
    )
    for result in settings.run():
        for row in result.measurements:
            assert row.launch == "graph"
            assert row.peak_memory_gb is not None
            assert row.relative_error is not None
            assert row.relative_error < 0.1
