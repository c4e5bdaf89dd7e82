"""The task that trains a segmenter: its loss, and its metrics against torchmetrics'."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from visionmamba.data import IGNORE, PADDING, SegmentationBatch, SegmentationPreprocessing
from visionmamba.models import DeiTConfig, SegmenterConfig
from visionmamba.tasks import Inference, PixelScores, SegmentationTask, Segmenter
from visionmamba.tasks.validation import SummedValidation

pytestmark = pytest.mark.once

CLASSES = ("sky", "road", "car", "tree")
PREPROCESSING = SegmentationPreprocessing(crop_size=32)
TOLERANCE = 1e-6  # torchmetrics divides in float32


class _Colours(torch.nn.Module):
    """Scores that are the picture's channels, and a fourth; in training with an auxiliary head."""

    def __init__(self, *, has_auxiliary: bool = True) -> None:
        super().__init__()
        self._has_auxiliary = has_auxiliary

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        scores = torch.cat([images, images.mean(dim=1, keepdim=True)], dim=1)
        if not self.training:
            return scores
        return scores, 2 * scores if self._has_auxiliary else None


def task(**options: object) -> SegmentationTask:
    has_auxiliary = bool(options.pop("has_auxiliary", True))
    return SegmentationTask(
        _Colours(has_auxiliary=has_auxiliary),
        class_names=CLASSES,
        preprocessing=PREPROCESSING,
        **options,  # type: ignore[arg-type]
    )


