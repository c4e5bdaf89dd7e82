"""Models start from weights of every kind, with class tokens and positions in their places."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.models.published import golden_case
from tests.models.test_load_published import save_checkpoint
from visionmamba import load_published, save
from visionmamba.models import (
    DeiTConfig,
    DetectorConfig,
    SegmenterConfig,
    VimConfig,
    load_backbone,
    load_detector,
    load_segmenter,
)
from visionmamba.models.embed import resize_grid
from visionmamba.models.weights import read_metadata

pytestmark = pytest.mark.once

VIM = VimConfig(image_size=32, d_model=32, depth=4, patch_size=8, num_classes=3)
DEIT = DeiTConfig(image_size=32, d_model=32, depth=4, patch_size=8, num_heads=2, num_classes=3)


def segmenter(backbone, **options):
    return SegmenterConfig(backbone=backbone, num_classes=5, **options).build().eval()


def detector(backbone, *, num_classes=2, **options):
    small = {"head": "mask", "channels": 8, "box_width": 8, **options}
    return DetectorConfig(backbone=backbone, num_classes=num_classes, **small).build().eval()


@pytest.fixture
def published(tmp_path):
    """The authors' checkpoint of 64 px and 4 blocks, its class token in the middle."""
    _, weights, images, _, _ = golden_case("v2_mid_div2")
    path = save_checkpoint(tmp_path / "vim.pth", weights)
    return path, weights, images, load_published(path).config


def test_published_weights_give_the_same_maps(published):
    path, _, images, config = published
    model = segmenter(config)
    report = load_backbone(model, path)
    expected = load_published(path).features(images, [0, 1, 2, 3])
    actual = model.backbone.features(images, [0, 1, 2, 3])
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    assert "head of 10 classes dropped" in report.changes


def test_middle_class_token_is_dropped_with_its_own_row(published):
    path, weights, _, config = published
    model = segmenter(replace(config, readout="mean"))
    report = load_backbone(model, path)
    rows = weights["pos_embed"]  # 16 patches around the token
    assert torch.equal(
        model.backbone.position_embedding.weight, torch.cat((rows[:, :8], rows[:, 9:]), dim=1)
    )
    assert "class token dropped for readout 'mean'" in report.changes


@pytest.mark.parametrize("readout", ["middle", "mean"])
def test_rows_of_patches_are_resized_without_the_token(published, readout):
    path, weights, _, config = published
    model = segmenter(replace(config, image_size=(96, 64), readout=readout))
    load_backbone(model, path)
    rows = weights["pos_embed"]
    patches = resize_grid(torch.cat((rows[:, :8], rows[:, 9:]), dim=1), (4, 4), (6, 4))
    if readout == "middle":
        patches = torch.cat((patches[:, :12], rows[:, 8:9], patches[:, 12:]), dim=1)
    torch.testing.assert_close(model.backbone.position_embedding.weight.data, patches)


def test_average_of_the_weights_can_be_taken(published):
    path, weights, _, config = published
    model = segmenter(config, features="normed")
    load_backbone(model, path, which="model_ema")
    assert torch.equal(model.backbone.norm.weight, weights["norm_f.weight"] + 1)


def test_other_meaning_of_the_weights_is_noted(published):
    path, _, _, config = published
    report = load_backbone(segmenter(replace(config, halve_directions=False)), path)
    expected = "the weights are of halve_directions=True and run with halve_directions=False"
    assert report.notes == (expected,)
    assert expected in str(report)


@pytest.mark.parametrize("classifier", [VIM, DEIT], ids=["vim", "deit"])
@pytest.mark.parametrize("features", ["residual", "normed"])
def test_own_classifier_gives_a_segmenter_the_same_maps(classifier, features, tmp_path):
    source = classifier.build().eval()
    save(source, tmp_path / "w.safetensors")
    model = segmenter(classifier, features=features)
    head = model.decode_head.state_dict()
    load_backbone(model, tmp_path / "w.safetensors")
    images = torch.randn(1, 3, 32, 32)
    (expected,) = source.features(images, [3], kind=features)
    assert torch.equal(model.backbone.features(images, [3], kind=features)[0], expected)
    after = model.decode_head.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in head.items())


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_own_classifier_gives_a_detector_the_same_maps(suffix, tmp_path):
    source, model = VIM.build().eval(), detector(VIM)
    save(source, tmp_path / f"weights{suffix}")
    load_backbone(model, tmp_path / f"weights{suffix}")
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.backbone.features(images, [3])[0], source.features(images, [3])[0])


@pytest.mark.parametrize("classifier", [VIM, DEIT], ids=["vim", "deit"])
def test_backbone_of_a_segmenter_of_other_classes_starts_another(classifier, tmp_path):
    source = segmenter(classifier)
    save(source, tmp_path / "w.safetensors")
    config = SegmenterConfig(backbone=classifier, num_classes=2, features="normed")
    model = config.build().eval()
    load_backbone(model, tmp_path / "w.safetensors")
    images = torch.randn(1, 3, 32, 32)
    expected = source.backbone.features(images, [3])[0]
    assert torch.equal(model.backbone.features(images, [3])[0], expected)
    assert (model.backbone.norm.weight == 1).all()  # the other one had none


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_published_deit_is_resized_around_its_class_token(suffix, tmp_path):
    source, path = DEIT.build(), tmp_path / f"deit{suffix}"
    if suffix == ".pth":
        torch.save({"model": source.state_dict()}, path)
    else:
        save_file(source.state_dict(), path)
    model = segmenter(replace(DEIT, image_size=(32, 48)))
    report = load_backbone(model, path)
    patches = resize_grid(source.pos_embed[:, 1:], (4, 4), (4, 6))
    expected = torch.cat((source.pos_embed[:, :1], patches), dim=1)
    torch.testing.assert_close(model.backbone.pos_embed, expected)
    assert report.changes == ("position embedding resized from (4, 4) to (4, 6) patches",)


