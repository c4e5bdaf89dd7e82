"""Vim under names of timm whose features have the strides of convolutional nets."""

import pytest
import segmentation_models_pytorch as smp
import timm
import torch

from visionmamba.models.timm_pyramid import FeaturePyramidNet

NAMES = [
    "vim_tiny_pyramid_patch16_224",
    "vim_small_pyramid_patch16_224",
    "vim_base_pyramid_patch16_224",
]
SMALL = {"img_size": 64, "embed_dim": 16, "depth": 4}
DECODERS = [smp.Unet, smp.UnetPlusPlus, smp.MAnet, smp.Linknet, smp.FPN, smp.PSPNet]
DECODERS += [smp.UPerNet, smp.Segformer]


@pytest.mark.parametrize("name", NAMES)
def test_strides_are_those_of_convolutional_nets(name: str) -> None:
    net = timm.create_model(name, **SMALL, features_only=True).eval()
    assert isinstance(net, FeaturePyramidNet)
    assert net.feature_info.reduction() == [4, 8, 16, 32]
    assert net.feature_info.channels() == [16] * 4
    shapes = [tuple(one.shape) for one in net(torch.randn(2, 3, 64, 96))]
    assert shapes == [(2, 16, 16, 24), (2, 16, 8, 12), (2, 16, 4, 6), (2, 16, 2, 3)]


def test_levels_read_the_depths_from_shallow_to_deep() -> None:
    net = timm.create_model(NAMES[0], **{**SMALL, "depth": 8}, features_only=True).eval()
    images = torch.randn(2, 3, 64, 64)
    maps = net.model.forward_intermediates(images, [1, 3, 5, 7], intermediates_only=True)
    torch.testing.assert_close(net(images)[2], maps[2])
    torch.testing.assert_close(net(images)[3], torch.nn.functional.max_pool2d(maps[3], 2))


def test_levels_can_be_chosen_and_nothing_else_is_kept() -> None:
    net = timm.create_model(NAMES[0], **SMALL, features_only=True, out_indices=(0, 2)).train()
    net.set_grad_checkpointing()
    maps = net(torch.randn(2, 3, 64, 64))
    assert net.feature_info.reduction() == [4, 16]
    assert [one.shape[-1] for one in maps] == [16, 4]
    sum(one.mean() for one in maps).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    assert len(net.model.blocks) == 3


def test_without_features_only_it_is_the_classifier() -> None:
    torch.manual_seed(0)
    model = timm.create_model(NAMES[0], **SMALL).eval()
    torch.manual_seed(0)
    plain = timm.create_model("vim_tiny_patch16_224", **SMALL).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(images), plain(images))


def test_published_weights_are_those_of_the_plain_names() -> None:
    pyramid = timm.get_pretrained_cfg("vim_tiny_pyramid_patch16_224.hustvl_in1k")
    plain = timm.get_pretrained_cfg("vim_tiny_patch16_224.hustvl_in1k")
    assert pyramid.hf_hub_id == plain.hf_hub_id
    assert pyramid.hf_hub_filename == plain.hf_hub_filename


def test_too_few_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="reads 4 depths of a model; got one with 3: take depth=4"):
        timm.create_model(NAMES[0], **{**SMALL, "depth": 3}, features_only=True)


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.__name__)
def test_decoders_of_segmentation_models_pytorch_take_it(decoder) -> None:
    encoder = {"img_size": 64, "embed_dim": 16}
    model = decoder("tu-vim_tiny_pyramid_patch16_224", encoder_weights=None, classes=2, **encoder)
    masks = model.train()(torch.randn(2, 3, 64, 64))
    assert masks.shape == (2, 2, 64, 64)
    masks.mean().backward()
    assert model.encoder.model.model.patch_embedding.weight.grad is not None
