"""The report: self-contained, escaped, and honest about what went wrong or is not known."""

import re
from dataclasses import replace

import pytest
from PIL import Image

from visionmamba.bench.efficiency import Efficiency
from visionmamba.bench.machine import describe_machine
from visionmamba.bench.results import EfficiencyResult, Measurement
from visionmamba.demo.report import Contender, Digit, Report


def contender(name: str, accuracy: float) -> Contender:
    return Contender(
        name=name,
        command=f"visionmamba train digits_{name.lower()} --out runs/demo/{name.lower()}",
        accuracy=accuracy,
        parameters=202_042,
        epochs=2,
        seconds=83,
        train_images_per_second=400,
        predict_images_per_second=600,
        num_train_images=1437,
        num_test_images=2,
        metrics=(
            {"step": 1, "epoch": 1, "train_loss": 2.0},
            {"step": 2, "epoch": 1, "train_loss": 1.0},
            {"step": 2, "epoch": 1, "val_accuracy": 0.5},
            {"step": 4, "epoch": 2, "val_accuracy": accuracy},
        ),
    )


def measurement(model: str, milliseconds: float | None) -> Measurement:
    return Measurement(
        model=model,
        resolution=224,
        batch=1,
        num_tokens=196,
        status="ok" if milliseconds else "out of memory",
        milliseconds=milliseconds,
        milliseconds_low=milliseconds,
        milliseconds_high=milliseconds,
        images_per_second=None,
        peak_memory_gb=0.5 if milliseconds else None,
        launch="eager" if milliseconds else None,
        relative_error=None,
    )


@pytest.fixture
def report() -> Report:
    machine = describe_machine("cpu", command="visionmamba demo --fresh")
    picture = Image.new("L", (8, 8), 200)
    return Report(
        vim=contender("Vim", 0.975),
        deit=contender("DeiT", 0.953),
        digits=(
            Digit(picture=picture, truth="7", vim="7", deit="7"),
            Digit(picture=picture, truth="3", vim="8", deit="3"),
        ),
        efficiency=EfficiencyResult(
            settings=Efficiency(resolutions=(224,), device="cpu"),
            machine=machine,
            measurements=(measurement("vim", 12.0), measurement("deit", 24.0)),
        ),
        machine=machine,
    )


def test_report_takes_nothing_from_outside(report: Report) -> None:
    page = report.to_html()
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in page
    assert "default-src 'none'" in page


def test_report_shows_the_numbers(report: Report) -> None:
    page = report.to_html()
    assert "97.50%" in page
    assert "202,042" in page
    assert "1 min 23 s" in page
    assert "2.00×" in page
    assert "visionmamba train digits_vim --out runs/demo/vim" in page


def test_wrong_answers_are_marked_and_counted(report: Report) -> None:
    page = report.to_html()
    assert "Vim 8 ✗" in page
    assert "Vim misread 1, DeiT 0" in page


def test_text_is_escaped(report: Report) -> None:
    machine = replace(report.machine, processor="<b>chip</b> & co")
    page = replace(report, machine=machine).to_html()
    assert "&lt;b&gt;chip&lt;/b&gt; &amp; co" in page
    assert "<b>chip" not in page


def test_a_case_out_of_memory_is_said(report: Report) -> None:
    rows = (measurement("vim", 12.0), measurement("deit", None))
    efficiency = replace(report.efficiency, measurements=rows)
    page = replace(report, efficiency=efficiency).to_html()
    assert page.count("<td>out of memory</td>") == 2
    assert "Peak memory at 224 px is not known for both." in page


def test_curve_is_the_mean_of_each_epoch(report: Report) -> None:
    assert report.vim.curve("train_loss") == ([1.0], [1.5])
    assert report.vim.curve("val_accuracy") == ([1.0, 2.0], [0.5, 0.975])
