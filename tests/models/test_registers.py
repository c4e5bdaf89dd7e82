"""Readout "registers": where they stand, what is read of them, and that every other part holds."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import visionmamba
from tests.models.published import golden_case
from visionmamba import Vim, VimConfig, load_published
from visionmamba.models import DetectorConfig, SegmenterConfig, load_backbone, save
from visionmamba.models.config import Bidirectional
from visionmamba.models.embed import register_positions
from visionmamba.training.optimizer import OptimizerConfig

CONFIG = VimConfig(
    image_size=(24, 40),
    patch_size=8,
    d_model=24,
    depth=2,
    num_classes=5,
    readout="registers",
    num_registers=4,
)
SAME = 1e-12  # float64 rounding
CLOSE = 1e-5  # float32 rounding through the blocks


def drawn(config: VimConfig) -> Vim:
    """Returns a model of which no parameter is left at a value that hides mistakes."""
    model = Vim(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def runs_between(positions: tuple[int, ...], num_patches: int) -> list[int]:
    ends = [-1, *positions, num_patches + len(positions)]
    return [after - before - 1 for before, after in pairwise(ends)]


@pytest.mark.parametrize("num_registers", range(1, 18))
def test_runs_of_patches_are_even_and_the_same_from_either_end(num_registers: int) -> None:
    for num_patches in range(220):
        positions = register_positions(num_patches, num_registers)
        runs = runs_between(positions, num_patches)
        assert len(runs) == num_registers + 1
        assert sum(runs) == num_patches
        assert 0 <= min(runs) <= max(runs) <= min(runs) + 1
        if num_registers % 2 and num_patches % 2:  # the middle run's neighbour is the longer one
            half = (num_registers + 1) // 2
            assert runs[half] == runs[half - 1] + 1
            runs[half] -= 1
        assert runs == runs[::-1]


def test_twelve_registers_among_the_patches_of_224_px() -> None:
    runs = runs_between(register_positions(196, 12), 196)
    assert runs == [15] * 6 + [16] + [15] * 6


def test_one_register_stands_where_the_middle_class_token_does() -> None:
    assert [register_positions(n, 1) for n in (15, 16)] == [(7,), (8,)]


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("size", [(24, 40), (17, 39)])
def test_logits_are_those_of_a_sequence_built_by_hand(norm: str, size: tuple[int, int]) -> None:
    model = drawn(replace(CONFIG, norm=norm, image_size=size)).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    patches, _ = model.patch_embedding(images)
    assert patches.shape[1] == 15
    assert model.class_token is not None and model.position_embedding is not None
    assert isinstance(model.head, nn.Linear) and model.register_readout is not None
    stand = [*"ppprppprppprppprppp"]  # 15 patches in five even runs
    patch_rows, register_rows = iter(patches.unbind(1)), iter(model.class_token[0].unbind(0))
    sequence: list[Tensor] = []
    for kind in stand:
        row = next(patch_rows) if kind == "p" else next(register_rows).expand(2, -1)
        sequence.append(row + model.position_embedding.weight[0, len(sequence)])
    stream = torch.stack(sequence, dim=1)
    for block in model.blocks:
        assert isinstance(block, visionmamba.VimBlock)
        stream = stream + block.mixer(normalised(stream, block.norm))
    tokens = normalised(stream, model.norm)
    reduction = model.register_readout.reduction.weight
    assert reduction.shape == (6, 24)
    parts = [tokens[:, i] @ reduction.T for i, kind in enumerate(stand) if kind == "r"]
    read = normalised(torch.cat(parts, dim=1), model.register_readout.norm)
    expected = read @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), expected, rtol=SAME, atol=SAME)


def normalised(x: Tensor, norm: nn.Module) -> Tensor:
    """Returns both norms written out in float64."""
    weight, bias, eps = norm.weight, norm.bias, norm.eps
    assert isinstance(weight, Tensor) and isinstance(eps, float)
    if bias is None:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    assert isinstance(bias, Tensor)
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


@pytest.mark.parametrize("bidirectional", ["none", "sequence", "layer", "ssm", "ssm+conv"])
def test_every_register_and_parameter_is_learned_from(bidirectional: Bidirectional) -> None:
    model = drawn(replace(CONFIG, bidirectional=bidirectional)).train()
    model(torch.randn(2, 3, 24, 40)).square().sum().backward()
    assert [name for name, one in model.named_parameters() if one.grad is None] == []
    assert model.class_token is not None and model.class_token.grad is not None
    assert (model.class_token.grad.abs().sum(dim=-1) > 0).all()


def test_flipped_sequences_are_read_in_the_order_of_the_registers() -> None:
    config = replace(CONFIG, bidirectional="sequence", sequence_flip_probability=1.0)
    flipped = drawn(config)
    for block in flipped.blocks:
        block.mixer.out_proj.weight.data.zero_()  # type: ignore[union-attr]
    straight = Vim(replace(config, sequence_flip_probability=0.0)).eval()
    straight.load_state_dict(flipped.state_dict())
    images = torch.randn(2, 3, 24, 40)
    torch.testing.assert_close(flipped(images), straight(images))


def test_recomputed_blocks_give_the_same_gradients() -> None:
    model, images = drawn(CONFIG).train(), torch.randn(2, 3, 24, 40)
    plain = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    model.activation_checkpointing = True
    again = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_maps_hold_patches_alone() -> None:
    model, images = drawn(CONFIG), torch.randn(2, 3, 24, 40)
    (found,) = model.features(images, [1], kind="normed")
    rows = [row for i, row in enumerate(model.forward_features(images).unbind(1)) if (i + 1) % 4]
    assert found.shape == (2, 24, 3, 5)
    torch.testing.assert_close(found.flatten(2), torch.stack(rows, dim=2))


def test_saved_models_and_other_sizes(tmp_path: Path) -> None:
    model, images = drawn(CONFIG), torch.randn(2, 3, 33, 70)
    save(model, tmp_path / "vim.safetensors")
    loaded = Vim.from_pretrained(tmp_path / "vim.safetensors")
    assert loaded.config == CONFIG
    assert torch.equal(loaded(images), model(images))
    larger = Vim.from_pretrained(tmp_path / "vim.safetensors", image_size=(33, 70))
    torch.testing.assert_close(larger(images), model(images), rtol=CLOSE, atol=CLOSE)


def test_without_a_head_the_readout_is_returned() -> None:
    model = drawn(replace(CONFIG, num_classes=0))
    assert model(torch.randn(2, 3, 24, 40)).shape == (2, 24)


@pytest.mark.parametrize("value", [0, -3, 2.0, True])
def test_wrong_numbers_of_registers_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match="num_registers must be an int of at least 1; got"):
        replace(CONFIG, num_registers=value)


def test_numbers_that_do_not_divide_the_width_are_refused_with_one_that_does() -> None:
    with pytest.raises(ValueError, match=r"must divide d_model 64.*got 12: take 8, or another d"):
        VimConfig(d_model=64, readout="registers")
    VimConfig(d_model=64)  # no other readout looks at it


def test_published_rotation_refuses_registers() -> None:
    with pytest.raises(ValueError, match='rope_layout="grid"'):
        drawn(replace(CONFIG, rope="tokens", rope_layout="published"))(torch.randn(1, 3, 24, 40))
    drawn(replace(CONFIG, rope="tokens+residual"))(torch.randn(1, 3, 24, 40))


def test_registers_are_not_decayed_and_learn_as_embeddings_do() -> None:
    model, optimizer = Vim(CONFIG), OptimizerConfig(layer_decay=0.5)
    decayed, exempt = optimizer.groups(model)
    assert {"class_token", "register_readout.norm.weight"} <= set(exempt)
    assert "register_readout.reduction.weight" in decayed
    scales = optimizer.layer_scales(model)
    assert scales["class_token"] == scales["position_embedding.weight"] == 0.5**3
    assert scales["register_readout.reduction.weight"] == scales["head.weight"] == 1


@pytest.mark.parametrize("wanted", ["middle", "double", "mean"])
@pytest.mark.parametrize("num_registers", [1, 2, 4])
def test_registers_are_dropped_but_never_taken_for_class_tokens(
    wanted: str, num_registers: int, tmp_path: Path
) -> None:
    save(drawn(replace(CONFIG, num_registers=num_registers)), tmp_path / "vim.safetensors")
    if wanted == "mean":
        model = Vim.from_pretrained(tmp_path / "vim.safetensors", readout="mean")
        assert f"{num_registers} register(s) dropped for readout 'mean'" in str(model.load_report)
        assert model(torch.randn(1, 3, 24, 40)).shape == (1, 5)
        return
    with pytest.raises(ValueError, match=rf"needs \d class token.* holds {num_registers} register"):
        Vim.from_pretrained(tmp_path / "vim.safetensors", readout=wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_registers", [1, 4])
def test_class_tokens_are_never_taken_for_registers(num_registers: int, tmp_path: Path) -> None:
    save(drawn(replace(CONFIG, readout="middle")), tmp_path / "vim.safetensors")
    options = {"readout": "registers", "num_registers": num_registers}
    with pytest.raises(ValueError, match=r"needs \d register\(s\) and .* holds 1 class token"):
        Vim.from_pretrained(tmp_path / "vim.safetensors", **options)  # type: ignore[arg-type]


def test_segmenters_and_detectors_hold_no_readout_and_start_from_one_another(
    tmp_path: Path,
) -> None:
    classifier = drawn(replace(CONFIG, depth=4, image_size=32))
    save(classifier, tmp_path / "classifier.safetensors")
    vim = replace(classifier.config, image_size=(32, 64))
    segmenter = SegmenterConfig(backbone=vim, num_classes=3, channels=8).build().train()
    load_backbone(segmenter, tmp_path / "classifier.safetensors")
    assert not [name for name in segmenter.state_dict() if "register_readout" in name]
    logits = segmenter(torch.randn(2, 3, 32, 64))
    (logits[0] if isinstance(logits, tuple) else logits).sum().backward()
    token = segmenter.backbone.class_token
    assert token.grad is not None and torch.equal(token, classifier.class_token)
    save(segmenter, tmp_path / "segmenter.safetensors")
    small = {"head": "mask", "channels": 8, "box_width": 8}
    detector = DetectorConfig(backbone=vim, num_classes=2, **small).build()  # type: ignore[arg-type]
    load_backbone(detector, tmp_path / "segmenter.safetensors")
    assert torch.equal(detector.backbone.class_token, classifier.class_token)
    again = Vim(replace(vim, num_classes=0))
    load_backbone(again, tmp_path / "segmenter.safetensors")
    assert again(torch.randn(1, 3, 32, 64)).shape == (1, 24)


def test_timm_reads_registers_and_its_feature_nets_leave_no_parameter_unused() -> None:
    options = {
        "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_classes": 5,
        "readout": "registers", "num_registers": 4,
    }  # fmt: skip
    model, images = timm.create_model("vim_tiny_patch16_224", **options), torch.randn(2, 3, 32, 32)
    plain = Vim(model.config)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(images), plain.eval()(images))
    assert model.forward_features(images).shape == (2, 4 + 16, 24)
    with pytest.raises(ValueError, match="must be one of 'token', '' with readout 'registers'"):
        model.reset_classifier(3, "avg")
    for kind in ("getter", "list", "dict", "hook", "fx", "pyramid"):
        net = timm.create_model(
            "vim_tiny_patch16_224", features_only=True, feature_cls=kind, **options
        )
        maps = net(images)
        maps = list(maps.values()) if isinstance(maps, dict) else maps
        sum(one.mean() for one in maps).backward()
        unused = [name for name, one in net.named_parameters() if one.grad is None]
        assert unused == [], kind


def test_exports_and_runs_on_the_meta_device() -> None:
    model, images = drawn(CONFIG), torch.randn(2, 3, 24, 40)
    program = torch.export.export(model, (images,), strict=False)
    torch.testing.assert_close(program.module()(images), model(images))
    with torch.device("meta"):
        assert Vim(CONFIG)(torch.empty(2, 3, 24, 40)).shape == (2, 5)


def test_parameters_of_vim_tiny_with_registers() -> None:
    with torch.device("meta"):
        model = VimConfig.tiny(readout="registers").build()
    assert sum(one.numel() for one in model.parameters()) == 7_148_008 + 7_488


def test_published_weights_are_refused(tmp_path: Path) -> None:
    _, weights, _, _, _ = golden_case("v2_mid_div2")
    with pytest.raises(ValueError, match=r"readout 'registers' needs 1 register.* holds 1 class"):
        load_published(weights, readout="registers", num_registers=1)
