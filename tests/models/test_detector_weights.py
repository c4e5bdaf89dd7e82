"""Detectors on disk: the same model back, described by its header and its card."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from visionmamba import load, save
from visionmamba.models import DeiTConfig, DetectionModel, DetectorConfig, VimConfig, read_header
from visionmamba.models.weights import config_of

pytestmark = pytest.mark.once

VIM = VimConfig(image_size=64, d_model=16, depth=2, readout="mean")
DEIT = DeiTConfig(image_size=(64, 32), d_model=16, depth=2, num_heads=2)
NAMES = ("mug", "spoon")


def small(backbone=VIM, **options):
    sizes = {"channels": 8, "box_width": 8, "anchor_sizes": (4, 8, 16, 32, 64), **options}
    return DetectorConfig(backbone=backbone, num_classes=2, num_proposals=20, **sizes)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [small(), small(DEIT, head="mask", window_size=2, num_global=1, max_detections=7)],
    ids=["cascade on a vim", "mask on a deit with windows"],
)
def test_saved_detector_is_the_same(config, tmp_path):
    model, details = config.build().eval(), {"category_ids": [3, 9]}
    save(model, tmp_path / "w.safetensors", class_names=NAMES, details=details)
    loaded = load(tmp_path / "w.safetensors", device="cpu")
    assert isinstance(loaded, DetectionModel) and loaded.config == config
    assert not loaded.training
    assert loaded.header is not None
    assert (loaded.header.task, loaded.header.architecture) == ("detection", "detector")
    assert (loaded.header.class_names, loaded.header.details) == (NAMES, details)
    images = [torch.randn(3, 48, 40)]
    for name, tensor in model(images)[0].items():
        assert torch.equal(loaded(images)[0][name], tensor)


def test_folder_of_a_detector_says_how_to_use_it(tmp_path):
    save(small().build(), tmp_path / "w", class_names=NAMES)
    card = (tmp_path / "w" / "README.md").read_text()
    assert "pipeline_tag: object-detection" in card
    assert "# Vision Mamba (Vim), 16 wide, with Cascade Mask R-CNN" in card
    assert 'Detector.load("path/to/this/folder")("picture.jpg")' in card
    assert "2 classes: mug, spoon, with a box and a mask each" in card
    header = json.loads((tmp_path / "w" / "config.json").read_text())
    assert header["config"]["backbone"]["architecture"] == "vim"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vim"}, "damaged visionmamba header"),
        ({"backbone": {"architecture": "detector"}}, "damaged visionmamba header"),
        ({"window_size": 14}, "cannot be built: window_size 14 is for a DeiT"),
        ({"colour": 1}, "cannot be built: DetectorConfig has no option 'colour'"),
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


def test_detector_is_no_classifier(tmp_path):
    save(small().build(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"holds a detector and a classifier .* Detector\.load"):
        config_of(read_header(tmp_path / "w.safetensors"), tmp_path / "w.safetensors")
