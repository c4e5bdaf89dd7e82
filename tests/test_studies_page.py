"""The page on studies: its commands and its Python are what the package takes."""

import re
import shlex
from dataclasses import fields

import pytest

from tests.test_readme import BLOCK, ROOT
from visionmamba.bench.segmentation import SegmentationSpeed
from visionmamba.cli.options import parse
from visionmamba.studies import Study, StudyResult
from visionmamba.studies.backbone import BackboneComparison
from visionmamba.studies.bidirectional import BidirectionalAblation
from visionmamba.studies.choices import ChoicesAblation
from visionmamba.studies.readout import ReadoutAblation
from visionmamba.studies.stride import StrideComparison

pytestmark = pytest.mark.once

PAGE = ROOT / "docs" / "studies.md"
KINDS = {
    ("ablate", "bidirectional"): BidirectionalAblation,
    ("ablate", "backbone"): BackboneComparison,
    ("ablate", "readout"): ReadoutAblation,
    ("ablate", "stride"): StrideComparison,
    ("ablate", "choices"): ChoicesAblation,
    ("bench", "segmentation"): SegmentationSpeed,
}


def test_every_command_is_understood() -> None:
    blocks = [block for language, block in BLOCK.findall(PAGE.read_text()) if language == "bash"]
    for line in filter(None, "\n".join(blocks).splitlines()):
        program, command, what, *options = shlex.split(line)
        assert program == "visionmamba"
        parse(KINDS[command, what], options, prog=line)


def test_python_makes_a_study(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Study] = []

    def run(study: Study, options: object) -> StudyResult:
        planned.append(study)
        raise InterruptedError

    monkeypatch.setattr(Study, "run", run)
    (block,) = [
        block for language, block in BLOCK.findall(PAGE.read_text()) if language == "python"
    ]
    with pytest.raises(InterruptedError):
        exec(compile(block, "studies.md", "exec"), {})
    (study,) = planned
    assert study.variants[1].recipe.model.d_state == 32  # type: ignore[union-attr]


def test_every_option_in_the_text_exists() -> None:
    named = set(re.findall(r"`(--[a-z-]+)", PAGE.read_text()))
    known = {f"--{one.name.replace('_', '-')}" for kind in KINDS.values() for one in fields(kind)}
    assert named <= known | {"--no-cuda-graphs"}  # the other way to set cuda_graphs
