"""The demonstration from end to end in a short form, and taken up by a second run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from visionmamba.demo import Demo

pytestmark = pytest.mark.once


def test_trains_measures_reports_and_is_taken_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = Demo(out=tmp_path, epochs=1, resolutions=(32,), repeats=1)
    report = demo.run()
    assert report == tmp_path / "report.html"
    assert "Vim beside DeiT" in report.read_text()
    results = [json.loads((tmp_path / m / "results.json").read_text()) for m in ("vim", "deit")]
    vim, deit = (result["parameters"] for result in results)
    assert abs(vim - deit) / deit < 0.01
    capsys.readouterr()

    demo.run()
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("is finished and taken") == 2
    assert "measured before" in said

    with pytest.raises(ValueError, match=r"epochs is 1 there and 2 here.*--fresh trains anew"):
        replace(demo, epochs=2).run()


def test_wrong_options_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        Demo(out=tmp_path, epochs=0)
    with pytest.raises(ValueError, match="multiples of 16"):
        Demo(out=tmp_path, resolutions=(100,))
