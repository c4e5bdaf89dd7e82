"""UperNet's two heads: transformers' modules with what theirs lack.

That is dropout, the weights that the published training starts from, and `upsample`. Needs
transformers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.upernet.configuration_upernet import UperNetConfig
from transformers.models.upernet.modeling_upernet import (
    UperNetFCNHead,
    UperNetHead,
    UperNetPyramidPoolingModule,
)

from visionmamba.models.upsample import upsample

_POOL_SCALES = (1, 2, 3, 6)


class UperNet(UperNetHead):
    """Unified perceptual parsing (arXiv 1807.10221): pooled context, then from coarse to fine.

    Args:
        in_channels: of the maps that come in, from the finest to the coarsest.
        channels: width of the head.
        num_classes: classes K.
        dropout: share of channels dropped before the classifier in training.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, *, num_classes: int, dropout: float
    ) -> None:
        options = UperNetConfig(hidden_size=channels, pool_scales=_POOL_SCALES)
        options.num_labels = num_classes
        super().__init__(options, list(in_channels))  # type: ignore[no-untyped-call]
        _finish(self, channels, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        """Return scores (B, K, h, w) of the finest map for maps (B, C, h, w), ..."""
        levels = [lateral(one) for lateral, one in zip(self.lateral_convs, maps, strict=False)]
        levels.append(self.bottleneck(torch.cat(self._pooled(maps[-1]), dim=1)))
        for finer in reversed(range(len(levels) - 1)):
            levels[finer] = levels[finer] + upsample(levels[finer + 1], _size(levels[finer]))
        finest = _size(levels[0])
        convolved = [conv(one) for conv, one in zip(self.fpn_convs, levels, strict=False)]
        others = [upsample(one, finest) for one in (*convolved[1:], levels[-1])]
        scores: Tensor = self.classifier(self.fpn_bottleneck(torch.cat([convolved[0], *others], 1)))
        return scores

    def _pooled(self, coarsest: Tensor) -> list[Tensor]:
        """Return the coarsest map and, of the same size, its means over ever smaller squares."""
        pools: UperNetPyramidPoolingModule = self.psp_modules
        return [coarsest, *(upsample(pool(coarsest), _size(coarsest)) for pool in pools.blocks)]


class AuxiliaryHead(UperNetFCNHead):
    """One convolution and a classifier on one of the maps, for a second loss in training.

    Args:
        in_channels, num_classes, dropout: as in `UperNet`.
        channels: width of the head.
        level: which map it reads, 0 the finest.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        *,
        level: int,
        num_classes: int,
        dropout: float,
    ) -> None:
        options = UperNetConfig(auxiliary_channels=channels)
        options.num_labels = num_classes
        super().__init__(options, list(in_channels), in_index=level)
        _finish(self, channels, num_classes, dropout)


class _ClassifierWithDropout(nn.Conv2d):
    """A 1x1 convolution that drops whole channels of its input in training."""

    def __init__(self, channels: int, num_classes: int, *, dropout: float) -> None:
        super().__init__(channels, num_classes, kernel_size=1)
        self.dropout = dropout

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(F.dropout2d(features, self.dropout, self.training))


def _finish(head: nn.Module, channels: int, num_classes: int, dropout: float) -> None:
    """Give a head a classifier with dropout and the weights that training starts from.

    These are drawn as by the library that the published segmentation runs in (mmsegmentation).
    """
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    classifier = _ClassifierWithDropout(channels, num_classes, dropout=dropout)
    nn.init.normal_(classifier.weight, std=0.01)
    assert classifier.bias is not None
    nn.init.zeros_(classifier.bias)
    head.classifier = classifier


def _size(one: Tensor) -> tuple[int, int]:
    return one.shape[-2], one.shape[-1]
