"""The fused mixer against float64: values, every gradient, autocast, torch.compile, limits."""

import pytest
import torch

from visionmamba.models.mixer import BidirectionalMixer
from visionmamba.ops import can_fuse_mixer, fused_block, fused_mixer, pack_mixer
from visionmamba.ops.cuda.pack import PARAMETERS

pytestmark = pytest.mark.gpu

# bfloat16 rounds to 2^-9 at each of some ten steps
VALUE_TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3}
GRADIENT_TOLERANCE = 1.5e-2
TINY, SMALL, BASE = (192, 12), (384, 24), (768, 48)


def relative_error(actual, expected):
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return ((actual - expected).norm() / expected.norm()).item()


def make_mixer(sizes=TINY):
    torch.manual_seed(0)
    d_model, rank = sizes
    mixer = BidirectionalMixer(d_model, dt_rank=rank).cuda()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(parameter.bfloat16())
    return mixer


def make_hidden(batch, length, d_model=192, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, d_model, generator=generator).to("cuda", dtype)


@pytest.mark.parametrize("dtype", VALUE_TOLERANCE, ids=str)
@pytest.mark.parametrize("length", [1, 2, 63, 197, 1025, 6085])
def test_values_match_float64(length, dtype):
    mixer, hidden = make_mixer(), make_hidden(2, length, dtype=dtype)
    parameters = mixer.parameters_to_fuse()
    with torch.no_grad():
        assert can_fuse_mixer(hidden, parameters)
        actual = fused_mixer(hidden, parameters, scale=0.5)
        expected = mixer.double()(hidden.double())
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < VALUE_TOLERANCE[dtype]


@pytest.mark.parametrize(("sizes", "length"), [(TINY, 2), (TINY, 65), (SMALL, 197), (BASE, 31)])
def test_gradients_match_float64(sizes, length):
    mixer, hidden = make_mixer(sizes), make_hidden(3, length, sizes[0]).requires_grad_()
    parameters = mixer.parameters_to_fuse()
    dout = torch.randn_like(hidden)
    actual = torch.autograd.grad(
        fused_mixer(hidden, parameters, scale=0.5), [hidden, *parameters], dout
    )
    exact = mixer.double()
    given = hidden.detach().double().requires_grad_()
    expected = torch.autograd.grad(
        exact(given), [given, *exact.parameters_to_fuse()], dout.double()
    )
    for name, one, other in zip(("hidden", *PARAMETERS), actual, expected, strict=True):
        assert one.dtype == (torch.bfloat16 if name == "hidden" else torch.float32), name
        assert relative_error(one, other) < GRADIENT_TOLERANCE, name


def test_no_worse_than_separate_ops(monkeypatch):
    mixer, hidden = make_mixer(), make_hidden(2, 1025)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        fused = mixer(hidden)
        monkeypatch.setattr("visionmamba.models.mixer.can_fuse_mixer", lambda *_: False)
        separate = mixer(hidden)
    expected = mixer.double()(hidden.double())
    assert relative_error(fused, expected) < 1.1 * relative_error(separate, expected)


def test_autocast_sets_the_dtype():
    mixer, hidden = make_mixer(), make_hidden(1, 33, dtype=torch.float32).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        out = mixer(hidden)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert hidden.grad.dtype == torch.float32
    assert mixer.in_proj.weight.grad.dtype == torch.float32


def test_float32_and_float16_gradients_take_the_separate_ops():
    mixer = make_mixer()
    parameters = mixer.parameters_to_fuse()
    assert not can_fuse_mixer(make_hidden(1, 9, dtype=torch.float32), parameters)
    assert not can_fuse_mixer(make_hidden(1, 9, dtype=torch.float16), parameters)
    assert can_fuse_mixer(make_hidden(1, 9), parameters)


def test_equal_bits_when_deterministic():
    mixer, hidden = make_mixer(), make_hidden(2, 1025).requires_grad_()
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            out = fused_mixer(hidden, mixer.parameters_to_fuse(), scale=0.5)
            runs.append(torch.autograd.grad(out.float().square().sum(), mixer.parameters()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_compiles_whole():
    mixer, hidden = make_mixer(), make_hidden(2, 65)
    with torch.autocast("cuda", torch.bfloat16):
        expected = mixer(hidden)
        actual = torch.compile(mixer, fullgraph=True)(hidden)
    expected.float().sum().backward()
    gradient = mixer.in_proj.weight.grad.clone()
    mixer.zero_grad()
    actual.float().sum().backward()
    assert relative_error(actual, expected) < 1e-3
    assert relative_error(mixer.in_proj.weight.grad, gradient) < 1e-3


@pytest.mark.parametrize("sizes", [TINY, SMALL, BASE], ids=["tiny", "small", "base"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 197), (3, 1025), (3, 6085)])
def test_inference_block_matches_float64(sizes, batch, length, first):
    d_model = sizes[0]
    mixer, branch = make_mixer(sizes), make_hidden(batch, length, d_model)
    residual = None if first else make_hidden(batch, length, d_model, torch.float32) * 3
    norm_weight = torch.rand(d_model, device="cuda") + 0.5
    layer_scale = torch.rand(d_model, device="cuda")
    with torch.no_grad():
        packed = pack_mixer(mixer.parameters_to_fuse(), dtype=torch.bfloat16)
        expected_total = branch.double() if first else residual.double() + branch.double()
        out, total = fused_block(  # it may write over branch and residual
            branch, residual, norm_weight, 1e-5, packed, scale=0.5, layer_scale=layer_scale
        )
        normed = torch.nn.functional.rms_norm(expected_total, (d_model,), None, 1e-5) * norm_weight
        expected = mixer.double()(normed) * layer_scale
    assert total.dtype == torch.float32
    assert relative_error(total, expected_total) < 1e-6
    assert relative_error(out, expected) < VALUE_TOLERANCE[torch.bfloat16]


@pytest.mark.slow
def test_more_than_two_billion_elements():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 100 << 30:
        pytest.skip("needs 100 GiB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    mixer, row = make_mixer(), make_hidden(1, 700_001)
    parameters, dout = mixer.parameters_to_fuse(), torch.randn_like(row)

    def run(batch):
        hidden = row.repeat(batch, 1, 1).requires_grad_()
        out = fused_mixer(hidden, parameters, scale=0.5)
        gradients = torch.autograd.grad(out, [hidden, *parameters], dout.expand_as(out))
        return (out.detach()[-1], gradients[0][-1]), gradients[1:]

    rows, sums = run(8)
    assert rows[0].shape[0] * 384 * 8 > 1 << 31
    expected_rows, expected_sums = run(1)
    for actual, expected in zip(rows, expected_rows, strict=True):
        assert relative_error(actual, expected) < GRADIENT_TOLERANCE
    for name, actual, expected in zip(PARAMETERS, sums, expected_sums, strict=True):
        assert relative_error(actual, 8 * expected) < GRADIENT_TOLERANCE, name
