"""What the authors left as they found it: norm, first step sizes, weight decay of A, one token."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from visionmamba.models import VimConfig
from visionmamba.models.config import Initialization, Norm, Readout
from visionmamba.recipes.recipe import Recipe
from visionmamba.studies.jobs import AnyRecipe
from visionmamba.studies.settings import StudySettings, compared_with_first
from visionmamba.studies.study import Study, Variant

Row = Literal["published", "layernorm", "symmetric", "no-decay", "registers"]

_ROWS: dict[Row, tuple[str, dict[str, Any]]] = {
    "published": ("As published", {}),
    "layernorm": ("LayerNorm", {"norm": "layernorm"}),
    "symmetric": ("Equal first steps", {"initialization": "symmetric"}),
    "no-decay": ("A_log not decayed", {"decay_a_log": False}),
    "registers": ("12 registers", {"readout": "registers"}),
}


@dataclass(frozen=True, kw_only=True)
class ChoicesAblation(StudySettings):
    """Train a Vim as published, and with one of its unexplained choices made otherwise.

    LayerNorm in place of RMSNorm; first step sizes of the backward scan drawn as those of the
    forward one, where the authors' code leaves 0.69; no weight decay of A's logarithm, which they
    meant to exempt. Beyond the paper, 12 registers in place of the class token, as in Mamba-Reg
    (arXiv 2405.14858), for which 12 must divide d_model. The paper compares none of them.
    """

    name: ClassVar[str] = "choices"

    rows: tuple[Row, ...] = ("published", "layernorm", "symmetric", "no-decay", "registers")
    """Which of the five; the others are compared with the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task != "classification":
            raise ValueError("choices is for --task classification; leave --task out")

    def plan(self) -> Study:
        """Returns the study, of which nothing is trained yet.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: an option is out of range.
        """
        if not self.rows:
            raise ValueError(f"rows must be at least one of {', '.join(_ROWS)}")
        plain = self.vim_recipe()
        variants = []
        for row in self.rows:
            name, made = _ROWS[row]
            variants.append(
                Variant(
                    name=name,
                    recipe=_made_so(plain, **made),
                )
            )
        notes = (f"Data: {self.data_name}.",)
        return self.study(
            compared_with_first(variants), title="One choice made otherwise", notes=notes
        )


def _made_so(
    recipe: AnyRecipe,
    *,
    norm: Norm = "rmsnorm",
    initialization: Initialization = "published",
    decay_a_log: bool = True,
    readout: Readout = "middle",
) -> Recipe:
    """Returns the recipe as published but for what is given."""
    assert isinstance(recipe, Recipe) and isinstance(recipe.model, VimConfig)
    return replace(
        recipe,
        model=replace(
            recipe.model,
            norm=norm,
            initialization=initialization,
            readout=readout,
            num_registers=12,
        ),
        optimizer=replace(recipe.optimizer, decay_a_log=decay_a_log),
    )
