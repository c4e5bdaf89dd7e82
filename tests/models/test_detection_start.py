"""Detectors that start from the weights of classifiers."""

import pytest
import torch

from tests.models.published import golden_case
from visionmamba import load_published, save
from visionmamba.models import DeiTConfig, DetectorConfig, VimConfig, load_backbone

pytestmark = pytest.mark.once

VIM = VimConfig(image_size=32, patch_size=8, d_model=16, depth=2, num_classes=5)
DEIT = DeiTConfig(image_size=32, patch_size=8, d_model=16, depth=2, num_heads=2, num_classes=5)


def detector(backbone, **options):
    small = {"num_classes": 2, "head": "mask", "channels": 8, "box_width": 8}
    return DetectorConfig(backbone=backbone, **small, **options).build()


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_vim_reads_the_features_of_its_classifier(tmp_path, suffix):
    classifier, model = VIM.build(), detector(VIM)
    save(classifier, tmp_path / f"weights{suffix}")
    report = load_backbone(model, tmp_path / f"weights{suffix}")
    images = torch.randn(2, 3, 32, 32)
    (expected,) = classifier.features(images, [1])
    torch.testing.assert_close(model.backbone.features(images, [1])[0], expected)
    assert report.changes == ("head of 5 classes dropped",)


@torch.no_grad()
def test_vim_without_class_token_at_another_size_keeps_the_rows_of_patches(tmp_path):
    classifier = VIM.build()
    model = detector(VimConfig(**{**vars(VIM), "image_size": 64, "readout": "mean"}))
    classifier.position_embedding.weight.fill_(3.0)
    classifier.position_embedding.weight[:, 8] = 100.0  # of the class token, in the middle
    save(classifier, tmp_path / "weights")
    report = load_backbone(model, tmp_path / "weights")
    rows = model.backbone.position_embedding.weight
    torch.testing.assert_close(rows, torch.full((1, 64, 16), 3.0))
    assert "class token dropped for readout 'mean'" in report.changes
    assert "position embedding resized from (4, 4) to (8, 8) patches" in report.changes


@torch.no_grad()
def test_vim_starts_from_a_file_of_its_authors(tmp_path):
    _, state, images, _, _ = golden_case("v2_mid_div2")
    torch.save({"model": state}, tmp_path / "vim.pth")
    published = load_published(tmp_path / "vim.pth")
    model = detector(published.config)
    load_backbone(model, tmp_path / "vim.pth")
    last = [len(published.blocks) - 1]
    expected = published.features(images, last)[0]
    torch.testing.assert_close(model.backbone.features(images, last)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("is_ours", [True, False])
def test_deit_starts_without_class_token_with_windows(tmp_path, is_ours):
    classifier = DEIT.build()
    classifier.pos_embed.fill_(3.0)
    classifier.pos_embed[:, 0] = 100.0  # of the class token
    path = tmp_path / ("weights.safetensors" if is_ours else "deit.pth")
    if is_ours:
        save(classifier, path)
    else:
        torch.save({"model": classifier.state_dict()}, path)
    larger = DeiTConfig(**{**vars(DEIT), "image_size": 48})
    model = detector(larger, window_size=2, num_global=1)
    report = load_backbone(model, path)
    torch.testing.assert_close(model.backbone.pos_embed, torch.full((1, 36, 16), 3.0))
    loaded = model.backbone.blocks[1].attn.qkv.weight
    assert torch.equal(loaded, classifier.blocks[1].attn.qkv.weight)
    assert report.changes == ("position embedding resized from (4, 4) to (6, 6) patches",)


def test_weights_of_another_kind_are_refused(tmp_path):
    save(VIM.build(), tmp_path / "vim.safetensors")
    save(DEIT.build(), tmp_path / "deit.safetensors")
    with pytest.raises(ValueError, match="holds a Vim and the detector's backbone is a DeiT"):
        load_backbone(detector(DEIT), tmp_path / "vim.safetensors")
    with pytest.raises(ValueError, match="holds a DeiT"):
        load_backbone(detector(VIM), tmp_path / "deit.safetensors")


def test_weights_of_another_size_are_refused(tmp_path):
    save(DEIT.build(), tmp_path / "deit.safetensors")
    wider = DeiTConfig(**{**vars(DEIT), "d_model": 32})
    with pytest.raises(ValueError, match=r"does not fit its model: .* must be \("):
        load_backbone(detector(wider), tmp_path / "deit.safetensors")
    heads = DeiTConfig(**{**vars(DEIT), "num_heads": 4})
    with pytest.raises(ValueError, match="has num_heads 2 and the detector's backbone has 4"):
        load_backbone(detector(heads), tmp_path / "deit.safetensors")
    torch.save({"model": {"pos_embed": torch.zeros(1, 8, 16)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is no published DeiT"):
        load_backbone(detector(DEIT), tmp_path / "other.pth")
