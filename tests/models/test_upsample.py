"""Upsampling by products: the values and gradients of PyTorch's, in every dtype."""

import pytest
import torch
from torch.nn import functional as F

from visionmamba.models.upsample import upsample, upsample_by_products

pytestmark = pytest.mark.once

SIZES = [
    ((3, 4), (12, 16)),
    ((1, 1), (5, 7)),
    ((6, 5), (6, 5)),
    ((6, 6), (7, 20)),
    ((2, 8), (32, 8)),
]


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_products_give_the_values_and_gradients_of_interpolation(old, new):
    x = torch.randn(2, 3, *old, dtype=torch.float64, requires_grad=True)
    wanted = F.interpolate(x, size=new, mode="bilinear", align_corners=False)
    weights = torch.randn_like(wanted)
    (wanted_gradient,) = torch.autograd.grad(wanted, x, weights)
    made = upsample_by_products(x, new)
    (gradient,) = torch.autograd.grad(made, x, weights)
    torch.testing.assert_close(made, wanted)
    torch.testing.assert_close(gradient, wanted_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_float32_and_the_dtype_stays(dtype):
    x = torch.randn(2, 3, 4, 6).to(dtype)
    wanted = F.interpolate(x.float(), size=(16, 24), mode="bilinear").to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        made = [upsample(x, (16, 24)), upsample_by_products(x, (16, 24))]
    for one in made:
        assert one.dtype == dtype
        torch.testing.assert_close(one, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_training_on_a_gpu_is_as_without(dtype, format):
    x = torch.randn(4, 11, 24, 30, device="cuda").to(dtype).contiguous(memory_format=format)
    wanted = F.interpolate(x.double(), size=(384, 480), mode="bilinear")
    with torch.autocast("cuda", torch.bfloat16):
        made = upsample(x.requires_grad_(), (384, 480))
    assert made.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(made.double(), wanted, rtol=rounding, atol=4 * rounding)
