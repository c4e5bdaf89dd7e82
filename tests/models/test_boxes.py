"""Boxes of many pictures at once do what torchvision does with one after the other."""

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou, nms

from visionmamba.models import boxes as boxes_module
from visionmamba.models.boxes import (
    Boxes,
    Objects,
    match,
    overlaps,
    sample,
    suppress,
    suppress_in_rounds,
)
from visionmamba.models.proposals import ASPECT_RATIOS, ProposalNetwork

pytestmark = pytest.mark.once

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIDE_PX = 64
STRIDES = (4, 8, 16, 32, 64)
CHANNELS = 32  # so many that nowhere all are 0, where scores would be equal


def random_boxes(*shape: int, side: float = SIDE_PX) -> torch.Tensor:
    corners = torch.rand(*shape, 2, 2) * side
    return torch.cat((corners.amin(dim=-2), corners.amax(dim=-2)), dim=-1)


@pytest.fixture
def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes_module, "_PAIRS_AT_ONCE", 40)


def test_overlaps_are_torchvisions():
    first, second = random_boxes(3, 7), random_boxes(3, 9)
    for one, a, b in zip(overlaps(first, second), first, second, strict=True):
        torch.testing.assert_close(one, box_iou(a, b))
    nothing = torch.zeros(1, 2, 4)
    assert overlaps(nothing, nothing).tolist() == [[[0, 0], [0, 0]]]


@pytest.mark.usefixtures("in_small_parts")
def test_each_box_meets_the_object_of_its_picture_that_it_overlaps_most():
    own = [random_boxes(count) for count in (3, 0, 5)]
    objects = Objects.of(own, [torch.arange(len(one)) + 1 for one in own])
    boxes = random_boxes(3, 20)
    found = match(objects.boxes, boxes, finds_best=True)
    assert objects.labels.tolist() == [[1, 2, 3, 0, 0], [0] * 5, [1, 2, 3, 4, 5]]
    for i in (0, 2):
        expected = box_iou(own[i], boxes[i])
        torch.testing.assert_close(found.overlaps[i], expected.amax(dim=0))
        assert torch.equal(found.rows[i], expected.argmax(dim=0))
        is_best = (expected == expected.amax(dim=1, keepdim=True)).any(dim=0)
        assert torch.equal(found.is_best[i], is_best)
    assert bool((found.overlaps[1] == -1).all()) and not bool(found.is_best[1].any())


