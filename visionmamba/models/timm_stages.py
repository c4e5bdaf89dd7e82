"""A TimmVim cut into modules in a row, for those feature nets of timm that run or hook modules.

FeatureGetterNet, timm's default for models like this, needs none of it.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from timm.models import (
    FeatureDictNet,
    FeatureGraphNet,
    FeatureHookNet,
    FeatureListNet,
    register_notrace_module,
)
from torch import Tensor, nn

from visionmamba.models.config import VimConfig
from visionmamba.models.timm_pyramid import FeaturePyramidNet
from visionmamba.models.timm_vim import ResidualSum, TimmVim
from visionmamba.models.vim import SequenceLayout, run_blocks, sequence_to_map


def feature_net(kind: str | Callable[..., nn.Module]) -> str | Callable[..., nn.Module]:
    """Return what timm shall wrap a model in for features_only.

    Nets that run or hook a model's modules one by one get VimStages instead of the model.

    Args:
        kind: timm's feature_cls: "getter" (timm's FeatureGetterNet), "list", "dict", "hook", "fx"
            or a class; besides "pyramid" (FeaturePyramidNet).
    """
    if kind == "pyramid":
        return FeaturePyramidNet
    nets = {
        "list": FeatureListNet,
        "dict": FeatureDictNet,
        "hook": FeatureHookNet,
        "fx": _StageGraphNet,
    }
    if kind is FeatureGraphNet:
        kind = "fx"
    if isinstance(kind, str):
        kind = nets.get(kind, kind)
    if isinstance(kind, str) or kind not in nets.values():
        return kind
    return partial(_wrap_stages, kind)


class VimStages(nn.Sequential):
    """A TimmVim cut into modules that run one after the other, as timm's FeatureListNet needs.

    Each gives a tuple whose first element is the map (B, D, h, w) after its block.

    Args:
        vim: taken apart; it cannot be used by itself afterwards.
    """

    def __init__(self, vim: TimmVim) -> None:
        vim.reset_classifier(0)
        blocks, per_step = vim.blocks, vim.blocks_per_step
        vim.blocks = nn.ModuleList()
        vim.add_module("norm", ResidualSum())
        vim.register_readout = None
        stages: OrderedDict[str, nn.Module] = OrderedDict(embedding=_Embedding(vim))
        for step in range(len(vim.feature_info)):
            stages[f"stage{step}"] = _Stage(
                blocks[step * per_step : (step + 1) * per_step], vim.config
            )
        super().__init__(stages)
        self.feature_info = [
            {**info, "module": f"stage{step}"} for step, info in enumerate(vim.feature_info)
        ]

    def forward(self, images: Tensor) -> Tensor:
        """Return the last map (B, D, h, w)."""
        state: Any = images
        for stage in self:
            state = stage(state)
        last_map: Tensor = state.tapped
        return last_map


class _StageGraphNet(FeatureGraphNet):
    """FeatureGraphNet for stages, of whose outputs it returns the maps."""

    def forward(self, images: Tensor) -> list[Tensor] | dict[str, Tensor]:
        maps: dict[str, Tensor] = {
            name: state[0] for name, state in self.graph_module(images).items()
        }
        return maps if self.return_dict else list(maps.values())


def _wrap_stages(net: Callable[..., nn.Module], model: TimmVim, **options: Any) -> nn.Module:
    return net(VimStages(model), **options)


class _State(NamedTuple):
    """What one stage hands to the next."""

    tapped: Tensor
    branch: Tensor
    residual: Tensor | None
    layout: SequenceLayout


@register_notrace_module
class _Embedding(nn.Module):
    """Pictures to the first state of a Vim without blocks."""

    def __init__(self, vim: TimmVim) -> None:
        super().__init__()
        self.vim = vim

    def forward(self, images: Tensor) -> _State:
        tokens, layout = self.vim._embed(images)
        return _State(sequence_to_map(tokens, layout), tokens, None, layout)


@register_notrace_module
class _Stage(nn.Module):
    """The blocks that run from one input, from state to state."""

    def __init__(self, blocks: nn.ModuleList, config: VimConfig) -> None:
        super().__init__()
        self.blocks = blocks
        self.config = config

    def forward(self, state: _State) -> _State:
        branch, residual = run_blocks(
            list(self.blocks), state.branch, state.residual, state.layout, self.config
        )
        dtype = next(self.parameters()).dtype
        tapped = sequence_to_map(residual + branch, state.layout).to(dtype)
        return _State(tapped, branch, residual, state.layout)
