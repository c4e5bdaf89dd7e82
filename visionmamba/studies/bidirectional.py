"""The paper's table 4: what it takes to read the sequence in both directions."""

from dataclasses import dataclass, replace
from typing import ClassVar

from visionmamba.models import SegmenterConfig, VimConfig
from visionmamba.models.config import Bidirectional
from visionmamba.studies.jobs import AnyRecipe
from visionmamba.studies.settings import StudySettings, compared_with_first
from visionmamba.studies.study import Study, Variant

_NAMES: dict[Bidirectional, str] = {
    "none": "None",
    "sequence": "Bidirectional Sequence",
    "layer": "Bidirectional Layer",
    "ssm": "Bidirectional SSM",
    "ssm+conv": "Bidirectional SSM + Conv1d",
}
# arXiv 2401.09417, table 4: ImageNet-1k top-1 and ADE20K mIoU; it has no row for "sequence"
_PAPER: dict[Bidirectional, tuple[str, str]] = {
    "none": ("73.2", "32.3"),
    "sequence": ("not given", "not given"),
    "layer": ("70.9", "33.6"),
    "ssm": ("72.8", "33.2"),
    "ssm+conv": ("73.9", "35.9"),
}


@dataclass(frozen=True, kw_only=True)
class BidirectionalAblation(StudySettings):
    """Train a Vim that reads the sequence in five ways and show them beside the paper's table 4.

    Without class token, as in the paper: a classifier reads the mean of all tokens, a segmenter has
    the two-layer mask transformer of Segmenter.
    """

    name: ClassVar[str] = "bidirectional"

    rows: tuple[Bidirectional, ...] = ("none", "sequence", "layer", "ssm", "ssm+conv")
    """Which of the five; the others are compared with the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task == "detection":
            raise ValueError("bidirectional is for --task classification or segmentation")

    def plan(self) -> Study:
        """Returns the study, of which nothing is trained yet.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: an option is out of range.
        """
        if not self.rows:
            raise ValueError("rows must be at least one of none, sequence, layer, ssm, ssm+conv")
        plain = self.vim_recipe()
        variants = [
            Variant(
                name=_NAMES[row],
                recipe=_with_direction(plain, row),
                paper=dict(zip(("ImageNet top-1", "ADE20K mIoU"), _PAPER[row], strict=True)),
            )
            for row in self.rows
        ]
        notes = (f"Data: {self.data_name}; the paper's columns: ImageNet-1k and ADE20K.",)
        return self.study(
            compared_with_first(variants), title=f"Bidirectional design, {self.task}", notes=notes
        )


def _with_direction(recipe: AnyRecipe, row: Bidirectional) -> AnyRecipe:
    """Returns the recipe with a Vim without class token that reads the sequence in one way."""
    if isinstance(recipe.model, SegmenterConfig):
        backbone = recipe.model.backbone
        assert isinstance(backbone, VimConfig)
        backbone = replace(backbone, bidirectional=row, readout="mean")
        # no auxiliary head either: the mask transformer has none
        return replace(recipe, model=replace(recipe.model, backbone=backbone, head="segmenter"))
    assert isinstance(recipe.model, VimConfig)
    return replace(recipe, model=replace(recipe.model, bidirectional=row, readout="mean"))
