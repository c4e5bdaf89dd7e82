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


def test_pairs_of_blocks_are_read_after_their_second():
    layer = VimConfig(image_size=64, d_model=32, depth=4, bidirectional="layer")
    assert PyramidBackbone(layer.build(), kind="segmentation").layers == [1, 1, 1, 3]


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_levels_of_smaller_patches_have_the_same_strides(stride):
    maps = [torch.randn(1, 8, 64 // stride, 96 // stride)] * 4
    levels = FeaturePyramid(8, kind="segmentation", stride=stride)(maps)
    assert [level.shape[2:] for level in levels] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_maps_at_another_stride_are_refused():
    with pytest.raises(ValueError, match="takes maps at stride 4 or 8 or 16; got 32"):
        FeaturePyramid(8, kind="segmentation", stride=32)


def test_deits_maps_come_in_any_order_and_normed():
    model, images = DEIT.build().eval(), torch.randn(1, 3, 64, 96)
    torch.nn.init.normal_(model.norm.weight)
    maps = model.features(images, [3, 1, 1], kind=["normed", "residual", "normed"])
    plain = model.forward_intermediates(images, indices=[1], intermediates_only=True)
    normed = model.forward_intermediates(images, indices=[1, 3], norm=True, intermediates_only=True)
    for actual, expected in zip(maps, [normed[1], plain[0], normed[0]], strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("config", [VIM, DEIT], ids=["vim", "deit"])
def test_kinds_of_maps_are_checked(config):
    model, images = config.build(), torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="kind must be 'residual', 'mixer' or 'normed'; got 'raw'"):
        model.features(images, [1], kind="raw")
    with pytest.raises(ValueError, match="one for all layers or one for each; got 1 for 2 layers"):
        model.features(images, [1, 2], kind=["normed"])


def test_deit_has_no_mixer():
    with pytest.raises(ValueError, match="kind must be 'residual' or 'normed' for a DeiT"):
        DEIT.build().features(torch.randn(1, 3, 64, 64), [1], kind="mixer")


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
