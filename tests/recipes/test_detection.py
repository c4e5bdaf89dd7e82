"""Detection runs: what a recipe builds and refuses, what a run leaves, and how it goes on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes.detectors import STEPS_PER_EPOCH, folder_in_coco_format, small_recipe
from visionmamba.data import Coco, DetectionPreprocessing
from visionmamba.models import (
    DeiTConfig,
    DetectionModel,
    DetectorConfig,
    SegmenterConfig,
    Vim,
    load,
    read_header,
    save,
)
from visionmamba.recipes import DetectionRecipe, deit_nuclei, vim_large_objects, vim_nuclei
from visionmamba.recipes.objects import vim_objects
from visionmamba.training import FitResult, fit, read_metrics
from visionmamba.training.engine import Engine

pytestmark = pytest.mark.once

KEY = "blocks.0.mixer.in_proj.weight"


def train(recipe: DetectionRecipe, out: Path) -> FitResult:
    return fit(recipe, out, device="cpu", progress=False, checkpoint_every_steps=2)


def model_of(recipe: DetectionRecipe) -> DetectionModel:
    model = recipe.build().task.model
    assert isinstance(model, DetectionModel)
    return model


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    return train(small_recipe(ema_decay=0.9), tmp_path_factory.mktemp("detection") / "run")


def test_run_leaves_average_precisions_of_boxes_and_masks(finished: FitResult) -> None:
    rows = [row for row in read_metrics(finished.out / "metrics.csv") if "val_mask_ap" in row]
    assert [int(row["step"]) for row in rows] == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]
    assert {"val_box_ap", "val_box_ap50", "val_box_small", "val_mask_ap75"} <= rows[0].keys()
    assert "val_mask_ap_ema" in rows[0]
    assert "val_box_large" not in rows[0]  # no object of a picture of 32 px is
    header = (finished.out / "classes.csv").read_text().splitlines()[0]
    assert header == "step,epoch,class,box_ap,mask_ap,box_ap_ema,mask_ap_ema"
    assert (finished.out / "pictures" / "epoch_0002.png").is_file()


def test_weights_say_how_to_use_them(finished: FitResult) -> None:
    header = read_header(finished.out / "best_ema.safetensors")
    assert (header.task, header.architecture) == ("detection", "detector")
    assert header.class_names == ("disc", "square", "triangle")
    assert DetectionPreprocessing.from_dict(header.preprocessing).size == (32, 32)
    assert isinstance(load(finished.out / "best.safetensors"), DetectionModel)


def test_run_that_died_goes_on_bit_for_bit(
    finished: FitResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = Engine.optimizer_step

    def die(self: Engine, *given: Any) -> None:
        if self.trainer.global_step == STEPS_PER_EPOCH + 1:
            raise OSError("power cut")
        former(self, *given)

    recipe = small_recipe(ema_decay=0.9)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="power cut"):
        patch.setattr(Engine, "optimizer_step", die)
        train(recipe, tmp_path / "run")
    assert train(recipe, tmp_path / "run").metrics == finished.metrics
    for name in ("last.safetensors", "last_ema.safetensors", "metrics.csv", "classes.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (finished.out / name).read_bytes(), name


def test_step_in_several_passes(tmp_path: Path) -> None:
    recipe = small_recipe(epochs=1, epoch_steps=1, device_batch_size=2)
    result = train(recipe, tmp_path / "run")
    assert json.loads((result.out / "results.json").read_text())["passes_per_step"] == 2


def test_any_folder_in_cocos_format_takes_the_place_of_the_nuclei(tmp_path: Path) -> None:
    recipe = small_recipe(data=Coco(root=folder_in_coco_format(tmp_path / "own")))
    experiment = recipe.build()
    assert experiment.data_summary["class_names"] == ["disc", "square", "triangle"]
    batch = next(iter(experiment.train_batches)).to("cpu")
    assert [image.shape for image in batch.images] == [(3, 32, 32)] * 4


# What a run starts from.


def test_classifier_becomes_the_backbone(tmp_path: Path) -> None:
    backbone = replace(small_recipe().model.backbone, image_size=48, readout="middle")
    held = replace(backbone, num_classes=3).build()
    assert isinstance(held, Vim)
    save(held, tmp_path / "classifier.safetensors")
    found = model_of(small_recipe(weights=tmp_path / "classifier.safetensors")).backbone
    assert torch.equal(found.get_parameter(KEY), held.get_parameter(KEY))
    assert found.training


def test_segmenter_gives_its_backbone(tmp_path: Path) -> None:
    config = SegmenterConfig(
        backbone=small_recipe().model.backbone, num_classes=4, head="segmenter"
    )
    held = config.build()
    save(held, tmp_path / "segmenter.safetensors", task="segmentation")
    found = model_of(small_recipe(weights=tmp_path / "segmenter.safetensors")).backbone
    assert torch.equal(found.get_parameter(KEY), held.backbone.get_parameter(KEY))


def test_detector_goes_on_as_a_whole(finished: FitResult) -> None:
    state = model_of(small_recipe(weights=finished.out / "best.safetensors")).state_dict()
    held = load(finished.out / "best.safetensors").state_dict()
    assert all(torch.equal(state[name], value) for name, value in held.items())


def test_detector_of_other_classes_is_refused_but_for_its_backbone(tmp_path: Path) -> None:
    recipe = small_recipe()
    held = replace(recipe.model, num_classes=5).build()
    path = tmp_path / "five.safetensors"
    save(held, path, task="detection")
    recipe = replace(recipe, weights=path)
    message = r"holds a detector of 5 classes and the data have 3; take its backbone alone, by"
    with pytest.raises(ValueError, match=message):
        recipe.build()
    model = model_of(replace(recipe, backbone_only=True))
    assert torch.equal(model.backbone.get_parameter(KEY), held.backbone.get_parameter(KEY))
    assert model.num_classes == 3


# What it refuses.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda: small_recipe(preprocessing=DetectionPreprocessing(image_size=(64, 32))),
            r"model\.backbone\.image_size \(32, 32\) and preprocessing\.image_size \(64, 32\) must",
        ),
        (lambda: small_recipe(epoch_steps=0), "epoch_steps must be at least 1 or None, got 0"),
        (lambda: small_recipe(backbone_only=True), "backbone_only says what to take of weights"),
    ],
)
def test_what_makes_no_sense_is_refused(change: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change()


def test_boxes_without_masks_are_refused(tmp_path: Path) -> None:
    root = folder_in_coco_format(tmp_path / "boxes", masks=False)
    with pytest.raises(ValueError, match="have boxes but no masks, which this detector learns"):
        small_recipe(data=Coco(root=root)).build()


# What the recipes promise.


def test_vim_and_deit_of_the_nuclei_differ_in_name_and_backbone_only() -> None:
    vim, deit = vim_nuclei(), deit_nuclei()
    assert isinstance(deit.model.backbone, DeiTConfig)
    assert deit.model.window_size is None
    assert replace(deit, name=vim.name, model=vim.model) == vim
    assert replace(deit.model, backbone=vim.model.backbone) == vim.model


def test_crowded_pictures_are_reported_whole() -> None:
    assert vim_nuclei().model.max_detections == 400  # the fullest picture has 375


def test_weights_make_the_nuclei_learn_at_a_fifth() -> None:
    new, old = vim_nuclei().optimizer, vim_nuclei(weights="some.safetensors").optimizer
    assert old.lr == pytest.approx(new.lr / 5)
    assert (new.layer_decay, old.layer_decay) == (None, 0.9)


def test_every_large_object_counts_as_large() -> None:
    pictures = replace(vim_large_objects().data, num_train=2, num_val=3).open("val")
    for index in range(3):
        objects = pictures.objects(index)
        assert objects.areas[0] > 96**2


def test_small_detector_is_small() -> None:
    recipe = vim_objects()
    assert isinstance(recipe.model, DetectorConfig)
    count = sum(parameter.numel() for parameter in recipe.model.build().parameters())
    assert count < 1_000_000
