"""Segmentation runs: what a recipe builds and refuses, what a run leaves, and that it learns."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.recipes.segmenters import STEPS_PER_EPOCH, small_recipe
from visionmamba.data import IGNORE, MaskFolder, SegmentationPreprocessing, Shapes
from visionmamba.models import SegmentationModel, SegmenterConfig, Vim, load, read_header, save
from visionmamba.recipes import SegmentationRecipe, vim_shapes
from visionmamba.training import FitResult, fit, read_metrics
from visionmamba.training.engine import Engine

pytestmark = pytest.mark.once

KEY = "blocks.0.mixer.in_proj.weight"


def train(recipe: SegmentationRecipe, out: Path) -> FitResult:
    return fit(recipe, out, device="cpu", progress=False, checkpoint_every_steps=2)


def model_of(recipe: SegmentationRecipe) -> SegmentationModel:
    model = recipe.build().task.model
    assert isinstance(model, SegmentationModel)
    return model


def with_head(recipe: SegmentationRecipe, **options: Any) -> SegmentationRecipe:
    return replace(recipe, model=replace(recipe.model, **options))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    return train(small_recipe(ema_decay=0.9), tmp_path_factory.mktemp("segmentation") / "run")


def test_run_leaves_metrics_of_classes_and_pictures(finished: FitResult) -> None:
    rows = [row for row in read_metrics(finished.out / "metrics.csv") if "val_miou" in row]
    assert [int(row["step"]) for row in rows] == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]
    assert {"val_loss", "val_macc", "val_aacc", "val_miou_ema"} <= rows[0].keys()
    with open(finished.out / "classes.csv", newline="") as file:
        classes = list(csv.DictReader(file))
    assert [row["class"] for row in classes] == ["ground", "disc", "square", "triangle"] * 2
    mean = np.mean([float(row["iou"]) for row in classes[4:] if row["iou"]])
    assert mean == pytest.approx(finished.metrics["val_miou"], abs=1e-6)
    with Image.open(finished.out / "pictures" / "epoch_0002.png") as picture:
        assert min(picture.size) > 32


def test_weights_say_how_to_use_them(finished: FitResult) -> None:
    header = read_header(finished.out / "best_ema.safetensors")
    assert (header.task, header.architecture) == ("segmentation", "segmenter")
    assert header.class_names == ("ground", "disc", "square", "triangle")
    assert SegmentationPreprocessing.from_dict(header.preprocessing).size == (32, 32)
    assert isinstance(load(finished.out / "best.safetensors"), SegmentationModel)


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


def test_run_in_bfloat16_keeps_float32_weights(tmp_path: Path) -> None:
    recipe = small_recipe(precision="bfloat16", epochs=1, epoch_steps=2, device_batch_size=2)
    result = train(recipe, tmp_path / "run")
    state = load(result.out / "last.safetensors").state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    assert json.loads((result.out / "results.json").read_text())["passes_per_step"] == 2


def test_training_batches_are_cropped_and_padded() -> None:
    recipe = small_recipe(epoch_steps=None)
    recipe = replace(
        recipe, augmentation=replace(recipe.augmentation, min_scale=0.4, max_scale=0.5)
    )
    experiment = recipe.build()
    assert len(experiment.train_batches) == 10 // 4
    batch = next(iter(experiment.train_batches)).to("cpu")
    assert batch.images.shape == (4, 3, 32, 32)
    assert (batch.masks == IGNORE).float().mean() > 0.5


# What a run starts from.


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[Path, Vim]:
    backbone = replace(small_recipe().model.backbone, image_size=48, readout="middle")
    model = replace(backbone, num_classes=3).build()
    assert isinstance(model, Vim)
    save(model, tmp_path / "classifier.safetensors")
    return tmp_path / "classifier.safetensors", model


@pytest.fixture
def segmenter(tmp_path: Path) -> tuple[Path, SegmentationModel]:
    model = SegmenterConfig(
        backbone=small_recipe().model.backbone, num_classes=4, head="segmenter"
    ).build()
    save(model, tmp_path / "segmenter.safetensors", task="segmentation")
    return tmp_path / "segmenter.safetensors", model


def test_classifier_becomes_the_backbone(classifier: tuple[Path, Vim]) -> None:
    path, held = classifier
    backbone = model_of(with_head(small_recipe(weights=path), head="segmenter")).backbone
    assert torch.equal(backbone.get_parameter(KEY), held.get_parameter(KEY))
    assert backbone.training


def test_weights_of_another_meaning_are_told_once(classifier: tuple[Path, Vim]) -> None:
    path, _ = classifier
    recipe = small_recipe(weights=path, batch_size=8)
    turning = replace(recipe.model.backbone, rope="tokens+residual")
    recipe = with_head(recipe, head="segmenter", backbone=turning)
    with pytest.warns(
        UserWarning, match=r"backbone, but the weights are of rope='none' and run with rope='tok"
    ) as told:
        recipe.build()
    assert len(told) == 1
    recipe.build(rank=1, num_ranks=2)  # warnings are errors


def test_segmenter_goes_on_as_a_whole(segmenter: tuple[Path, SegmentationModel]) -> None:
    path, held = segmenter
    state = model_of(with_head(small_recipe(weights=path), head="segmenter")).state_dict()
    assert all(torch.equal(state[name], value) for name, value in held.state_dict().items())


def small_masks(root: Path) -> MaskFolder:
    """Pictures of two classes."""
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 36)).save(root / split / "images" / f"{number}.png")
            Image.new("L", (40, 36), number % 2).save(root / split / "masks" / f"{number}.png")
    (root / "classes.txt").write_text("cat\ndog\n")
    return MaskFolder(root=root)


def test_segmenter_of_other_classes_is_refused_but_for_its_backbone(
    segmenter: tuple[Path, SegmentationModel], tmp_path: Path
) -> None:
    path, held = segmenter
    recipe = small_recipe(weights=path, data=small_masks(tmp_path / "pets"))
    recipe = with_head(recipe, head="segmenter")
    message = r"holds a segmenter of 4 classes and the data have 2; take its backbone alone, by"
    with pytest.raises(ValueError, match=message):
        recipe.build()
    model = model_of(replace(recipe, backbone_only=True))
    assert torch.equal(model.backbone.get_parameter(KEY), held.backbone.get_parameter(KEY))
    assert model.num_classes == 2


# What it refuses.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda: small_recipe(preprocessing=SegmentationPreprocessing(crop_size=(64, 32))),
            r"model\.backbone\.image_size \(32, 32\) and preprocessing\.crop_size \(64, 32\) must",
        ),
        (lambda: small_recipe(epoch_steps=0), "epoch_steps must be at least 1 or None, got 0"),
        (lambda: small_recipe(backbone_only=True), "backbone_only says what to take of weights"),
        (lambda: small_recipe(epochs=0), "epochs must be at least 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(change: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change()


def test_finished_run_of_other_classes_is_left_alone(finished: FitResult, tmp_path: Path) -> None:
    recipe = small_recipe(ema_decay=0.9, data=small_masks(tmp_path / "pets"))
    before = (finished.out / "last.ckpt").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"class_names is \['ground', .*\['cat', 'dog'\] here"):
        train(recipe, finished.out)
    assert (finished.out / "last.ckpt").stat().st_mtime_ns == before


# That it learns.


def miou_after(num_steps: int, out: Path, *, shuffled: bool) -> float:
    """Mean IoU on the drawn set of one block and a head, a fourth of the recipe's depth."""
    recipe = vim_shapes()
    backbone = replace(recipe.model.backbone, depth=1)
    recipe = replace(
        recipe,
        data=Shapes(num_train=384, num_val=64, shuffled=shuffled),
        model=replace(recipe.model, backbone=backbone, auxiliary_channels=0),
        optimizer=replace(recipe.optimizer, lr=4e-3, warmup_steps=10),
        epochs=1,
        epoch_steps=num_steps,
        batch_size=8,
    )
    return train(recipe, out).metrics["val_miou"]


@pytest.mark.slow
def test_vim_learns_shapes(tmp_path: Path) -> None:
    assert miou_after(240, tmp_path / "run", shuffled=False) > 0.9


@pytest.mark.slow
def test_vim_learns_nothing_from_shuffled_masks(tmp_path: Path) -> None:
    assert miou_after(100, tmp_path / "run", shuffled=True) < 0.5
