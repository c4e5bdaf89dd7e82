"""Long sequences: Vim and DeiT fine-tuned with twice as many patches a side, as in table 1."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from visionmamba.studies.backbone import classifiers_of
from visionmamba.studies.settings import PretrainedStudySettings
from visionmamba.studies.study import Study, Variant

# arXiv 2401.09417, table 1: ImageNet-1k top-1 at 224 px, before and after 30 epochs at stride 8
_PAPER = {"Vim-Ti": ("76.1", "78.3")}


@dataclass(frozen=True, kw_only=True)
class StrideComparison(PretrainedStudySettings):
    """Fine-tune weights of a Vim and of a DeiT at half the stride and, as long, at their own.

    The patches keep their size and overlap; the difference between the two fine-tunes is what the
    finer grid gains, and their times and memory what it costs. Both have the rates of weights.
    """

    name: ClassVar[str] = "stride"

    vim_weights: Path
    """Trained weights of the Vim, such as last.safetensors of a run of `ablate backbone`."""
    deit_weights: Path
    """Trained weights of the DeiT."""
    epochs: int | None = 30
    """Epochs of the fine-tunes that count; the warm-up keeps its share of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task != "classification":
            raise ValueError("stride is for --task classification; leave --task out")

    def plan(self) -> Study:
        """Returns the study, of which nothing is trained yet.

        Raises:
            FileNotFoundError: there are no such data or weights.
            ValueError: an option is out of range.
        """
        for path in (self.vim_weights, self.deit_weights):
            if not path.exists():
                raise FileNotFoundError(f"there are no weights {path} to fine-tune")
        weights = (self.vim_weights, self.deit_weights)
        variants = []
        for (name, recipe), path in zip(classifiers_of(self).items(), weights, strict=True):
            stride = recipe.model.resolved_stride
            published = _PAPER.get(name, ("not given", "not given"))
            for number, top1 in zip((stride, stride // 2), published, strict=True):
                variants.append(
                    Variant(
                        name=f"{name}, stride {number}",
                        recipe=replace(
                            recipe, model=replace(recipe.model, stride=number), weights=path
                        ),
                        learning_rates=self.pretrained_rates,
                        compared_with=f"{name}, stride {stride}" if number != stride else None,
                        paper={"ImageNet top-1": top1},
                    )
                )
        notes = (
            f"Data: {self.data_name}; the paper's column: ImageNet-1k at 224 px, from stride 16 to "
            f"8, the first without fine-tuning. Fine-tuned from {self.vim_weights} and "
            f"{self.deit_weights}.",
        )
        return self.study(variants, title="Fine-tuned at half the stride", notes=notes)
