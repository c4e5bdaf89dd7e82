"""Weights on disk: whole or not at all, described by their header, hostile files refused."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from visionmamba import VimConfig, load, save
from visionmamba.models import DeiTConfig, read_header
from visionmamba.models.weights import FORMAT_VERSION, resolve_device

VIM = VimConfig(image_size=32, patch_size=8, d_model=16, depth=2, num_classes=3)
DEIT = DeiTConfig(
    image_size=(32, 16), patch_size=8, d_model=16, depth=1, num_heads=2, num_classes=3
)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "vim.safetensors"
    save(VIM.build(), path, class_names=("a", "b", "c"), preprocessing={"image_size": [32, 32]})
    return path


@pytest.mark.parametrize("config", [VIM, DEIT])
def test_saved_model_comes_back_bit_for_bit(config, tmp_path):
    model, path = config.build().eval(), tmp_path / "w.safetensors"
    save(model, path, class_names=("a", "b", "c"))
    loaded = load(path, device="cpu")
    images = torch.randn(1, 3, 32, 16)
    assert not loaded.training and loaded.config == config
    assert torch.equal(loaded(images), model(images))


def test_header_describes_the_model(weights):
    header = read_header(weights)
    assert header.task == "classification" and header.architecture == "vim"
    assert header.class_names == ("a", "b", "c")
    assert header.preprocessing == {"image_size": [32, 32]}
    assert VimConfig(**header.config) == VIM
    assert load(weights, device="cpu").header == header


def test_saving_over_a_file_leaves_no_temporary_one(weights):
    save(VIM.build(), weights)
    assert os.listdir(weights.parent) == [weights.name]


def test_failed_save_keeps_the_old_file(weights, monkeypatch):
    before = weights.read_bytes()

    def full_disk(*_args, **_options):
        raise OSError("no space left on device")

    monkeypatch.setattr("visionmamba.models.weights.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save(VIM.build(), weights)
    assert weights.read_bytes() == before and os.listdir(weights.parent) == [weights.name]


def test_wrong_number_of_class_names_is_refused(tmp_path):
    with pytest.raises(ValueError, match="3 classes; got 2"):
        save(VIM.build(), tmp_path / "w.safetensors", class_names=("a", "b"))


def test_only_our_models_are_saved(tmp_path):
    with pytest.raises(TypeError, match=r"takes a Vim, .* or a detector; got Linear"):
        save(torch.nn.Linear(1, 1), tmp_path / "w.safetensors")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        save(VIM.build(), tmp_path / "nowhere" / "w.safetensors")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors is missing"):
        load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_truncated_file_is_refused(weights, kept):
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"not a whole safetensors file.*again"):
        load(weights)


def rewrite(path, **changes):
    header = json.loads(json.dumps(read_header(path).__dict__))
    metadata = {"visionmamba": json.dumps({**header, **changes})}
    save_file(load_file(path), path, metadata=metadata)


def test_newer_format_is_refused_with_the_remedy(weights):
    rewrite(weights, format_version=FORMAT_VERSION + 1, package_version="9.1")
    with pytest.raises(ValueError, match=r"format 2, written by visionmamba 9\.1.*--upgrade"):
        load(weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "x"}, "damaged visionmamba header"),
        ({"architecture": "resnet"}, "damaged visionmamba header"),
        ({"surprise": 1}, "damaged visionmamba header"),
        ({"class_names": None}, "damaged visionmamba header"),
        ({"details": [1]}, "damaged visionmamba header"),
        ({"config": []}, "damaged visionmamba header"),
        ({"config": {"d_modle": 3}}, "cannot be built: VimConfig has no option 'd_modle'"),
        ({"config": {**VIM.__dict__, "d_model": 32}}, r"does not fit its model: .* must be"),
        ({"config": {**VIM.__dict__, "depth": 3}}, "does not fit its model: it lacks blocks.2"),
    ],
)
def test_header_that_does_not_hold_is_refused(weights, changes, message):
    rewrite(weights, **changes)
    with pytest.raises(ValueError, match=message):
        load(weights)


def test_foreign_safetensors_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no visionmamba header"):
        load(tmp_path / "x.safetensors")


def test_absent_device_is_refused(weights):
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"torch finds {count} CUDA devices"):
        load(weights, device=f"cuda:{count}")


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="got 'gpu'"):
        resolve_device("gpu")


def test_folder_is_laid_out_for_the_hub(tmp_path):
    save(VIM.build(), tmp_path / "vim", class_names=("a", "b", "c"))
    assert sorted(os.listdir(tmp_path / "vim")) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "vim" / "config.json").read_text())
    header = read_header(tmp_path / "vim")
    assert config == json.loads(json.dumps(header.to_dict()))
    assert load(tmp_path / "vim", device="cpu").header == header


@pytest.mark.parametrize("config", [VIM, DEIT])
def test_card_says_what_the_model_is(config, tmp_path):
    model = config.build()
    save(model, tmp_path / "m", class_names=("a", "b", "c"))
    card = (tmp_path / "m" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: visionmamba\npipeline_tag: image-classification\n")
    assert f"- Parameters: {sum(p.numel() for p in model.parameters()):,}" in card
    assert "- Outputs: 3 classes: a, b, c" in card
    assert str(tmp_path) not in card


def test_card_that_is_there_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    save(VIM.build(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_saving_a_loaded_model_keeps_classes_and_preparation(weights, tmp_path):
    save(load(weights, device="cpu"), tmp_path / "again.safetensors")
    assert read_header(tmp_path / "again.safetensors") == read_header(weights)


def test_other_ending_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"writes safetensors; got .*: name the file w\.safetensors"
    ):
        save(VIM.build(), tmp_path / "w.pth")
    assert os.listdir(tmp_path) == []
