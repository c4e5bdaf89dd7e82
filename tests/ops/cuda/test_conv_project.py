"""Convolutions, SiLU and projections in one kernel against float64 on the GPU."""

import pytest
import torch

from visionmamba.ops.causal_conv1d import causal_conv1d_torch
from visionmamba.ops.cuda.conv_project import conv_project, supports_conv_project

pytestmark = pytest.mark.gpu

# Results are rounded to 8 or 11 significant bits; the projection also sums rounded terms.
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
SHAPES = [(2, 1), (3, 2), (1, 3), (2, 4), (5, 5), (3, 33), (70, 197), (600, 9), (1, 6085)]


def make_inputs(batch, length, *, channels=384, width=48, taps=4, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(length)

    def normal(*size):
        return torch.randn(size, generator=generator, device="cuda")

    x = normal(batch, length, 2 * channels).to(dtype)[..., :channels]
    weight = (normal(2, width, channels) * channels**-0.5).to(dtype)
    return x, normal(2, channels, taps) / 2, normal(2, channels), weight


def in_float64(x, conv_weight, conv_bias, weight):
    u = torch.stack(
        [
            causal_conv1d_torch(
                x.double(), conv_weight[d].double(), conv_bias[d].double(), bool(d), True
            )
            for d in (0, 1)
        ]
    )
    return u, u.to(x.dtype).double() @ weight.double().transpose(1, 2)[:, None]


def assert_match_float64(inputs):
    tolerance = TOLERANCE[inputs[0].dtype]
    for name, actual, expected in zip(
        ("u", "projected"), conv_project(*inputs), in_float64(*inputs), strict=True
    ):
        error = float((actual.double() - expected).norm() / expected.norm())
        assert error < tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_match_float64(shape, dtype):
    assert_match_float64(make_inputs(*shape, dtype=dtype))


@pytest.mark.parametrize("taps", [2, 3])
def test_fewer_taps_match_float64(taps):
    assert_match_float64(make_inputs(3, 50, taps=taps))


@pytest.mark.parametrize("width", [8, 40])
def test_narrower_projections_match_float64(width):
    assert_match_float64(make_inputs(3, 50, width=width))


def test_views_of_some_tokens_are_read_in_place():
    x, *parameters = make_inputs(3, 70)
    assert_match_float64((x[:, 3:60], *parameters))


def test_images_do_not_leak_into_each_other():
    x, *parameters = make_inputs(5, 61)
    together = conv_project(x, *parameters)[0]
    for i in range(5):
        assert torch.equal(together[:, i], conv_project(x[i : i + 1], *parameters)[0][:, 0])


def test_offsets_beyond_31_bits():
    length, last = 2_900_000, 500
    x, *parameters = make_inputs(1, length)
    u, projected = conv_project(x, *parameters)
    u_last, projected_last = conv_project(x[:, -last:], *parameters)
    assert torch.equal(u[:, :, 3 - last :], u_last[:, :, 3:])
    torch.testing.assert_close(projected[:, :, 3 - last :], projected_last[:, :, 3:])


def test_what_it_does_not_take_is_declined():
    x, conv_weight, _, weight = make_inputs(2, 4096)
    assert supports_conv_project(x, conv_weight, weight)
    declined = (
        (x[:, :9], conv_weight, weight),
        (x.float(), conv_weight, weight.float()),
        (x[..., 2:], conv_weight[:, 2:], weight[..., 2:]),
        (x.transpose(1, 2).contiguous().transpose(1, 2), conv_weight, weight),
        (x, conv_weight.repeat(1, 1, 2), weight),
        (x, conv_weight, weight[:, :41]),
    )
    for inputs in declined:
        assert not supports_conv_project(*inputs)