def batch(seed: int, *, classes: int = 4, size: tuple[int, int] = (24, 20)) -> SegmentationBatch:
    """Two pictures whose masks hold some classes only, and pixels without one."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, classes, (2, *size), generator=generator)
    masks[torch.rand(2, *size, generator=generator) < 0.2] = IGNORE
    return SegmentationBatch(torch.randn(2, 3, 24, 20, generator=generator), masks, torch.arange(2))


def validated(
    judged: SegmentationTask, *batches: SegmentationBatch
) -> SummedValidation[SegmentationBatch]:
    validation = judged.begin_validation()
    for one in batches:
        validation.update(one)
    return validation


def predicted(one: SegmentationBatch) -> Tensor:
    scores: Tensor = _Colours().eval()(one.images)
    return scores.argmax(dim=1)


def test_metrics_are_torchmetrics_over_the_whole_set() -> None:
    judged = task().eval()
    batches = [batch(0, classes=2), batch(1), batch(2, classes=3)]
    jaccard = MulticlassJaccardIndex(4, average="none", ignore_index=IGNORE)
    mean_jaccard = MulticlassJaccardIndex(4, ignore_index=IGNORE)
    recall = MulticlassAccuracy(4, average="none", ignore_index=IGNORE)
    overall = MulticlassAccuracy(4, average="micro", ignore_index=IGNORE)
    for one in batches:
        for metric in (jaccard, mean_jaccard, recall, overall):
            metric.update(predicted(one), one.masks)
    validation = validated(judged, *batches)
    metrics, by_class = validation.metrics(), validation.class_metrics()
    assert by_class is not None
    assert metrics["val_miou"] == pytest.approx(mean_jaccard.compute().item(), abs=TOLERANCE)
    assert metrics["val_macc"] == pytest.approx(recall.compute().mean().item(), abs=TOLERANCE)
    assert metrics["val_aacc"] == pytest.approx(overall.compute().item(), abs=TOLERANCE)
    ious = [by_class[name]["iou"] for name in CLASSES]
    accuracies = [by_class[name]["accuracy"] for name in CLASSES]
    assert ious == pytest.approx(jaccard.compute().tolist(), abs=TOLERANCE)
    assert accuracies == pytest.approx(recall.compute().tolist(), abs=TOLERANCE)


def test_mean_over_pictures_would_be_another_number() -> None:
    judged = task().eval()
    batches = [batch(0, classes=2), batch(1)]
    over_set = validated(judged, *batches).metrics()["val_miou"]
    over_batches = [validated(judged, one).metrics()["val_miou"] for one in batches]
    assert abs(over_set - sum(over_batches) / 2) > 1e-3


def test_absent_classes_do_not_count_and_are_none() -> None:
    # class 0: 3 of 4 right; class 1: absent from the masks, taken once; class 2: in neither
    scores = PixelScores.of(np.array([[3, 1, 0], [0, 0, 0], [0, 0, 0]]))
    assert scores.ious == (0.75, 0.0, None)
    assert scores.accuracies == (0.75, None, None)
    assert (scores.miou, scores.macc, scores.aacc) == (0.375, 0.75, 0.75)
    jaccard = MulticlassJaccardIndex(3)
    assert jaccard(torch.tensor([0, 0, 0, 1]), torch.zeros(4).long()).item() == scores.miou


def test_pictures_without_labels_have_scores_of_zero() -> None:
    judged, one = task().eval(), batch(0)
    unlabelled = one._replace(masks=torch.full_like(one.masks, IGNORE))
    metrics = validated(judged, unlabelled).metrics()
    assert metrics == dict.fromkeys(judged.metric_names, 0.0)


def test_sums_count_beyond_what_float32_can() -> None:
    validation = validated(task().eval(), batch(0))
    assert validation.sums.dtype == torch.float64
    assert validation.sums.shape == (4 * 4 + 2,)
    before = validation.sums.clone()
    validation.sums[0] += 2.0**24
    validation.update(batch(0))
    assert validation.sums[0] == before[0] * 2 + 2.0**24


def test_metrics_before_the_first_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing is validated yet; update with a batch first"):
        task().begin_validation().metrics()


def test_padding_counts_for_nothing() -> None:
    one = batch(0)
    padded = SegmentationBatch(
        torch.cat([one.images, torch.zeros(1, 3, 24, 20)]),
        torch.cat([one.masks, torch.full((1, 24, 20), IGNORE)]),
        torch.tensor([0, 1, PADDING]),
    )
    judged = task().eval()
    torch.testing.assert_close(validated(judged, padded).sums, validated(judged, one).sums)


def test_masks_are_judged_at_their_own_size() -> None:
    sums = validated(task().eval(), batch(0, size=(48, 40))).sums
    labelled = (batch(0, size=(48, 40)).masks != IGNORE).sum()
    assert sums[-1] == sums[:-2].sum() == labelled


def test_windows_of_the_whole_size_judge_as_one_pass() -> None:
    slide = Inference(mode="slide", crop_size=32, stride=20)
    sums = validated(task(inference=slide).eval(), batch(0)).sums
    torch.testing.assert_close(sums, validated(task().eval(), batch(0)).sums)


def test_loss_is_the_mean_over_labelled_pixels_with_the_auxiliary_share() -> None:
    one = batch(0)
    is_labelled = one.masks != IGNORE
    scores, _ = _Colours().train()(one.images)
    log_p = scores.log_softmax(1).gather(1, one.masks.where(is_labelled, 0)[:, None])[:, 0]
    log_q = (2 * scores).log_softmax(1).gather(1, one.masks.where(is_labelled, 0)[:, None])[:, 0]
    main, auxiliary = -log_p[is_labelled].mean().item(), -log_q[is_labelled].mean().item()
    loss = task().train().training_loss(one).item()
    assert loss == pytest.approx(main + 0.4 * auxiliary, rel=1e-5)
    alone = task(has_auxiliary=False).train().training_loss(one).item()
    assert alone == pytest.approx(main, rel=1e-5)


def test_validation_loss_is_the_mean_over_the_set() -> None:
    judged, one = task(has_auxiliary=False), batch(0)
    loss = judged.train().training_loss(one).item()
    metrics = validated(judged.eval(), one).metrics()
    assert metrics["val_loss"] == pytest.approx(loss, rel=1e-5)


def test_batch_without_labels_costs_nothing() -> None:
    one = batch(0)
    empty = one._replace(masks=torch.full_like(one.masks, IGNORE))
    assert task().train().training_loss(empty).item() == 0


def test_metrics_are_plain_json_numbers() -> None:
    validation = validated(task().eval(), batch(0, classes=1))
    text = json.dumps([validation.metrics(), validation.class_metrics()])
    assert not any(math.isnan(value) for value in json.loads(text)[0].values())


def test_drawing_shows_up_to_four_pictures_with_both_masks() -> None:
    judged = task(palette=[(1, 2, 3), (250, 0, 0), (0, 250, 0), (0, 0, 250)]).eval()
    one = batch(0)
    drawn = judged.draw(one)
    assert drawn is not None
    assert drawn.width > 3 * 200
    assert drawn.height > 2 * 250
    colours = {colour for _, colour in drawn.crop((230, 30, 400, 200)).getcolors(1 << 20)}
    assert {(1, 2, 3), (250, 0, 0), (0, 250, 0), (0, 0, 250), (255, 255, 255)} <= colours


def test_drawing_of_padding_runs_the_model_as_any_other() -> None:
    judged, runs = task().eval(), []
    judged.model.register_forward_hook(lambda *_: runs.append(1))
    assert judged.draw(batch(0)._replace(indices=torch.full((2,), PADDING))) is None
    assert len(runs) == 1


def test_windows_alone_run_the_model_unequally_often() -> None:
    assert task().validates_evenly
    assert not task(inference=Inference(mode="slide")).validates_evenly


def test_saved_task_is_a_segmenter(tmp_path: Path) -> None:
    backbone = DeiTConfig(image_size=32, patch_size=16, d_model=32, depth=2, num_heads=1)
    model = SegmenterConfig(backbone=backbone, num_classes=4, head="segmenter").build()
    inference = Inference(mode="slide", crop_size=32, stride=21, flip=True)
    colours = [(0, 0, 9), (9, 0, 0), (0, 9, 0), (9, 9, 9)]
    saved = SegmentationTask(
        model,
        class_names=CLASSES,
        preprocessing=PREPROCESSING,
        inference=inference,
        palette=colours,
    )
    saved.save_weights(tmp_path / "w.safetensors")
    loaded = Segmenter.load(tmp_path / "w.safetensors", device="cpu")
    assert loaded.class_names == CLASSES
    assert loaded.inference == inference
    assert loaded.palette == tuple(colours)
    assert loaded.preprocessing.to_dict() == PREPROCESSING.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"palette": [(0, 0, 0)]}, "for each of the 4 classes; got 1 colours"),
        ({"palette": [(0, 0, 256)] * 4}, "three values from 0 to 255"),
        ({"auxiliary_weight": -0.1}, "auxiliary_weight must be at least 0, got -0.1"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**options)


def test_more_classes_than_eight_bits_tell_apart_are_refused() -> None:
    names = tuple(map(str, range(256)))
    with pytest.raises(ValueError, match="at most 255 classes, got 256"):
        SegmentationTask(_Colours(), class_names=names, preprocessing=PREPROCESSING)
