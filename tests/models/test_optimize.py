"""The optimized copy: equal outputs, frozen, several shapes, slices, and what it refuses."""

import pytest
import torch
from torch import nn

from visionmamba import VimConfig, optimize

CONFIG = VimConfig(image_size=32, patch_size=8, d_model=32, depth=2, num_classes=5)
BFLOAT16_TOLERANCE = 2e-2  # two models in bfloat16 that round at different places


def relative_error(actual, expected):
    actual, expected = actual.cpu().double(), expected.cpu().double()
    return ((actual - expected).norm() / expected.norm()).item()


def make_model(config=CONFIG):
    torch.manual_seed(0)
    return config.build()


def make_images(batch=2, side=32):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(side))


def test_same_outputs_on_the_cpu():
    model, images = make_model(), make_images()
    assert torch.equal(optimize(model)(images), model(images))


def test_outputs_need_no_gradient_and_the_original_is_left_alone():
    model = make_model()
    assert not optimize(model)(make_images()).requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training


def test_later_changes_to_the_original_do_not_show():
    model, images = make_model(), make_images()
    fast = optimize(model)
    before = fast(images)
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(fast(images), before)


def test_bfloat16_keeps_float32_where_it_counts():
    fast = optimize(make_model(), dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in fast.model.named_parameters()}
    assert dtypes["head.weight"] == torch.bfloat16
    assert dtypes["norm.weight"] == torch.float32
    assert dtypes["blocks.0.mixer.directions.0.A_log"] == torch.float32
    model, images = make_model(), make_images()
    assert relative_error(fast(images), model(images).detach()) < BFLOAT16_TOLERANCE


@pytest.mark.parametrize("kind", ["ssm", "layer"])
def test_other_mixers_run_in_bfloat16_too(kind):
    config = VimConfig(
        image_size=32, patch_size=8, d_model=32, depth=2, bidirectional=kind, layer_scale=0.5
    )
    model, images = make_model(config), make_images()
    fast = optimize(model, dtype=torch.bfloat16)
    assert relative_error(fast(images), model(images).detach()) < BFLOAT16_TOLERANCE


def test_training_it_is_refused():
    with pytest.raises(ValueError, match="train the original"):
        optimize(make_model()).train()


def test_moving_it_is_refused():
    with pytest.raises(ValueError, match="optimize that"):
        optimize(make_model()).double()


@pytest.mark.parametrize("name", ["max_shapes", "max_pixels"])
def test_bounds_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        optimize(make_model(), **{name: 0})


def test_random_flips_are_not_recorded():
    config = VimConfig(image_size=32, patch_size=8, d_model=32, depth=2, bidirectional="sequence")
    with pytest.raises(ValueError, match="cuda_graphs=False"):
        optimize(make_model(config))
    assert optimize(make_model(config), cuda_graphs=False)(make_images()).shape[0] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gpu_outputs_match_the_model_in_float64(dtype, cuda_graphs):
    model = make_model(VimConfig.tiny(num_classes=10, image_size=64)).cuda()
    fast = optimize(model, dtype=dtype, cuda_graphs=cuda_graphs)
    images = make_images(3, 64).cuda()
    expected = model.double().eval()(images.double()).detach()
    tolerance = 1e-4 if dtype == torch.float32 else BFLOAT16_TOLERANCE
    for _ in range(2):
        assert relative_error(fast(images), expected) < tolerance


@pytest.mark.gpu
def test_gpu_recordings_serve_several_shapes_in_turn():
    model = make_model(VimConfig.tiny(num_classes=10, image_size=64)).cuda().eval()
    fast = optimize(model, dtype=torch.bfloat16, max_shapes=2)
    eager = optimize(model, dtype=torch.bfloat16, cuda_graphs=False)
    kept = []
    for side, batch in ((64, 1), (96, 2), (64, 1), (48, 3), (64, 1), (96, 2)):
        images = make_images(batch, side).cuda()
        kept.append((fast(images), eager(images)))
    for actual, expected in kept:
        assert torch.equal(actual, expected)
    assert len(fast._recordings) == 2


@pytest.mark.gpu
def test_gpu_batches_run_in_slices():
    model = make_model(VimConfig.tiny(num_classes=10, image_size=64)).cuda().eval()
    images = make_images(7, 64).cuda()
    whole = optimize(model, dtype=torch.bfloat16)(images)
    sliced = optimize(model, dtype=torch.bfloat16, max_pixels=2 * 64 * 64)(images)
    assert sliced.shape == whole.shape
    assert relative_error(sliced, whole) < BFLOAT16_TOLERANCE


@pytest.mark.gpu
def test_gpu_modules_around_a_vim_return_structures():
    class Maps(nn.Module):
        def __init__(self, vim):
            super().__init__()
            self.vim = vim

        def forward(self, images):
            return {"maps": self.vim.features(images, [0, 1]), "logits": self.vim(images)}

    model = Maps(make_model(VimConfig.tiny(num_classes=10, image_size=64))).cuda().eval()
    images = make_images(2, 64).cuda()
    with torch.no_grad():
        expected = model(images)
    actual = optimize(model)(images)
    assert relative_error(actual["logits"], expected["logits"]) < 1e-4
    for one, other in zip(actual["maps"], expected["maps"], strict=True):
        assert relative_error(one, other) < 1e-4
