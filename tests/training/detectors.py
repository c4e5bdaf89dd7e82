"""Detection whose validation has something to score from the start, in seconds."""

from dataclasses import dataclass, replace
from typing import Any

from tests.recipes.detectors import small_recipe
from tests.tasks.truthful import Truthful
from visionmamba.recipes import DetectionRecipe
from visionmamba.training import Experiment


@dataclass(frozen=True, kw_only=True)
class KnowingRecipe(DetectionRecipe):
    """A run whose model learns as any other, and in validation misses an object of each picture."""

    def build(self, *, num_workers: int = 0, rank: int = 0, num_ranks: int = 1) -> Experiment:
        experiment = super().build(num_workers=num_workers, rank=rank, num_ranks=num_ranks)
        known = Truthful(self.data.open("val"), self.preprocessing, num_missed=1).eval()

        def answer(module: Any, inputs: Any, output: Any) -> Any:
            return output if module.training else known(inputs[0])

        experiment.task.model.register_forward_hook(answer)
        return experiment


def knowing_recipe(**changes: Any) -> KnowingRecipe:
    """Returns an epoch of two steps with a moving average; nine pictures to validate on."""
    recipe = small_recipe(epochs=1, ema_decay=0.9)
    recipe = replace(recipe, data=replace(recipe.data, num_val=9), **changes)
    return KnowingRecipe(**vars(recipe))
