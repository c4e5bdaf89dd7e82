"""Vim as a backbone of transformers: maps, files, and UperNet with a segmenter's own weights."""

import importlib
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoBackbone, AutoConfig, UperNetConfig, UperNetForSemanticSegmentation
from transformers.utils.logging import disable_progress_bar

from visionmamba import save
from visionmamba.models import DeiTConfig, SegmenterConfig, VimConfig, load_backbone
from visionmamba.models.transformers import (
    DeiTPyramidBackboneConfig,
    VimBackbone,
    VimBackboneConfig,
    to_transformers,
)

pytestmark = pytest.mark.once

VIM = VimConfig(image_size=64, d_model=32, depth=4, readout="mean")
DEIT = DeiTConfig(image_size=64, d_model=32, depth=4, num_heads=2)
CONFIGS = pytest.mark.parametrize(
    "config",
    [VimBackboneConfig(vim=VIM), DeiTPyramidBackboneConfig(deit=DEIT)],
    ids=["vim", "deit"],
)
CLOSE = 1e-5  # float32 rounding of logits of order 1

disable_progress_bar()


def same_tensors(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()
    )


@CONFIGS
@pytest.mark.parametrize("size", [(64, 96), (50, 71), (33, 20)])
def test_maps_have_strides_4_8_16_32_rounded_up(config, size):
    backbone = AutoBackbone.from_config(config)
    maps = backbone(torch.randn(2, 3, *size)).feature_maps
    sides = [tuple(-(-side // stride) for side in size) for stride in (4, 8, 16, 32)]
    assert [tuple(one.shape) for one in maps] == [(2, 32, *each) for each in sides]
    assert backbone.channels == [32, 32, 32, 32]


def test_backbone_starts_as_a_vim_does():
    torch.manual_seed(1)
    expected = SegmenterConfig(backbone=VIM, num_classes=2).build()
    torch.manual_seed(1)
    backbone = AutoBackbone.from_config(VimBackboneConfig(vim=VIM))
    assert same_tensors(backbone.backbone, expected.backbone)  # transformers has redrawn nothing
    assert same_tensors(backbone.pyramid, expected.pyramid)


@CONFIGS
def test_saved_backbone_is_the_same(config, tmp_path):
    backbone = AutoBackbone.from_config(config)
    backbone.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).segmenter_config() == config.segmenter_config()
    assert same_tensors(type(backbone).from_pretrained(tmp_path), backbone)


def test_stages_can_be_chosen(tmp_path):
    backbone = VimBackbone(VimBackboneConfig(vim=VIM))
    backbone.save_pretrained(tmp_path)
    some = VimBackbone.from_pretrained(tmp_path, out_features=["stage2", "stage4"])
    images = torch.randn(1, 3, 64, 64)
    expected = backbone.eval()(images).feature_maps
    assert torch.equal(some(images).feature_maps[1], expected[3])
    assert len(some(images).feature_maps) == 2 and some.out_indices == [1, 3]


def test_what_a_checkpoint_lacks_starts_fresh(tmp_path, capsys):
    VimBackbone(VimBackboneConfig(vim=VIM)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {k: t for k, t in tensors.items() if "pyramid" not in k and "directions.1" not in k}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = VimBackbone.from_pretrained(tmp_path)
    capsys.readouterr()
    name = "backbone.blocks.2.mixer.in_proj.weight"
    states = torch.arange(1.0, 17.0).log().expand(64, 16)
    ssm = model.backbone.blocks[2].mixer.directions[1]
    torch.testing.assert_close(ssm.A_log.data, states)
    assert (ssm.dt_bias == 0).all() and (ssm.D == 1).all()
    assert (model.pyramid.levels[0][1].running_var == 1).all()
    assert torch.equal(model.state_dict()[name], tensors[name])


@pytest.mark.parametrize("backbone", [VIM, DEIT], ids=["vim", "deit"])
def test_upernet_has_the_logits_of_the_segmenter(backbone, tmp_path):
    model = SegmenterConfig(backbone=backbone, num_classes=5, last_features="normed").build().eval()
    upernet = to_transformers(model)
    upernet.save_pretrained(tmp_path)
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    images = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(loaded(images).logits, model(images), rtol=CLOSE, atol=CLOSE)
    assert loaded(torch.randn(1, 3, 50, 71)).logits.shape == (1, 5, 50, 71)


def test_upernet_keeps_the_names_of_classes():
    model = SegmenterConfig(backbone=VIM, num_classes=2).build()
    assert to_transformers(model).config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_upernet_trains_every_parameter():
    config = UperNetConfig(backbone_config=VimBackboneConfig(vim=VIM), hidden_size=32, num_labels=3)
    model = UperNetForSemanticSegmentation(config)
    labels = torch.randint(0, 3, (2, 50, 71))
    model(torch.randn(2, 3, 50, 71), labels=labels).loss.backward()
    assert [name for name, one in model.named_parameters() if one.grad is None] == []


def test_upernet_starts_from_a_classifier(tmp_path):
    classifier = VIM.build()
    save(classifier, tmp_path / "w.safetensors")
    config = UperNetConfig(backbone_config=VimBackboneConfig(vim=VIM), hidden_size=32, num_labels=3)
    model = UperNetForSemanticSegmentation(config)
    load_backbone(model, tmp_path / "w.safetensors")
    expected = classifier.blocks[3].mixer.in_proj.weight
    assert torch.equal(model.backbone.backbone.blocks[3].mixer.in_proj.weight, expected)


def test_backbones_own_maps_are_returned_on_request():
    backbone = VimBackbone(VimBackboneConfig(vim=VIM)).eval()
    images = torch.randn(1, 3, 64, 64)
    own = backbone(images, output_hidden_states=True).hidden_states
    assert torch.equal(own[3], backbone.backbone.features(images, [3])[0])
    as_tuple = backbone(images, return_dict=False)
    assert len(as_tuple) == 1 and len(as_tuple[0]) == 4


def test_wrong_options_are_named():
    with pytest.raises(TypeError, match="VimConfig has no option 'd_modl'; valid"):
        VimBackboneConfig(vim={"d_modl": 3})
    with pytest.raises(ValueError, match="features must be one of"):
        VimBackboneConfig(vim=VIM, features="raw")


def test_other_heads_stay_here():
    model = SegmenterConfig(backbone=VIM, num_classes=2, head="segmenter").build()
    with pytest.raises(ValueError, match="a head for \"upernet\" only; got 'segmenter'"):
        to_transformers(model)


def test_without_transformers_the_remedy_is_named(monkeypatch):
    for name in ("transformers", "transformers.models.upernet.modeling_upernet"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("visionmamba.models.transformers", "visionmamba.models.upernet"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    remedy = r'pip install "visionmamba\[segmentation\]"'
    with pytest.raises(ImportError, match=remedy):
        importlib.import_module("visionmamba.models.transformers")
    with pytest.raises(ImportError, match=f'{remedy}.*, or take head="segmenter"'):
        SegmenterConfig(backbone=VIM, num_classes=2).build()
    SegmenterConfig(backbone=VIM, num_classes=2, head="segmenter").build()
