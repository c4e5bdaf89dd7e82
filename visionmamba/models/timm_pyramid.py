"""A TimmVim whose features_only has maps at strides 4, 8, 16 and 32, as convolutional nets have.

For decoders that count on such strides: those of segmentation-models-pytorch, for example.
"""

from collections.abc import Sequence

from timm.models import FeatureInfo
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from visionmamba.models.pyramid import STRIDES_PX, FeaturePyramid
from visionmamba.models.timm_vim import TimmVim


class FeaturePyramidNet(nn.Module):
    """Maps of four depths, each rescaled to its level by layers that are to be trained.

    The strides are a quarter, a half, one and two of the model's own.

    Args:
        model: with four blocks at least; those after the last one needed are removed, as are norm
            and classifier.
        out_indices: levels, from the finest; a number n means the last n.

    Raises:
        ValueError: the model has too few blocks.
        AssertionError: a level that does not exist.
    """

    def __init__(self, model: TimmVim, out_indices: int | Sequence[int] = 4) -> None:
        super().__init__()
        num_levels, num_steps = len(STRIDES_PX), len(model.feature_info)
        if num_steps < num_levels:
            raise ValueError(
                f"a pyramid reads {num_levels} depths of a model; got one with {num_steps}: take "
                f'depth={num_levels} or more, or feature_cls="getter"'
            )
        wanted, _ = feature_take_indices(num_levels, out_indices)  # type: ignore[arg-type]
        stride = model.config.resolved_stride
        infos = [
            {
                "module": f"levels.{level}",
                "num_chs": model.embed_dim,
                "reduction": stride * size // STRIDES_PX[2],
            }
            for level, size in enumerate(STRIDES_PX)
        ]
        self.feature_info = FeatureInfo(infos, tuple(wanted))
        levels = FeaturePyramid(model.embed_dim, kind="segmentation").levels
        self.levels = nn.ModuleDict({str(level): levels[level] for level in wanted})
        self.steps = [num_steps * (level + 1) // num_levels - 1 for level in wanted]
        model.prune_intermediate_layers(self.steps, prune_norm=True)
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map (B, D, h, w) a level."""
        maps = self.model.forward_intermediates(images, self.steps, intermediates_only=True)
        return [level(one) for level, one in zip(self.levels.values(), maps, strict=True)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations, or not."""
        self.model.set_grad_checkpointing(enable)