def test_objects_of_pictures_without_any_are_one_row_that_is_not_valid():
    objects = Objects.of([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    assert objects.boxes.xyxy.shape == (2, 1, 4) and not bool(objects.boxes.valid.any())


@pytest.mark.parametrize(
    ("num_positive", "num_negative", "expected"),
    [(10, 30, (2, 6)), (1, 30, (1, 7)), (0, 30, (0, 8)), (10, 3, (2, 3)), (0, 0, (0, 0))],
)
def test_samples_are_a_share_of_positive_rows_at_most_and_negative_ones(
    num_positive, num_negative, expected
):
    kind = torch.zeros(2, 50)
    kind[:, :num_positive], kind[:, num_positive : num_positive + num_negative] = 1, -1
    kind = torch.stack([row[torch.randperm(50)] for row in kind])
    rows, valid = sample(kind > 0, kind < 0, 8, 0.25)
    assert rows.shape == valid.shape == (2, 8)
    for picture, row, is_valid in zip(kind, rows, valid, strict=True):
        chosen = row[is_valid]
        assert len(chosen.unique()) == len(chosen)
        kinds = picture[chosen]
        assert ((kinds > 0).sum(), (kinds < 0).sum()) == expected


def test_each_row_is_as_likely_to_be_sampled():
    positive = torch.zeros(4000, 6, dtype=torch.bool)
    positive[:, :3] = True
    rows, valid = sample(positive, ~positive, 3, 0.4)
    counts = torch.bincount(rows[valid], minlength=6) / 4000
    torch.testing.assert_close(counts, torch.tensor([1, 1, 1, 2, 2, 2]) / 3, atol=0.05, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("suppressing", [suppress, suppress_in_rounds])
@pytest.mark.usefixtures("in_small_parts")
def test_suppression_is_torchvisions(device, suppressing):
    xyxy = random_boxes(4, 60).to(device)
    valid = (torch.rand(4, 60) < 0.8).to(device)
    valid[3] = False
    stays = suppressing(Boxes(xyxy, valid), 0.3)
    for i in range(4):
        rows = valid[i].nonzero()[:, 0].cpu()
        best_first = -torch.arange(len(rows), dtype=torch.float32)
        expected = rows[nms(xyxy[i].cpu()[rows], best_first, 0.3)]
        assert stays[i].nonzero()[:, 0].tolist() == sorted(expected.tolist())


def test_long_chains_of_suppression_are_followed_to_their_end():
    """Boxes in a row, each of which overlaps the next: every second stays."""
    left = torch.arange(101.0) * 4
    xyxy = torch.stack((left, torch.zeros(101), left + 10, torch.full((101,), 10.0)), dim=1)[None]
    stays = suppress_in_rounds(Boxes(xyxy, torch.ones(1, 101, dtype=torch.bool)), 0.4)
    assert stays[0].tolist() == [i % 2 == 0 for i in range(101)]
    nothing = Boxes(xyxy[:, :0], torch.ones(1, 0, dtype=torch.bool))
    assert suppress_in_rounds(nothing, 0.4).shape == suppress(nothing, 0.4).shape == (1, 0)


def networks(num_proposals: int) -> tuple[ProposalNetwork, RegionProposalNetwork]:
    """Ours, and torchvision's with the same weights."""
    sizes = (8, 16, 32, 64, 128)
    own = ProposalNetwork(CHANNELS, sizes=sizes, strides=STRIDES, num_proposals=num_proposals)
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs = RegionProposalNetwork(
        AnchorGenerator(tuple((s,) for s in sizes), (ASPECT_RATIOS,) * 5),
        own.head,
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * num_proposals, "testing": num_proposals},
        post_nms_top_n={"training": num_proposals, "testing": num_proposals},
        nms_thresh=0.7,
    )
    return own, theirs


SIZES = [(SIDE_PX, SIDE_PX), (40, 50)]


def maps() -> list[torch.Tensor]:
    return [torch.randn(2, CHANNELS, SIDE_PX // stride, SIDE_PX // stride) for stride in STRIDES]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("num_proposals", [20, 400])
def test_proposals_are_torchvisions(training, num_proposals):
    own, theirs = (network.train(training) for network in networks(num_proposals))
    levels = maps()
    images = ImageList(torch.zeros(2, 3, SIDE_PX, SIDE_PX), SIZES)
    nothing = [{"boxes": torch.zeros(0, 4)}] * 2
    expected, _ = theirs(images, {str(i): one for i, one in enumerate(levels)}, nothing)
    found, losses = own(levels, torch.tensor(SIZES, dtype=torch.float32), None)
    assert losses == {}
    for ours, boxes in zip(found.separate(), expected, strict=True):
        torch.testing.assert_close(ours, boxes)


def test_losses_of_proposals_are_torchvisions_where_every_anchor_is_sampled(monkeypatch):
    own, theirs = networks(20)
    monkeypatch.setattr("visionmamba.models.proposals._NUM_SAMPLED", 100_000)
    theirs.fg_bg_sampler.batch_size_per_image = 100_000
    levels = maps()
    images = ImageList(torch.zeros(2, 3, SIDE_PX, SIDE_PX), SIZES)
    boxes = [random_boxes(4), torch.zeros(0, 4)]
    labels = [torch.ones(len(one), dtype=torch.int64) for one in boxes]
    targets = [{"boxes": one} for one in boxes]
    _, expected = theirs(images, {str(i): one for i, one in enumerate(levels)}, targets)
    _, losses = own(levels, torch.tensor(SIZES, dtype=torch.float32), Objects.of(boxes, labels))
    torch.testing.assert_close(losses, expected)
