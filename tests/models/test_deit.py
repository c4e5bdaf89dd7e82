"""DeiT with patches that overlap."""

import pytest
import torch

from visionmamba.models import DeiTConfig, SegmenterConfig

pytestmark = pytest.mark.once

SMALL = {"image_size": 32, "patch_size": 8, "d_model": 16, "depth": 2, "num_heads": 2}


def small(**options) -> DeiTConfig:
    return DeiTConfig(**{**SMALL, "num_classes": 3, **options})


def test_overlapping_patches_have_the_parameters_of_plain_ones_and_more_positions():
    plain, overlapping = (small(stride=stride).build().state_dict() for stride in (8, 4))
    assert small(stride=4).grid == (7, 7)
    assert overlapping["pos_embed"].shape == (1, 50, 16) and plain["pos_embed"].shape == (1, 17, 16)
    shapes = [
        {name: tensor.shape for name, tensor in state.items() if name != "pos_embed"}
        for state in (plain, overlapping)
    ]
    assert shapes[0] == shapes[1]


@torch.no_grad()
def test_every_second_patch_at_half_the_stride_is_a_plain_one():
    plain, overlapping = small().build(), small(stride=4).build()
    overlapping.patch_embed.load_state_dict(plain.patch_embed.state_dict())
    images = torch.randn(2, 3, 32, 48)
    tokens = overlapping.patch_embed(images)
    assert tokens.shape == (2, 7, 11, 16)
    torch.testing.assert_close(tokens[:, ::2, ::2], plain.patch_embed(images))


@torch.no_grad()
def test_overlapping_patches_give_logits_and_maps_at_any_fitting_size():
    model = small(stride=4).build().eval()
    for size, grid in (((32, 32), (7, 7)), ((36, 8), (8, 1)), ((8, 60), (1, 14))):
        images = torch.randn(1, 3, *size)
        assert model(images).shape == (1, 3)
        (features,) = model.features(images, [1])
        assert features.shape == (1, 16, *grid)


def test_segmenter_on_overlapping_patches_gives_scores_of_every_pixel():
    config = SegmenterConfig(backbone=small(stride=4), num_classes=2, head="segmenter")
    assert config.stride == 4
    assert config.build().eval()(torch.randn(1, 3, 50, 37)).shape == (1, 2, 50, 37)


def test_wrong_strides_and_sizes_are_refused():
    with pytest.raises(ValueError, match="stride must be an int from 1 to patch_size, 8; got 9"):
        small(stride=9)
    with pytest.raises(ValueError, match="image side 34x32 does not fit patches of 8 at stride 4"):
        small(stride=4).build()(torch.zeros(1, 3, 34, 32))