@pytest.mark.parametrize("is_ours", [True, False])
def test_deit_with_windows_drops_the_row_of_its_class_token(is_ours, tmp_path):
    source = DEIT.build()
    source.pos_embed.data.fill_(3.0)[:, 0] = 100.0  # of the class token
    path = tmp_path / ("weights.safetensors" if is_ours else "deit.pth")
    if is_ours:
        save(source, path)
    else:
        torch.save({"model": source.state_dict()}, path)
    model = detector(replace(DEIT, image_size=48), window_size=2, num_global=1)
    report = load_backbone(model, path)
    torch.testing.assert_close(model.backbone.pos_embed.data, torch.full((1, 36, 32), 3.0))
    loaded = model.backbone.blocks[1].attn.qkv.weight
    assert torch.equal(loaded, source.blocks[1].attn.qkv.weight)
    assert report.changes[0] == "position embedding resized from (4, 4) to (6, 6) patches"


@pytest.mark.parametrize("backbone", [replace(VIM, readout="mean"), DEIT], ids=["vim", "deit"])
def test_backbone_of_a_detector_of_other_classes_starts_another(backbone, tmp_path):
    source, model = detector(backbone), detector(backbone, num_classes=3)
    save(source, tmp_path / "w.safetensors")
    head = model.heads.state_dict()
    load_backbone(model, tmp_path / "w.safetensors")
    state = model.backbone.state_dict()
    assert all(torch.equal(state[name], t) for name, t in source.backbone.state_dict().items())
    assert all(torch.equal(model.heads.state_dict()[name], t) for name, t in head.items())


def test_class_token_that_a_detector_did_not_have_is_missed(tmp_path):
    save(detector(DEIT), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="without class token, which the backbone to start has"):
        load_backbone(segmenter(DEIT), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("held", "wanted", "message"),
    [
        (VIM, DEIT, "holds a Vim and the backbone to start is a DeiT"),
        (DEIT, VIM, "holds a DeiT and the backbone to start is a Vim"),
        (VIM, replace(VIM, depth=2), "the weights have depth 4, which loading cannot change"),
        (DEIT, replace(DEIT, depth=2), "has depth 4 and the backbone to start has 2"),
        (
            replace(VIM, readout="mean"),
            VIM,
            "readout 'middle' needs 1 class token.* holds 0 class token.*; take a readout",
        ),
    ],
)
def test_weights_that_do_not_fit_are_explained(held, wanted, message, tmp_path):
    save(held.build(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=message):
        load_backbone(segmenter(wanted), tmp_path / "w.safetensors")


def test_published_file_of_a_vim_is_no_deit(published):
    with pytest.raises(ValueError, match="is not a published DeiT 32 wide: it has no pos_embed"):
        load_backbone(segmenter(DEIT), published[0])


@pytest.mark.parametrize("shape", [(17,), (1, 17, 32, 1), (2, 17, 32), (1, 1, 32)])
@pytest.mark.parametrize("is_ours", [True, False])
def test_positions_of_another_shape_are_no_deits(shape, is_ours, tmp_path):
    path, source = tmp_path / "w.safetensors", DEIT.build()
    save(source, path)
    metadata = read_metadata(path) if is_ours else None
    save_file(source.state_dict() | {"pos_embed": torch.zeros(shape)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"DeiT 32 wide: it has no pos_embed of .* patches"):
        load_backbone(segmenter(replace(DEIT, image_size=(32, 48))), path)


def test_model_without_backbone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one Vim or DeiT inside; Linear has 0"):
        load_backbone(torch.nn.Linear(1, 1), tmp_path / "w.safetensors")


def test_segmenter_goes_on_from_all_its_weights(tmp_path):
    source, model = segmenter(VIM), segmenter(VIM)
    save(source, tmp_path / "w.safetensors", class_names=("a", "b", "c", "d", "e"))
    header = load_segmenter(model, tmp_path / "w.safetensors")
    assert header.class_names == ("a", "b", "c", "d", "e")
    state = model.state_dict()
    assert all(torch.equal(state[name], one) for name, one in source.state_dict().items())


def test_segmenter_of_another_class_count_is_refused(tmp_path):
    save(segmenter(VIM), tmp_path / "w.safetensors")
    model = SegmenterConfig(backbone=VIM, num_classes=2).build()
    with pytest.raises(ValueError, match="a segmenter of 5 classes and the data have 2; take its"):
        load_segmenter(model, tmp_path / "w.safetensors")


def test_classifier_is_no_segmenter(tmp_path):
    save(VIM.build(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="holds a classifier and a segmenter was wanted"):
        load_segmenter(segmenter(VIM), tmp_path / "w.safetensors")


def test_detector_goes_on_from_all_its_weights(tmp_path):
    source, model = detector(VIM), detector(VIM)
    save(source, tmp_path / "w.safetensors", class_names=("a", "b"))
    assert load_detector(model, tmp_path / "w.safetensors").class_names == ("a", "b")
    state = model.state_dict()
    assert all(torch.equal(state[name], one) for name, one in source.state_dict().items())


def test_detector_of_another_class_count_is_refused(tmp_path):
    save(detector(VIM), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="a detector of 2 classes and the data have 3; take its"):
        load_detector(detector(VIM, num_classes=3), tmp_path / "w.safetensors")


def test_segmenter_is_no_detector(tmp_path):
    save(segmenter(VIM), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="holds a segmenter and a detector was wanted"):
        load_detector(detector(VIM), tmp_path / "w.safetensors")
