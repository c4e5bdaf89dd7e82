"""Box stages and masks against closed forms: labels, boxes, pooling, pasting."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import nn

from tests.models.drawn import draw_objects
from visionmamba.models import DeiTConfig
from visionmamba.models.boxes import Boxes, Objects
from visionmamba.models.cascade import STAGES, CascadeHeads
from visionmamba.models.instance_masks import mask_loss, mask_targets, paste_masks
from visionmamba.models.windows import WindowedDeiT, attend_in_windows

pytestmark = pytest.mark.once

SIDE_PX = 64
STRIDES = (4, 8, 16, 32)


def cascade(**options) -> CascadeHeads:
    settings = {
        "strides": STRIDES,
        "stages": STAGES,
        "channels": 8,
        "width": 8,
        "num_sampled": 16,
        "score_threshold": 0.05,
        "nms_threshold": 0.5,
        "max_detections": 100,
        "mask_threshold": 0.5,
    }
    return CascadeHeads(4, 3, **{**settings, **options})


def levels(channels: int = 4) -> list[torch.Tensor]:
    return [torch.randn(1, channels, SIDE_PX // s, SIDE_PX // s) for s in STRIDES]


def one_object() -> dict[str, torch.Tensor]:
    masks = torch.zeros(1, SIDE_PX, SIDE_PX, dtype=torch.uint8)
    masks[0, 10:30, 10:30] = 1
    boxes = torch.tensor([[10.0, 10, 30, 30]])
    return {"boxes": boxes, "labels": torch.tensor([2]), "masks": masks}


def objects_of(*targets: dict[str, torch.Tensor]) -> Objects:
    return Objects.of(*([one[name] for one in targets] for name in ("boxes", "labels")))


def alone(boxes: torch.Tensor) -> Boxes:
    """Boxes of one picture, all of which are valid."""
    return Boxes(boxes[None], torch.ones(1, len(boxes), dtype=torch.bool))


SIZE = torch.tensor([[SIDE_PX, SIDE_PX]], dtype=torch.float32)


def shrunk(*overlaps: float) -> torch.Tensor:
    """Boxes inside that of `one_object` which overlap it so much."""
    return torch.tensor([[10, 10, 30, 10 + 20 * overlap] for overlap in overlaps])


@pytest.mark.parametrize(
    ("stage", "labels"), [(0, [0, 2, 2, 2]), (1, [0, 0, 2, 2]), (2, [0, 0, 0, 2])]
)
def test_stage_takes_boxes_for_objects_from_its_own_overlap(stage, labels):
    boxes = alone(shrunk(0.45, 0.55, 0.65, 0.75))
    samples = cascade().stages[stage].label(boxes, objects_of(one_object()))
    assert samples.labels.tolist() == [labels]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_targets_of_a_stage_are_weighted_shifts_and_log_ratios(stage):
    layer = cascade().stages[stage]
    boxes = torch.tensor([[12.0, 10, 32, 30]])  # 2 px to the right
    samples = layer.label(alone(boxes), objects_of(one_object()))
    weight = STAGES[stage].weights
    expected = torch.tensor([[-2 / 20 * weight[0], 0, 0, 0]])
    _, loss = layer.losses(torch.zeros(1, 4), torch.zeros(1, 4), samples)
    assert samples.labels.tolist() == [[2]]
    torch.testing.assert_close(loss, expected.abs().sum())
    _, loss = layer.losses(torch.zeros(1, 4), expected, samples)
    torch.testing.assert_close(loss, torch.zeros(()), atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.decode(expected, boxes), one_object()["boxes"])


def test_losses_of_a_stage_are_means_over_background_too():
    layer = cascade().stages[0]
    boxes = alone(shrunk(1.0, 0.1, 0.1, 0.1, 1.0))
    boxes.valid[0, 4] = False
    samples = layer.label(boxes, objects_of(one_object()))
    logits = torch.full((5, 4), -20.0)
    logits[torch.arange(5), samples.labels[0]] = 20.0
    logits[4] = torch.tensor([-20.0, 20, 20, 20])  # a box that is none costs nothing
    loss_class, loss_box = layer.losses(logits, torch.ones(5, 4), samples)
    torch.testing.assert_close(loss_class, torch.zeros(()))
    torch.testing.assert_close(loss_box, torch.tensor(1.0))  # 4 of 1 for the object, 4 boxes


def test_picture_without_objects_has_background_only():
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    stage = cascade().stages[0]
    assert stage.label(alone(shrunk(0.9, 0.1)), objects_of(nothing)).labels.tolist() == [[0, 0]]
    both = Boxes(shrunk(0.9, 0.1).expand(2, -1, -1), torch.ones(2, 2, dtype=torch.bool))
    beside = stage.label(both, objects_of(nothing, one_object()))
    assert beside.labels.tolist() == [[0, 0], [2, 0]]


def test_first_stage_samples_a_quarter_of_objects_at_most_and_has_the_objects_among_them():
    heads, target = cascade(num_sampled=16), one_object()
    samples = heads._sample(alone(shrunk(*[0.9] * 40, *[0.1] * 40)), objects_of(target))
    assert (samples.labels > 0).sum() == 4 and samples.labels.shape == (1, 16)
    assert bool(samples.boxes.valid.all())
    samples = heads._sample(alone(torch.zeros(0, 4)), objects_of(target))
    assert samples.boxes.xyxy.tolist() == [target["boxes"].tolist()]
    assert samples.labels.tolist() == [[2]]


def test_next_stage_trains_on_the_boxes_that_the_one_before_made():
    heads, target = cascade(), one_object()
    first = heads.stages[0].label(alone(shrunk(0.55, 0.9)), objects_of(target))
    deltas = heads.stages[0].coder.encode_single(first.matched[0], first.boxes.xyxy[0])
    second = heads._next(0, deltas, first, SIZE, objects_of(target))
    torch.testing.assert_close(second.boxes.xyxy, target["boxes"].expand(1, 2, -1))
    assert second.labels.tolist() == [[2, 2]]
    _, loss = heads.stages[1].losses(torch.zeros(2, 4), torch.zeros(2, 4), second)
    torch.testing.assert_close(loss, torch.zeros(()), atol=1e-5, rtol=0)


def test_boxes_that_leave_the_picture_are_not_trained_on():
    heads, target = cascade(), one_object()
    first = heads.stages[0].label(alone(torch.tensor([[50.0, 50, 60, 60]])), objects_of(target))
    deltas = torch.tensor([[30.0, 0, 0, 0]])  # 3 widths to the right
    second = heads._next(0, deltas, first, SIZE, objects_of(target))
    assert second.boxes.valid.tolist() == [[False]]


class Says(nn.Module):
    """A box stage or mask head that answers what it is told."""

    def __init__(self, *answers: torch.Tensor) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, *_: torch.Tensor) -> tuple[torch.Tensor, ...] | torch.Tensor:
        return self.answers if len(self.answers) > 1 else self.answers[0]


def logits_of(labels: torch.Tensor) -> torch.Tensor:
    return 40 * nn.functional.one_hot(labels, 4).float()


@torch.no_grad()
def test_true_boxes_as_proposals_come_back_as_they_are(monkeypatch):
    heads = cascade()
    _, (target,) = draw_objects(1)
    boxes, labels = target["boxes"], target["labels"]
    for stage in heads.stages:
        said = Says(logits_of(labels), torch.zeros(len(boxes), 4))
        monkeypatch.setattr(stage, "forward", said.forward)
    drawn = mask_targets(target["masks"], boxes, torch.arange(len(boxes)), 28)
    monkeypatch.setattr(heads.mask_head, "forward", Says(40 * drawn - 20).forward)
    (found,) = heads.detect(levels(), [boxes], [(SIDE_PX, SIDE_PX)])
    torch.testing.assert_close(found["boxes"], boxes)
    assert torch.equal(found["labels"], labels)
    torch.testing.assert_close(found["scores"], torch.ones(2))
    assert torch.equal(found["masks"], target["masks"].bool())


@torch.no_grad()
def test_scores_are_the_mean_of_the_stages(monkeypatch):
    heads = cascade(score_threshold=0.3)
    boxes = torch.tensor([[10.0, 10, 30, 30]])
    for stage, label in zip(heads.stages, (1, 1, 2), strict=True):
        said = Says(logits_of(torch.tensor([label])), torch.zeros(1, 4))
        monkeypatch.setattr(stage, "forward", said.forward)
    (found,) = heads.detect(levels(), [boxes], [(SIDE_PX, SIDE_PX)])
    assert found["labels"].tolist() == [1, 2]
    torch.testing.assert_close(found["scores"], torch.tensor([2 / 3, 1 / 3]))


def test_worse_boxes_of_a_class_and_those_beyond_the_limit_are_dropped():
    boxes = torch.tensor([[0.0, 0, 20, 20], [1, 0, 20, 20], [40, 40, 60, 60], [5, 5, 5, 9]])
    shares = torch.tensor([[0.1, 0.9, 0, 0], [0.2, 0.8, 0, 0], [0.3, 0.7, 0, 0], [0, 1.0, 0, 0]])
    kept = cascade()._select(boxes, shares)
    assert kept.boxes.tolist() == [[0, 0, 20, 20], [40, 40, 60, 60]]
    torch.testing.assert_close(kept.scores, torch.tensor([0.9, 0.7]))
    assert len(cascade(max_detections=1)._select(boxes, shares).boxes) == 1


@torch.no_grad()
def test_nothing_found_gives_empty_results():
    (found,) = cascade(score_threshold=1.0).detect(levels(), [torch.zeros(0, 4)], [(40, 50)])
    shapes = {name: tuple(values.shape) for name, values in found.items()}
    assert shapes == {"boxes": (0, 4), "scores": (0,), "labels": (0,), "masks": (0, 40, 50)}


@pytest.mark.parametrize("side", [20.0, 150.0, 300.0, 600.0])
def test_pooling_reads_every_level_at_the_places_of_the_cells(side):
    """On maps that hold x at each point, a cell's mean is the x of its middle."""
    maps = []
    for stride in STRIDES:
        x = (torch.arange(1024 // stride) + 0.5) * stride
        maps.append(x.expand(1, 1, 1024 // stride, -1))
    box = torch.tensor([[200.3, 300.0, 200.3 + side, 300 + side]])
    pooled = cascade()._pool(maps, [box], 7)
    expected = 200.3 + (torch.arange(7) + 0.5) * side / 7
    torch.testing.assert_close(pooled[0, 0], expected.expand(7, -1), atol=1e-2, rtol=0)


def test_pooling_takes_coarser_levels_for_larger_boxes():
    maps = [torch.full((1, 1, 1024 // s, 1024 // s), float(s)) for s in STRIDES]
    boxes = torch.tensor([[0.0, 0, side, side] for side in (20, 150, 300, 600, 1000)])
    assert cascade()._pool(maps, [boxes], 7)[:, 0, 0, 0].tolist() == [4, 8, 16, 32, 32]


@pytest.mark.parametrize("radius", [3, 6, 12, 24])
def test_masks_drawn_in_boxes_and_pasted_back_are_the_masks(radius):
    at = torch.arange(SIDE_PX) + 0.5
    y, x = torch.meshgrid(at, at, indexing="ij")
    disc = (x - 31) ** 2 + (y - 33) ** 2 < radius**2
    square = torch.maximum((x - 31).abs(), (y - 33).abs()) < radius
    masks = torch.stack((disc, square))
    box = torch.tensor([[31.0, 33, 31, 33]]) + radius * torch.tensor([-1, -1, 1, 1])
    boxes = box.expand(2, -1)
    drawn = mask_targets(masks, boxes, torch.arange(2), 28)
    pasted = paste_masks(drawn, boxes, (SIDE_PX, SIDE_PX))
    shared = (pasted & masks).flatten(1).sum(1) / (pasted | masks).flatten(1).sum(1)
    assert shared.min() > 0.97  # 28 cells a side: larger objects lose some of their edge


def test_masks_are_cut_at_the_borders_of_the_picture():
    boxes = torch.tensor([[-10.0, -10, 10, 10], [60, 60, 80, 80], [100, 100, 110, 110]])
    pasted = paste_masks(torch.ones(3, 28, 28), boxes, (64, 70))
    assert pasted.flatten(1).sum(1).tolist() == [100, 40, 0]


def test_loss_of_masks_is_the_cross_entropy_inside_the_boxes():
    target = one_object()
    boxes = torch.tensor([[10.0, 10, 50, 30]])  # the object fills the left half
    half = torch.zeros(1, 28, 28)
    half[:, :, :14] = 1
    args = ([boxes], [torch.tensor([0])], [target["masks"]])
    torch.testing.assert_close(mask_loss(40 * half - 20, *args), torch.zeros(()), atol=1e-6, rtol=0)
    assert mask_loss(20 - 40 * half, *args).item() == pytest.approx(20)
    none = mask_loss(torch.zeros(0, 28, 28), [boxes[:0]], [torch.zeros(0, dtype=torch.int64)], [])
    assert none == 0


@torch.no_grad()
@pytest.mark.parametrize("grid", [(6, 6), (7, 4), (2, 5)])
def test_windows_are_those_of_segment_anything(grid):
    x = torch.randn(2, *grid, 8)
    mixing = nn.Sequential(nn.Conv1d(9, 9, 1), nn.Tanh())  # mixes the tokens of a window
    windows, padded = window_partition(x, 3)
    expected = window_unpartition(mixing(windows.flatten(1, 2)).view_as(windows), 3, grid, padded)
    torch.testing.assert_close(attend_in_windows(mixing, x, 3), expected)


@torch.no_grad()
def test_deit_without_windows_is_timms_without_class_token():
    config = DeiTConfig(image_size=32, patch_size=8, d_model=16, depth=2, num_heads=2)
    model = WindowedDeiT(config).eval()
    plain = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=0,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        dynamic_img_size=True,
    ).eval()
    assert set(plain.state_dict()) - set(model.state_dict()) == {"norm.weight", "norm.bias"}
    plain.load_state_dict(model.state_dict(), strict=False)
    images = torch.randn(2, 3, 48, 32)
    (expected,) = plain.forward_intermediates(images, indices=[1], intermediates_only=True)
    torch.testing.assert_close(model.last_map(images), expected)


@torch.no_grad()
def test_one_window_over_the_whole_map_is_global_attention():
    config = DeiTConfig(image_size=32, patch_size=8, d_model=16, depth=3, num_heads=2)
    model = WindowedDeiT(config, window_size=4, num_global=1).eval()
    images = torch.randn(2, 3, 32, 32)
    windowed = model.last_map(images)
    model.window_size = None
    torch.testing.assert_close(windowed, model.last_map(images))


@torch.no_grad()
def test_global_blocks_are_the_last_of_each_part_and_only_they_see_beyond_a_window():
    assert WindowedDeiT(DeiTConfig(), window_size=14).global_blocks == (2, 5, 8, 11)
    config = DeiTConfig(image_size=32, patch_size=8, d_model=16, depth=2, num_heads=2)
    model = WindowedDeiT(config, window_size=2, num_global=1).eval()
    images = torch.randn(1, 3, 32, 32)
    changed = images.clone()
    changed[..., :8, :8] += 1
    model.global_blocks = ()
    differs = (model.last_map(images) != model.last_map(changed)).any(dim=1)[0]
    assert differs.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    model.global_blocks = (1,)
    assert bool((model.last_map(images) != model.last_map(changed)).any(dim=1).all())


@torch.no_grad()
def test_blocks_with_windows_are_run_as_modules_which_sharding_and_compilation_hook_into():
    config = DeiTConfig(image_size=32, patch_size=8, d_model=16, depth=3, num_heads=2)
    model = WindowedDeiT(config, window_size=2, num_global=1).eval()
    run = []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: run.append(number))
    model.last_map(torch.randn(1, 3, 32, 32))
    assert run == [0, 1, 2]


def test_more_global_blocks_than_blocks_are_refused():
    with pytest.raises(ValueError, match="of 12 blocks between 1 and 12 can be global; got 13"):
        WindowedDeiT(DeiTConfig(), window_size=14, num_global=13)
