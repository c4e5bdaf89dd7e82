"""The paper's table 5: where a classifier reads what the blocks have found."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from visionmamba.models import VimConfig
from visionmamba.studies.settings import StudySettings, compared_with_first
from visionmamba.studies.study import Study, Variant

Row = Literal["mean", "max", "head", "double", "middle"]

# arXiv 2401.09417, table 5: its names and its ImageNet-1k top-1
_PAPER: dict[Row, tuple[str, str]] = {
    "mean": ("Mean pool", "73.9"),
    "max": ("Max pool", "73.4"),
    "head": ("Head class token", "75.2"),
    "double": ("Double class token", "74.3"),
    "middle": ("Middle class token", "76.1"),
}


@dataclass(frozen=True, kw_only=True)
class ReadoutAblation(StudySettings):
    """Train a Vim that classifies from five places and show them beside the paper's table 5."""

    name: ClassVar[str] = "readout"

    rows: tuple[Row, ...] = ("mean", "max", "head", "double", "middle")
    """Which of the five; the others are compared with the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task != "classification":
            raise ValueError("readout is for --task classification: nothing else has one")

    def plan(self) -> Study:
        """Returns the study, of which nothing is trained yet.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: an option is out of range.
        """
        if not self.rows:
            raise ValueError(f"rows must be at least one of {', '.join(_PAPER)}")
        plain = self.vim_recipe()
        assert isinstance(plain.model, VimConfig)
        variants = []
        for row in self.rows:
            name, published = _PAPER[row]
            variants.append(
                Variant(
                    name=name,
                    recipe=replace(plain, model=replace(plain.model, readout=row)),
                    paper={"ImageNet top-1": published},
                )
            )
        notes = (f"Data: {self.data_name}; the paper's column: ImageNet-1k.",)
        return self.study(compared_with_first(variants), title="Classification design", notes=notes)
