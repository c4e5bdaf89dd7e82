"""Segmenters: logits at every pixel of any picture, no idle parameter, published totals, files."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from visionmamba import Vim, load, optimize, save
from visionmamba.models import DeiTConfig, SegmenterConfig, VimConfig, read_header
from visionmamba.models.mask_transformer import MaskTransformer
from visionmamba.models.segmentation import SegmentationModel, read_maps

pytestmark = pytest.mark.once

VIM = VimConfig(image_size=64, d_model=32, depth=4, patch_size=8, readout="mean")
DEIT = DeiTConfig(image_size=64, d_model=32, depth=4, patch_size=8, num_heads=2)
BACKBONES = pytest.mark.parametrize("backbone", [VIM, DEIT], ids=["vim", "deit"])
HEADS = pytest.mark.parametrize("head", ["upernet", "segmenter"])
CLOSE = 1e-5  # float32 rounding of logits of order 1


def small(**options) -> SegmenterConfig:
    return SegmenterConfig(**{"backbone": VIM, "num_classes": 5, **options})


@BACKBONES
@HEADS
def test_logits_are_those_of_every_pixel(backbone, head):
    model = small(backbone=backbone, head=head).build()
    logits, auxiliary = model(torch.randn(2, 3, 50, 71))
    assert logits.shape == (2, 5, 50, 71)
    assert (auxiliary is None) == (head == "segmenter")
    assert auxiliary is None or auxiliary.shape == logits.shape
    assert model.eval()(torch.randn(1, 3, 33, 40)).shape == (1, 5, 33, 40)


@BACKBONES
def test_pictures_of_any_size_are_padded_with_zeros(backbone):
    model = small(backbone=backbone).build().eval()
    images = torch.randn(1, 3, 50, 71)
    padded = model(F.pad(images, (0, 25, 0, 14)))
    torch.testing.assert_close(model(images), padded[..., :50, :71], rtol=CLOSE, atol=CLOSE)


@BACKBONES
@HEADS
@pytest.mark.parametrize("features", ["residual", "normed"])
def test_every_parameter_gets_a_gradient(backbone, head, features):
    model = small(backbone=backbone, head=head, features=features).build()
    logits = model(torch.randn(2, 3, 64, 64))
    sum(one.square().mean() for one in logits if one is not None).backward()
    assert [name for name, one in model.named_parameters() if one.grad is None] == []


@pytest.mark.parametrize("readout", ["middle", "head", "double"])
@pytest.mark.parametrize("bidirectional", ["none", "sequence", "layer", "ssm", "ssm+conv"])
def test_every_way_of_two_directions_is_segmented(bidirectional, readout):
    backbone = replace(VIM, bidirectional=bidirectional, readout=readout)
    model = small(backbone=backbone, features="mixer", last_features="residual").build()
    logits, auxiliary = model(torch.randn(2, 3, 32, 40))
    (logits.square().mean() + auxiliary.square().mean()).backward()
    assert [name for name, one in model.named_parameters() if one.grad is None] == []


def test_maps_are_of_the_kinds_that_the_published_code_reads():
    model = small(features="mixer", last_features="normed").build().eval()
    images = torch.randn(1, 3, 64, 64)
    maps = read_maps(model.backbone, images, model.layers, model.kinds)
    for i in range(3):
        alone = model.backbone.features(images, [i], kind="mixer")[0]
        torch.testing.assert_close(maps[i], alone)
    stream = model.backbone.features(images, [3])[0].permute(0, 2, 3, 1)
    normed = stream * (stream.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(maps[3].permute(0, 2, 3, 1), normed, rtol=1e-4, atol=1e-4)


def test_overlapping_patches_are_centred_on_their_cells():
    backbone = replace(VIM, patch_size=16, stride=8, position_embedding="none")
    model = small(backbone=backbone).build().eval()
    picture = torch.zeros(1, 3, 64, 64)
    picture[..., 24:40, 24:40] = 1  # symmetric around the middle
    (tokens,) = read_maps(model.backbone, picture, [0], ["residual"])
    assert tokens.shape == (1, 32, 8, 8)
    weight, bias = model.backbone.patch_embedding.weight, model.backbone.patch_embedding.bias
    expected = F.conv2d(picture, weight, bias, stride=8, padding=4)
    (mixed,) = read_maps(model.backbone, picture, [0], ["mixer"])
    torch.testing.assert_close(tokens - mixed, expected, rtol=1e-4, atol=1e-4)


def num_parameters(backbone) -> int:
    with torch.device("meta"):
        model = SegmenterConfig(backbone=backbone, num_classes=150).build()
    return sum(one.numel() for one in model.parameters())


def test_vim_tiny_has_the_published_parameters_but_for_an_idle_norm():
    config = VimConfig.tiny(image_size=1024, readout="mean")
    assert num_parameters(config) + config.d_model == 12_901_100


def test_deit_tiny_has_the_published_parameters_but_for_idle_norm_and_classifier():
    config = DeiTConfig.tiny(image_size=1024)
    idle = 2 * config.d_model + (config.d_model + 1) * 1000
    assert num_parameters(config) + idle == 11_663_892


def test_dropout_comes_right_before_the_classifiers():
    model = small(dropout=0.5).build()
    for head in (model.decode_head, model.auxiliary_head):
        classifier = head.classifier
        nn.init.ones_(classifier.weight)
        kept = classifier(torch.ones(8, classifier.in_channels, 2, 2))
        assert len(kept.unique()) > 1  # another number of channels in every picture
        assert (kept == kept[..., :1, :1]).all()  # whole channels
        classifier.eval()
        assert len(classifier(torch.ones(8, classifier.in_channels, 2, 2)).unique()) == 1


def test_every_batch_norm_can_be_synchronised():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small().build())
    assert not [one for one in model.modules() if isinstance(one, nn.BatchNorm2d)]
    pool = model.decode_head.psp_modules.blocks[0]
    assert isinstance(pool.layers[1].batch_norm, nn.SyncBatchNorm)  # what the head really runs


def test_copy_shares_nothing_with_the_model():
    model = small().build().eval()
    images = torch.randn(1, 3, 64, 64)
    twin, logits = copy.deepcopy(model), model(images)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(twin(images), logits, rtol=0, atol=0)


def test_upernet_refuses_to_train_on_a_single_picture():
    with pytest.raises(ValueError, match="UperNet needs at least 2 pictures a step and device"):
        small().build()(torch.randn(1, 3, 64, 64))


def test_segmenter_head_trains_on_a_single_picture():
    logits, _ = small(head="segmenter").build()(torch.randn(1, 3, 64, 64))
    assert logits.shape == (1, 5, 64, 64)


def test_mask_transformer_compares_patches_with_class_tokens():
    head = MaskTransformer(8, 16, 3, depth=1, dropout=0.0).eval()
    nn.init.zeros_(head.layers[0].attn.proj.weight)  # no attention: tokens keep to themselves
    nn.init.zeros_(head.layers[0].mlp.fc2.weight)
    features = torch.randn(1, 8, 2, 3)
    tokens = head.norm(head.projection(features.flatten(2).transpose(1, 2)))[0]
    classes = head.norm(head.class_tokens)[0]
    cosine = F.cosine_similarity(
        head.patch_projection(tokens)[:, None], head.class_projection(classes)[None], dim=-1
    )
    expected = F.layer_norm(cosine, (3,)).T.reshape(1, 3, 2, 3)
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-4)


def test_mask_transformer_attends_between_patches_and_classes():
    head = MaskTransformer(8, 16, 3, dropout=0.0).eval()
    features = torch.randn(1, 8, 2, 3)
    changed = features.clone()
    changed[..., 0, 0] += 1
    assert ((head(features) - head(changed)).abs() > 1e-6).all()


@BACKBONES
@HEADS
def test_saved_segmenter_is_the_same(backbone, head, tmp_path):
    backbone = replace(backbone, image_size=(64, 32))
    config = small(backbone=backbone, head=head, channels=24, last_features="normed")
    model = config.build().eval()
    details = {"palette": [[1, 2, 3]]}
    names = ("sky", "road", "car", "tree", "sign")
    save(model, tmp_path / "w.safetensors", class_names=names, details=details)
    loaded = load(tmp_path / "w.safetensors", device="cpu")
    assert isinstance(loaded, SegmentationModel) and loaded.config == config
    assert not loaded.training
    header = loaded.header
    assert (header.task, header.architecture) == ("segmentation", "segmenter")
    assert (header.class_names, header.details) == (names, details)
    images = torch.randn(1, 3, 40, 50)
    torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)


def test_folder_of_a_segmenter_says_what_it_is(tmp_path):
    save(small().build(), tmp_path / "w", class_names=("a", "b", "c", "d", "e"))
    card = (tmp_path / "w" / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card
    assert "# Vision Mamba (Vim), 32 wide, with UperNet" in card
    assert "5 classes: a, b, c, d, e, at every pixel" in card
    header = json.loads((tmp_path / "w" / "config.json").read_text())
    assert header["config"]["backbone"]["architecture"] == "vim"
    assert read_header(tmp_path / "w").task == "segmentation"


def test_classifiers_file_has_no_details(tmp_path):
    save(VIM.build(), tmp_path / "w")
    assert "details" not in json.loads((tmp_path / "w" / "config.json").read_text())
    assert read_header(tmp_path / "w").details == {}


def test_classes_must_all_be_named(tmp_path):
    with pytest.raises(ValueError, match="class_names must name the model's 5 classes; got 2"):
        save(small().build(), tmp_path / "w.safetensors", class_names=("a", "b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vim"}, "damaged visionmamba header"),
        ({"backbone": {"architecture": "resnet"}}, "damaged visionmamba header"),
        ({"backbone": {"architecture": "vim", "d_modl": 3}}, "VimConfig has no option 'd_modl'"),
        ({"head": ["upernet"]}, "cannot be built: head must be 'upernet' or 'segmenter'"),
        ({"num_classes": 6}, r"does not fit its model: .*classifier.* must be \(6"),
    ],
)
def test_header_that_does_not_hold_is_refused(changes, message, tmp_path):
    path = tmp_path / "w.safetensors"
    save(small().build(), path)
    header = read_header(path).to_dict()
    header["config"] |= changes
    save_file(load_file(path), path, metadata={"visionmamba": json.dumps(header)})
    with pytest.raises(ValueError, match=message):
        load(path)


def test_segmenter_is_no_classifier(tmp_path):
    save(small().build(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="holds a segmenter and a classifier was wanted"):
        Vim.from_pretrained(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": "fcn"}, ValueError, "head must be 'upernet' or 'segmenter'; got 'fcn'"),
        ({"features": "raw"}, ValueError, "features must be one of 'residual', 'mixer', 'normed'"),
        ({"last_features": "raw"}, ValueError, "last_features must be one of"),
        ({"num_classes": 0}, ValueError, "num_classes must be an int of at least 1; got 0"),
        ({"channels": 0}, ValueError, "channels must be an int of at least 1; got 0"),
        ({"dropout": 1}, ValueError, "dropout must be at least 0 and below 1; got 1"),
        ({"backbone": {}}, TypeError, "backbone must be a VimConfig or a DeiTConfig"),
        ({"backbone": replace(VIM, patch_size=32)}, ValueError, "stride 4, 8 or 16 px; got 32"),
        ({"backbone": replace(VIM, stride=16)}, ValueError, "patches of 8 px at stride 16 leave"),
        ({"backbone": DEIT, "features": "mixer"}, ValueError, '"mixer" is for a Vim'),
        ({"feature": "mixer"}, TypeError, "SegmenterConfig has no option 'feature'"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        small(**options)


def test_pictures_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"images must be \(batch, 3, height, width\); got"):
        small().build()(torch.randn(3, 64, 64))


def test_optimized_segmenter_gives_the_same_logits():
    model = small(features="mixer").build().eval()
    images = torch.randn(1, 3, 50, 71)
    torch.testing.assert_close(optimize(model)(images), model(images), rtol=CLOSE, atol=CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("features", ["mixer", "residual", "normed"])
@pytest.mark.parametrize("size", [(64, 64), (50, 71)])
def test_gpu_gives_the_logits_of_the_cpu(features, size):
    model = small(features=features).build().eval()
    images = torch.randn(2, 3, *size)
    expected = model(images)
    on_gpu = copy.deepcopy(model).cuda()
    torch.testing.assert_close(on_gpu(images.cuda()).cpu(), expected, rtol=1e-2, atol=1e-2)
    fast = optimize(on_gpu, dtype=torch.bfloat16)
    for _ in range(2):  # recorded, then replayed
        actual = fast(images.cuda()).float().cpu()
        assert (actual - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.gpu
@HEADS
def test_gpu_trains_under_bfloat16(head):
    model = small(head=head).build().cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = model(torch.randn(2, 3, 50, 71, device="cuda"))
    assert logits[0].dtype == torch.float32
    sum(one.square().mean() for one in logits if one is not None).backward()
    assert all(one.grad.isfinite().all() for one in model.parameters())
