"""The model beyond the published numbers: sizes, features, precision, training modes."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from visionmamba import BidirectionalMixer, Vim, VimBlock, VimConfig
from visionmamba.models.embed import (
    PositionEmbedding,
    class_token_positions,
    num_class_tokens,
    rotate_tokens,
)

SMALL = {"image_size": 32, "patch_size": 8, "d_model": 16, "depth": 4, "num_classes": 5}
SAME = 1e-5  # float32 rounding through four layers


def small(**options):
    return Vim(VimConfig(**{**SMALL, **options})).eval()


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (8, 8), (64, 200)])
@pytest.mark.parametrize("readout", ["middle", "head", "double", "mean", "max", "last"])
def test_any_size_gives_logits(size, readout):
    assert small(readout=readout)(torch.randn(2, 3, *size)).shape == (2, 5)


def test_sides_that_do_not_fit_are_padded_with_zeros():
    model = small()
    images = torch.randn(1, 3, 30, 41)
    padded = nn.functional.pad(images, (0, 7, 0, 2))
    assert torch.equal(model(images), model(padded))


def test_sides_that_do_not_fit_are_refused_when_configured():
    with pytest.raises(ValueError, match=r"image side 30x41 does not fit.*32x48"):
        small(partial_patches="refuse")(torch.randn(1, 3, 30, 41))


@pytest.mark.parametrize("readout", ["middle", "head", "double", "mean"])
def test_resized_positions_keep_class_token_rows(readout):
    config = VimConfig(d_model=6, readout=readout, num_registers=3)
    positions = PositionEmbedding((4, 4), config)
    with torch.no_grad():
        positions.weight[:] = 1.0
        for position in class_token_positions(config, 16):
            positions.weight[:, position] = 7.0
    resized = positions((5, 9))
    expected = torch.ones(1, 45 + num_class_tokens(config), 6)
    for position in class_token_positions(config, 45):
        expected[:, position] = 7.0
    torch.testing.assert_close(resized, expected)


def test_resized_positions_follow_the_weights():
    positions = PositionEmbedding((4, 4), VimConfig(d_model=6))
    with torch.no_grad():
        before = positions((6, 6)).clone()
        assert positions((6, 6)) is positions((6, 6))
        positions.weight.mul_(2)
        torch.testing.assert_close(positions((6, 6)), 2 * before)


def test_resized_positions_are_learned_from():
    model = small()
    model(torch.randn(1, 3, 48, 16)).sum().backward()
    assert model.position_embedding.weight.grad.abs().sum() > 0


def test_features_are_maps_of_the_grid():
    maps = small().features(torch.randn(2, 3, 40, 24), [3, 0])
    assert [m.shape for m in maps] == [(2, 16, 5, 3), (2, 16, 5, 3)]


@pytest.mark.parametrize("readout", ["middle", "head", "double", "mean"])
def test_normed_features_of_the_last_block_are_forward_features(readout):
    model, images = small(readout=readout), torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images)
    places = class_token_positions(model.config, 16)
    kept = [i for i in range(tokens.shape[1]) if i not in places]
    expected = tokens[:, kept].transpose(1, 2).reshape(2, 16, 4, 4)
    torch.testing.assert_close(model.features(images, [3], kind="normed")[0], expected)


def test_residual_features_add_up_the_mixers():
    model, images = small(), torch.randn(2, 3, 32, 32)
    residual = model.features(images, [0, 1, 2])
    mixed = model.features(images, [1, 2], kind="mixer")
    torch.testing.assert_close(residual[1] - residual[0], mixed[0])
    torch.testing.assert_close(residual[2] - residual[1], mixed[1])


def test_features_do_not_turn_with_the_sequence():
    model = small(bidirectional="sequence", sequence_flip_probability=1, rope="tokens+residual")
    images = torch.randn(1, 3, 32, 32)
    for block in model.blocks:
        block.mixer.out_proj.weight.data.zero_()  # only the input is left, rotated four times
    turned = model.features(images, [3])[0]
    straight = Vim(replace(model.config, sequence_flip_probability=0)).eval()
    straight.load_state_dict(model.state_dict())
    assert relative_error(turned, straight.features(images, [3])[0]) < SAME


def test_flip_probability_is_honoured():
    model = small(bidirectional="sequence", sequence_flip_probability=0.5, readout="last")
    images = torch.randn(1, 3, 32, 32)
    distinct = {tuple(model(images).flatten().tolist()) for _ in range(20)}
    assert len(distinct) == 2


@pytest.mark.parametrize(
    ("layers", "options"), [([4], {}), ([-1], {}), ([0], {"bidirectional": "layer"})]
)
def test_features_of_blocks_that_do_not_exist_are_refused(layers, options):
    with pytest.raises(ValueError, match="layers must be among"):
        small(**options).features(torch.randn(1, 3, 32, 32), layers)


def test_unknown_kind_of_features_is_refused():
    with pytest.raises(ValueError, match="kind must be"):
        small().features(torch.randn(1, 3, 32, 32), [0], kind="hidden")


def test_grid_rope_depends_on_rows_and_columns_alone():
    sequence = torch.ones(1, 13, 8)
    turned = rotate_tokens(sequence, (3, 4), (6,), layout="grid", reference_grid=14)
    assert torch.equal(turned[:, 6], sequence[:, 6])  # the class token is not rotated
    patches = torch.cat((turned[:, :6], turned[:, 7:]), dim=1).reshape(3, 4, 8)
    torch.testing.assert_close(patches[:, 0, :4], patches[:, 3, :4])
    torch.testing.assert_close(patches[0, :, 4:], patches[2, :, 4:])
    assert not torch.allclose(patches[0, 0, :4], patches[2, 0, :4])


def test_published_rope_refuses_what_it_cannot_place():
    with pytest.raises(ValueError, match='rope_layout="grid"'):
        small(rope="tokens", rope_layout="published", readout="double")(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("bidirectional", ["none", "sequence", "layer", "ssm", "ssm+conv"])
def test_bfloat16_autocast_trains_without_nan(bidirectional):
    torch.manual_seed(0)
    model = small(bidirectional=bidirectional, drop_path=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_agree_with_float32(dtype):
    model, images = small(), torch.randn(2, 3, 32, 32)
    expected = model(images)
    actual = model.to(dtype)(images.to(dtype))
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < 0.05


def test_float16_inference_stays_finite_far_outside_its_range():
    model = small()
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.out_proj.weight.mul_(1e4)
            block.mixer.in_proj.weight.mul_(30)
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()
    assert model.half()(torch.randn(2, 3, 32, 32).half()).isfinite().all()


def test_residual_stream_stays_float32_under_autocast():
    block = VimBlock(BidirectionalMixer(16), 16)
    with torch.autocast("cpu", torch.bfloat16):
        branch, residual = block(torch.randn(1, 9, 16, dtype=torch.bfloat16), torch.randn(1, 9, 16))
    assert (branch.dtype, residual.dtype) == (torch.bfloat16, torch.float32)


def test_activation_checkpointing_changes_nothing_but_memory():
    images = torch.randn(2, 3, 32, 32)
    model = small(drop_path=0.3).train()
    gradients = []
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        model.zero_grad()
        torch.manual_seed(3)
        model(images).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_stochastic_depth_grows_linearly_with_depth():
    model = small(drop_path=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    rates.append(model.drop_path.drop_prob)
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.3])  # of the branch that comes in


def test_dropped_branches_leave_the_input():
    model = small(drop_path=1.0, depth=2, readout="mean").train()
    images = torch.randn(2, 3, 32, 32)
    one = model.features(images, [0])[0]
    model.blocks[1].mixer.out_proj.weight.data.fill_(1e3)
    torch.testing.assert_close(model.features(images, [0])[0], one)


def test_published_initialisation():
    torch.manual_seed(0)
    model = Vim(VimConfig.tiny(depth=6))
    mixer = model.blocks[0].mixer
    forward, backward = mixer.directions
    for ssm in (forward, backward):
        torch.testing.assert_close(ssm.A_log[3], torch.arange(1.0, 17).log())
        assert torch.equal(ssm.D, torch.ones(384))
        assert ssm.conv_weight.abs().max() <= 0.5 and ssm.conv_weight.std() > 0.25
        assert ssm.conv_bias.abs().max() <= 0.5 and ssm.conv_bias.std() > 0.25
        assert ssm.dt_weight.abs().max() <= 12**-0.5 and ssm.dt_weight.std() > 0.15
        assert ssm.x_proj.weight.abs().max() <= 384**-0.5
    steps = nn.functional.softplus(forward.dt_bias)
    assert steps.min() >= 1e-3 * 0.99 and steps.max() <= 0.1 * 1.01
    assert torch.equal(backward.dt_bias, torch.zeros(384))
    bound = 384**-0.5 / math.sqrt(6)
    assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound
    assert model.patch_embedding.weight.std().item() == pytest.approx(768**-0.5, rel=0.02)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.position_embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not model.head.bias.any() and not model.patch_embedding.bias.any()


def test_symmetric_initialisation_starts_both_directions_alike():
    backward = small(initialization="symmetric").blocks[0].mixer.directions[1]
    steps = nn.functional.softplus(backward.dt_bias)
    assert steps.min() >= 1e-3 * 0.99 and steps.max() <= 0.1 * 1.01


def test_weight_decay_exemptions_have_both_versions():
    model = small()
    assert model.no_weight_decay() == {"class_token", "position_embedding.weight"}
    extra = model.no_weight_decay(published=False) - model.no_weight_decay()
    assert len(extra) == 8 and all(name.endswith("A_log") for name in extra)


def test_mixer_and_block_work_in_other_nets():
    net = nn.Sequential(nn.Linear(3, 24), BidirectionalMixer(24, d_state=8, kind="ssm"))
    assert net(torch.randn(2, 11, 3)).shape == (2, 11, 24)
    branch, residual = VimBlock(nn.Identity(), 24)(torch.randn(2, 11, 24))
    assert branch.shape == residual.shape == (2, 11, 24)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"must be \(batch, 3, height, width\); got \(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), r"must be \(batch, 3, height, width\); got \(1, 1, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "got torch.uint8: divide by 255"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), "float64 but the model is torch.float32"),
        (torch.zeros(1, 3, 32, 32, device="meta"), "on meta but the model is on cpu"),
    ],
)
def test_wrong_pictures_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        small()(images)


def test_vim_takes_a_configuration_and_nothing_else():
    with pytest.raises(TypeError, match="takes a VimConfig"):
        Vim({"d_model": 16})


def test_compiles_as_one_graph():
    model, images = small(depth=2), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))


def test_exports():
    model, images = small(depth=2), torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (images,), strict=False)
    torch.testing.assert_close(program.module()(images), model(images))


def test_inference_writes_no_score_matrix():
    class LargestTensor(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    model = small(depth=1)
    with torch.no_grad(), LargestTensor() as largest:
        model(torch.randn(1, 3, 256, 256))  # 1025 tokens
    assert largest.numel <= 1025 * 16 * 16


def test_runs_on_the_meta_device():
    with torch.device("meta"):
        model = VimConfig(image_size=32, patch_size=8, d_model=32, depth=2, num_classes=5).build()
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 5)
