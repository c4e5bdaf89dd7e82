"""Feature pyramids: strides, channels, gradients, and that both backbones fit under them."""

import pytest
import torch

from visionmamba.models import DeiTConfig, VimConfig
from visionmamba.models.pyramid import ChannelNorm, FeaturePyramid, PyramidBackbone

VIM = VimConfig(image_size=64, d_model=32, depth=4, num_classes=0)
DEIT = DeiTConfig(image_size=64, d_model=32, depth=4, num_heads=2)


@pytest.mark.parametrize("config", [VIM, DEIT], ids=["vim", "deit"])
@pytest.mark.parametrize(("kind", "channels"), [("segmentation", 32), ("detection", 24)])
def test_levels_have_strides_4_8_16_32(config, kind, channels):
    model = PyramidBackbone(config.build(), kind=kind, out_channels=24)
    levels = model(torch.randn(2, 3, 64, 96))
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [tuple(level.shape) for level in levels] == [(2, channels, *size) for size in sizes]


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_gradients_reach_every_parameter_that_takes_part(kind):
    model = PyramidBackbone(VIM.build(), kind=kind)
    levels = model(torch.randn(2, 3, 64, 64))
    sum(level.square().mean() for level in levels).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == ["backbone.norm.weight"]  # the maps are those before the last norm


def test_layers_are_the_ends_of_the_quarters_or_the_last():
    assert PyramidBackbone(VIM.build(), kind="segmentation").layers == [0, 1, 2, 3]
    assert PyramidBackbone(VimConfig.tiny().build(), kind="segmentation").layers == [5, 11, 17, 23]
    assert PyramidBackbone(DeiTConfig.tiny().build()).layers == [11]


def test_segmentation_keeps_the_third_map_as_it_is():
    maps = [torch.randn(1, 8, 6, 4) for _ in range(4)]
    assert FeaturePyramid(8, kind="segmentation")(maps)[2] is maps[2]


def test_channel_norm_makes_every_pixel_zero_mean_and_unit_variance():
    y = ChannelNorm(64)(3 * torch.randn(2, 64, 3, 5) + 1)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 3, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(2, 3, 5), atol=1e-4, rtol=0)


def test_wrong_number_of_maps_is_refused():
    with pytest.raises(ValueError, match="takes 4 maps, got 1; give the backbone as many layers"):
        FeaturePyramid(8, kind="segmentation")([torch.zeros(1, 8, 2, 2)])
