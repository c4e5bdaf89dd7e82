"""Detectors: sizes, pictures of any shape, gradients, bfloat16, learning, and what is refused."""

import pytest
import torch
from torch import nn

from tests.models.drawn import draw_objects
from visionmamba.models import DeiTConfig, DetectionModel, DetectorConfig, VimConfig
from visionmamba.models.proposals import Anchors

pytestmark = pytest.mark.once

VIM = VimConfig(image_size=64, d_model=32, depth=2, readout="mean")
DEIT = DeiTConfig(image_size=64, d_model=32, depth=2, num_heads=2)
SMALL = {
    "num_classes": 3,
    "channels": 32,
    "box_width": 32,
    "anchor_sizes": (8, 16, 32, 64, 128),
    "num_proposals": 30,
    "num_sampled": 16,
}
NOTHING = {
    "boxes": torch.zeros(0, 4),
    "labels": torch.zeros(0, dtype=torch.int64),
    "masks": torch.zeros(0, 48, 80, dtype=torch.uint8),
}


def small(backbone=VIM, **options) -> DetectionModel:
    return DetectorConfig(backbone=backbone, **{**SMALL, **options}).build()


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def published():
    """The published detector on Vim-Ti at 1024 px, without storage."""
    backbone = VimConfig.tiny(image_size=1024, readout="mean")
    with torch.device("meta"):
        return DetectorConfig(backbone=backbone, num_classes=80).build()


CONV_256 = 256 * 256 * 9 + 2 * 256  # 3x3 without bias, and a norm


def test_backbone_has_the_parameters_of_a_hand_count(published):
    blocks, patches, positions = 24 * 282_048, 192 * (3 * 16 * 16 + 1), 64 * 64 * 192
    assert num_parameters(published.backbone) == blocks + patches + positions


def test_pyramid_has_the_parameters_of_a_hand_count(published):
    finest = (192 * 96 * 4 + 96) + 2 * 96 + (96 * 48 * 4 + 48) + 48 * 256
    fine = (192 * 96 * 4 + 96) + 96 * 256
    rest = 2 * 192 * 256
    expected = finest + fine + rest + 4 * (2 * 256 + CONV_256)
    assert num_parameters(published.pyramid) == expected


def test_proposals_and_heads_have_the_parameters_of_a_hand_count(published):
    proposals = 2 * (256 * 256 * 9 + 256) + 256 * 3 + 3 + 256 * 12 + 12
    assert num_parameters(published.rpn) == proposals
    stage = 4 * CONV_256 + (256 * 49 + 1) * 1024 + 1025 * 81 + 1025 * 4
    masks = 4 * CONV_256 + (256 * 256 * 4 + 256) + 257 * 80
    assert num_parameters(published.heads) == 3 * stage + masks
    assert num_parameters(published) == 60_080_078


def test_one_stage_detector_has_one_box_head(published):
    with torch.device("meta"):
        one = DetectorConfig(
            backbone=published.config.backbone, num_classes=80, head="mask"
        ).build()
    assert num_parameters(published) - num_parameters(one) == 2 * num_parameters(
        published.heads.stages[0]
    )


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        (VIM, {}),
        (VIM, {"head": "mask"}),
        (VimConfig(image_size=64, d_model=32, depth=2), {"head": "mask"}),
        (DEIT, {"head": "mask"}),
        (DEIT, {"head": "mask", "window_size": 3, "num_global": 1}),
    ],
    ids=["cascade", "mask", "class token", "DeiT", "windows"],
)
@pytest.mark.parametrize("has_objects", [True, False])
def test_every_parameter_gets_a_finite_gradient(backbone, options, has_objects):
    model = small(backbone, **options)
    images, targets = draw_objects(2)
    if not has_objects:
        images, targets = [torch.randn(3, 48, 80)], [NOTHING]
    losses = model(images, targets)
    torch.stack(list(losses.values())).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_losses_have_torchvisions_names_and_a_number_in_a_cascade():
    images, targets = draw_objects(1)
    names = {"loss_objectness", "loss_rpn_box_reg", "loss_mask"}
    parts = ("loss_classifier", "loss_box_reg")
    assert set(small(head="mask")(images, targets)) == {*names, *parts}
    numbered = {f"{part}_{k}" for part in parts for k in (1, 2, 3)}
    assert set(small()(images, targets)) == names | numbered


def test_crowds_are_left_out():
    model = small(head="mask")
    images, targets = draw_objects(1)
    (target,) = targets
    losses = []
    crowd = {name: torch.cat((values, values[:1])) for name, values in target.items()}
    crowd["boxes"][-1] += 3
    crowd["iscrowd"] = torch.tensor([0] * len(target["boxes"]) + [1])
    for each in (target, crowd):
        torch.manual_seed(1)
        losses.append(torch.stack(list(model(images, [each]).values())))
    assert torch.equal(*losses)


@torch.no_grad()
@pytest.mark.parametrize("pad_to_image_size", [True, False])
def test_pictures_of_any_sizes_give_objects_in_their_own_pixels(pad_to_image_size):
    model = small(pad_to_image_size=pad_to_image_size).eval()
    sizes = [(33, 90), (64, 64), (101, 20)]
    found = model([torch.randn(3, *size) for size in sizes])
    for one, (height, width) in zip(found, sizes, strict=True):
        count = len(one["boxes"])
        assert 0 < count <= 100
        assert one["boxes"].min() >= 0
        assert one["boxes"].amax(dim=0).tolist()[2:] <= [width, height]
        assert one["masks"].shape == (count, height, width) and one["masks"].dtype == torch.bool
        assert bool((one["scores"].diff() <= 0).all())
        assert set(one["labels"].tolist()) <= {1, 2, 3}


