"""DenseRecipe: what recipes of segmentation and of detection have beyond those of any task."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import nn

from visionmamba.models import load_backbone, read_header
from visionmamba.models.hub import find_weights
from visionmamba.models.weights import METADATA_KEY, read_metadata, weights_file
from visionmamba.recipes.recipe import TaskRecipe, pair_of

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class DenseRecipe(TaskRecipe):
    """A run that learns where things are, whose backbone may have learned to classify before."""

    epoch_steps: int | None = None
    """Steps of an epoch, that is, from one validation to the next; they go through the training
    pictures as often as they need. None makes an epoch of one pass over the pictures."""
    weights: Path | str | None = None
    """Weights to start from. Those of a classifier (a file or folder of this package, the authors'
    .pth, a published name) become the backbone; those of a model of the same task go on as a whole,
    and must have the classes of the data."""
    backbone_only: bool = False
    """Take only the backbone from weights of the same task, for data with other classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epoch_steps is not None and self.epoch_steps < 1:
            raise ValueError(f"epoch_steps must be at least 1 or None, got {self.epoch_steps}")
        if self.backbone_only and self.weights is None:
            raise ValueError("backbone_only says what to take of weights; give weights, too")

    def _check_sizes(
        self,
        model: int | tuple[int, int],
        pictures: int | tuple[int, int],
        *,
        name: str,
    ) -> None:
        """Refuses a position embedding of another size than that of the training pictures.

        Args:
            model: side, or (height, width), that the backbone's is learned for.
            pictures: that of the training pictures.
            name: of that field of the preprocessing.
        """
        side, cut = pair_of(model), pair_of(pictures)
        if side != cut:
            raise ValueError(
                f"model.backbone.image_size {side} and preprocessing.{name} {cut} must be equal; "
                "set both"
            )

    def _start(
        self,
        model: Model,
        *,
        architecture: str,
        load_whole: Callable[[Model, Path | str], object],
        rank: int,
    ) -> None:
        """Gives a new model the recipe's weights, if there are any.

        Args:
            model: what learns, in place.
            architecture: what weights files call it.
            load_whole: takes over weights of that architecture.
            rank: the first one tells what the weights meant otherwise.
        """
        if self.weights is None:
            return
        path = weights_file(find_weights(self.weights))
        is_ours = path.suffix == ".safetensors" and METADATA_KEY in read_metadata(path)
        if not self.backbone_only and is_ours and read_header(path).architecture == architecture:
            load_whole(model, self.weights)
            return
        notes = load_backbone(model, self.weights).notes
        if notes and rank == 0:
            warnings.warn(
                f"{self.weights} starts the backbone, but {'; '.join(notes)}", stacklevel=3
            )
