"""The fused mixer's order of operations, with plain PyTorch in place of every kernel: no GPU."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from visionmamba.models.mixer import BidirectionalMixer
from visionmamba.ops.causal_conv1d import causal_conv1d_backward_torch, causal_conv1d_torch
from visionmamba.ops.cuda import mixer
from visionmamba.ops.cuda.pack import PARAMETERS, PackedMixer, sizes_of_mixer
from visionmamba.ops.selective_scan.chunked import (
    selective_scan_backward_chunked,
    selective_scan_chunked,
)

FLOAT64_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 1e-6  # x_weight gets its gradient in a buffer of float32
BATCH, LENGTH, D_MODEL, RANK, SCALE = 2, 11, 16, 3, 0.5


def conv_forward(x, weight, bias, reverses, silu):
    return torch.stack(
        [causal_conv1d_torch(x, weight[i], bias[i], reverses[i], silu) for i in (0, 1)]
    )


def conv_backward(dus, x, weight, bias, reverses, silu, *, dx):
    rows = [
        causal_conv1d_backward_torch(dus[i], x, weight[i], bias[i], reverses[i], silu)
        for i in (0, 1)
    ]
    dx.copy_(rows[0][0] + rows[1][0])
    return dx, *(torch.stack([row[k] for row in rows]) for k in (1, 2))


def gate_forward(y, z, scale, *, keep_sum):
    total = y[0] + y[1]
    if not keep_sum:
        return scale * total * F.silu(z)
    y[0] = total
    y[1] = scale * total * F.silu(z)
    return y[1]


def gate_backward(dgated, total, z, scale, *, dz):
    sigmoid = torch.sigmoid(z)
    dz.copy_(dgated * scale * total * sigmoid * (1 + z * (1 - sigmoid)))
    return dgated * scale * F.silu(z)


def scan_arguments(u, projected, dt_weight, dt_bias, A, D, rank, i):
    dt_r, B, C, _ = torch.split(
        projected[i], [rank, 16, 16, projected.shape[-1] - rank - 32], dim=-1
    )
    dt = dt_r @ dt_weight[i, :, :rank].T
    return dt_r, (u[i], dt, A[i], B, C, D[i], None, dt_bias[i], None, True, i == 1)


def mixer_scan_forward(*tensors, rank, out, states):
    ys = [selective_scan_chunked(*scan_arguments(*tensors, rank, i)[1], None)[0] for i in (0, 1)]
    return out.copy_(torch.stack(ys))


def mixer_scan_backward(dscan, *tensors, rank, states):
    rows = []
    for i in (0, 1):
        dt_r, given = scan_arguments(*tensors, rank, i)
        du, ddt, dA, dB, dC, dD, _, ddt_bias, _ = selective_scan_backward_chunked(
            dscan, None, *given
        )
        dprojected = torch.cat([ddt @ tensors[2][i, :, :rank], dB, dC], dim=-1)
        dprojected = F.pad(dprojected, (0, tensors[1].shape[-1] - dprojected.shape[-1]))
        rows.append((du, dprojected, torch.einsum("ble,blr->er", ddt, dt_r), ddt_bias, dA, dD))
    return tuple(torch.stack(pair) for pair in zip(*rows, strict=True))


def weight_gradient(dy, x, *, out=None):
    product = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return product if out is None else out.copy_(product)


@pytest.fixture
def without_kernels(monkeypatch):
    stand_ins = (
        conv_forward,
        conv_backward,
        gate_forward,
        gate_backward,
        mixer_scan_forward,
        mixer_scan_backward,
        weight_gradient,
    )
    for function in stand_ins:
        monkeypatch.setattr(mixer, function.__name__, function)
    monkeypatch.setattr(mixer, "supports_conv_project", lambda *_: False)
    monkeypatch.setattr(mixer, "make_context_current", lambda _: None)
    monkeypatch.setattr(mixer, "num_kept_states", lambda *_: 0)


def make_case():
    torch.manual_seed(0)
    module = BidirectionalMixer(D_MODEL, dt_rank=RANK).double()
    hidden = torch.randn(BATCH, LENGTH, D_MODEL, dtype=torch.float64, requires_grad=True)
    return module, hidden, pack_by_hand(module.parameters_to_fuse())


@torch.no_grad()
def pack_by_hand(parameters):
    sizes = sizes_of_mixer(parameters)
    named = SimpleNamespace(**dict(zip(PARAMETERS, parameters, strict=True)))
    missing = sizes.projected_width - named.x_weight_f.shape[0], sizes.padded_rank - RANK
    half = [named.in_weight, named.out_weight]
    half += [F.pad(w, (0, 0, 0, missing[0])) for w in (named.x_weight_f, named.x_weight_b)]
    half += [F.pad(w, (0, missing[1])) for w in (named.dt_weight_f, named.dt_weight_b)]
    single = [-named.A_log_f.exp(), -named.A_log_b.exp()]
    single += [
        getattr(named, f"{name}_{side}")
        for name in ("conv_weight", "conv_bias", "dt_bias", "D")
        for side in ("f", "b")
    ]
    flat = [torch.cat([one.flatten() for one in group]) for group in (half, single)]
    assert tuple(map(len, flat)) == sizes.packed_sizes
    return PackedMixer(sizes, *flat)


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("keep", [False, True])
def test_values_equal_the_separate_ops(without_kernels, keep):
    module, hidden, packed = make_case()
    with torch.no_grad():
        out, *_ = mixer.mixer_forward(hidden, packed, scale=SCALE, keep=keep)
        assert relative_error(out, module(hidden)) < FLOAT64_TOLERANCE


def test_gradients_equal_the_separate_ops(without_kernels):
    module, hidden, packed = make_case()
    dout = torch.randn_like(hidden)
    given = [hidden, *module.parameters_to_fuse()]
    expected = torch.autograd.grad(module(hidden), given, dout)
    with torch.no_grad():
        _, *kept = mixer.mixer_forward(hidden, packed, scale=SCALE, keep=True)
        dhidden, din, *pairs, dout_weight = mixer.mixer_backward(
            dout, hidden, packed, *kept, scale=SCALE
        )
    actual = [dhidden, din, *(one for pair in pairs for one in pair.unbind(0)), dout_weight]
    for name, one, other in zip(("hidden", *PARAMETERS), actual, expected, strict=True):
        assert relative_error(one, other) < FLOAT32_TOLERANCE, name