@torch.no_grad()
def test_picture_is_seen_the_same_in_any_batch_of_one_padded_size():
    model = small(head="mask", score_threshold=0.0).eval()
    a, b = torch.randn(3, 40, 64), torch.randn(3, 64, 50)
    alone, together = model([a])[0], model([b, a])[1]
    torch.testing.assert_close(together["boxes"], alone["boxes"], atol=1e-3, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [8, 16])
def test_levels_lie_at_their_strides_with_overlapping_patches_too(patch_size):
    backbone = VimConfig(image_size=64, patch_size=patch_size, stride=8, d_model=32, depth=2)
    model = small(backbone)
    assert model.config.strides == (2, 4, 8, 16, 32)
    levels = model._levels(model._pad([torch.randn(3, 65, 96)], [(65, 96)]))
    assert [tuple(one.shape[2:]) for one in levels] == [
        (40, 48),
        (20, 24),
        (10, 12),
        (5, 6),
        (3, 3),
    ]


def test_anchors_are_float32_at_the_strides_of_levels_with_odd_sides():
    anchors = Anchors((32, 64), (16, 32))
    levels = [torch.zeros(1, 1, 3, 3, dtype=torch.bfloat16), torch.zeros(1, 1, 2, 2).bfloat16()]
    boxes = torch.cat(anchors(levels))
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert boxes.dtype == torch.float32
    assert centres[: 3 * 9 : 3].tolist() == [[16 * x, 16 * y] for y in range(3) for x in range(3)]
    assert centres[3 * 9 :: 3].tolist() == [[0, 0], [32, 0], [0, 32], [32, 32]]


def test_bfloat16_autocast_gives_float32_losses_near_those_of_float32():
    model = small()
    images, targets = draw_objects(2)
    losses = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model(images, targets))
    assert all(loss.dtype == torch.float32 for loss in losses[1].values())
    for name in ("loss_objectness", "loss_rpn_box_reg", "loss_mask"):
        torch.testing.assert_close(losses[1][name], losses[0][name], atol=0.02, rtol=0.05)


@torch.no_grad()
def test_bfloat16_autocast_gives_float32_boxes():
    model = small(head="mask").eval()
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = model([torch.randn(3, 64, 64)])
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert bool((found["boxes"] != found["boxes"].bfloat16()).any())


def test_losses_fall_on_a_drawn_example():
    model = small(num_sampled=32)
    images, targets = draw_objects(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    # the loss of boxes grows with the number of boxes that are near an object
    names = ["loss_objectness", "loss_mask", *(f"loss_classifier_{k}" for k in (1, 2, 3))]
    sums = []
    for _ in range(25):
        losses = model(images, targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        sums.append(sum(losses[name].item() for name in names))
    assert sum(sums[-5:]) / 5 < 0.5 * sums[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be an int of at least 1; got 0"),
        ({"head": "fast"}, "head must be 'cascade' or 'mask'; got 'fast'"),
        ({"window_size": 14}, "window_size 14 is for a DeiT"),
        ({"anchor_sizes": (32,)}, "anchor_sizes must be 5 sizes"),
        ({"nms_threshold": 2}, "nms_threshold must be between 0 and 1"),
        ({"backbone": VimConfig(patch_size=7)}, "got patches of 7 at stride 7"),
    ],
)
def test_wrong_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DetectorConfig(**{"backbone": VIM, **SMALL, **options})


def test_unknown_options_and_other_backbones_are_refused():
    with pytest.raises(TypeError, match="no option 'anchors'; valid: backbone, num_classes"):
        DetectorConfig(backbone=VIM, num_classes=1, anchors=3)
    with pytest.raises(TypeError, match=r"backbone must be a VimConfig or a DeiTConfig.*got str"):
        DetectorConfig(backbone="vim", num_classes=1)
    with pytest.raises(TypeError, match="takes a DetectorConfig; got VimConfig"):
        DetectionModel(VIM)


@pytest.mark.parametrize(
    ("box", "label", "message"),
    [
        ([5, 5, 5, 9], 1, r"picture image_id 7 has an object with box \[5.0, 5.0, 5.0, 9.0\]"),
        ([5, 5, 9, 9], 4, "label 4; boxes must be x1 < x2, y1 < y2 and labels from 1 to 3"),
        ([5, 5, 9, float("nan")], 1, "picture image_id 7 has an object"),
    ],
)
def test_objects_without_area_or_class_are_named(box, label, message):
    images, targets = draw_objects(2)
    targets[1] = {
        "boxes": torch.tensor([box], dtype=torch.float32),
        "labels": torch.tensor([label]),
        "masks": torch.zeros(1, 64, 64, dtype=torch.uint8),
        "image_id": torch.tensor(7),
    }
    with pytest.raises(ValueError, match=message):
        small()(images, targets)


def test_wrong_calls_are_refused():
    model = small()
    images, targets = draw_objects(1)
    with pytest.raises(ValueError, match=r"got 1 pictures and no targets: give them, or call"):
        model(images)
    with pytest.raises(ValueError, match="one has no masks"):
        model(images, [{"boxes": targets[0]["boxes"], "labels": targets[0]["labels"]}])
    with pytest.raises(
        ValueError, match=r"must be a list of \(3, height, width\); got one of \(1,"
    ):
        model.eval()([torch.zeros(1, 64, 64)])
    with pytest.raises(ValueError, match="at least one picture; got none"):
        model([])
