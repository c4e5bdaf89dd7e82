"""Region proposals: where a picture may have objects, in float32 under autocast, and their losses.

Head, anchors and box arithmetic are torchvision's; matching, sampling and NMS go over all pictures
at once (boxes.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RPNHead, permute_and_flatten

from visionmamba.models.boxes import Boxes, Objects, match, pick, sample, suppress

ASPECT_RATIOS = (0.5, 1.0, 2.0)

_OBJECT_IOU, _BACKGROUND_IOU = 0.7, 0.3
_NUM_SAMPLED, _POSITIVE_SHARE = 256, 0.5
_NMS_IOU = 0.7
_LEAST_SIDE_PX = 1e-3
_BETA = 1 / 9  # of the smooth L1 loss


class Anchors(AnchorGenerator):  # type: ignore[misc]
    """Anchors of one size a level, in float32 and at given strides.

    torchvision's take their strides from the rounded-down ratio of picture and map, which is off
    where a map's side was rounded up, and their coordinates in the dtype of the maps.

    Args:
        sizes: side in pixels of the square anchor of each level.
        strides: of the levels in pixels.
    """

    def __init__(self, sizes: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__(tuple((size,) for size in sizes), (ASPECT_RATIOS,) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors (n, 4) of every level, xyxy in pixels."""
        self.set_cell_anchors(torch.float32, levels[0].device)
        grids = [level.shape[-2:] for level in levels]
        anchors: list[Tensor] = self.grid_anchors(grids, [(s, s) for s in self.strides])
        return anchors


class ProposalNetwork(nn.Module):
    """Makes boxes from a pyramid, with the settings of the published detection.

    Two convolutions, IoU 0.7 and 0.3, 256 anchors a picture, NMS 0.7. The loss of boxes is smooth
    L1 with beta 1/9, torchvision's; the published detection has plain L1.

    Args:
        channels: of the levels.
        sizes, strides: of the anchors of each level, in pixels.
        num_proposals: most boxes of a picture; NMS gets as many of each level, in training twice
            as many.
    """

    def __init__(
        self, channels: int, *, sizes: Sequence[int], strides: Sequence[int], num_proposals: int
    ) -> None:
        super().__init__()
        self.anchors = Anchors(sizes, strides)
        self.head = RPNHead(channels, len(ASPECT_RATIOS), conv_depth=2)
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.num_proposals = num_proposals

    def forward(
        self, levels: Sequence[Tensor], sizes: Tensor, objects: Objects | None
    ) -> tuple[Boxes, dict[str, Tensor]]:
        """Return boxes, best first, with objects also loss_objectness and loss_rpn_box_reg.

        Args:
            levels: maps (B, C, h, w) at the strides.
            sizes: (B, 2) float32: height and width of every picture.
            objects: what training learns from; None in evaluation.
        """
        answers = zip(*self.head(list(levels)), strict=True)
        scores, deltas = [], []
        for objectness, shifts in answers:
            sides = objectness.shape[-2:]
            num = len(objectness), len(ASPECT_RATIOS)
            scores.append(permute_and_flatten(objectness.float(), *num, 1, *sides)[..., 0])
            deltas.append(permute_and_flatten(shifts.float(), *num, 4, *sides))
        anchors = self.anchors(levels)
        with torch.no_grad():
            boxes = self._propose(scores, deltas, anchors, sizes)
        if objects is None:
            return boxes, {}
        return boxes, self._losses(
            torch.cat(scores, dim=1), torch.cat(deltas, dim=1), torch.cat(anchors), objects
        )

    def _propose(
        self,
        scores: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        sizes: Tensor,
    ) -> Boxes:
        """Return the best boxes of all levels, without those that a better one of theirs covers."""
        most = 2 * self.num_proposals if self.training else self.num_proposals
        found, found_scores = [], []
        for score, delta, anchor in zip(scores, deltas, anchors, strict=True):
            score, rows = score.topk(min(most, score.shape[1]))
            decoded = self.coder.decode_single(
                pick(delta, rows).flatten(0, 1), anchor[rows].flatten(0, 1)
            )
            boxes = clip(decoded.view(*rows.shape, 4), sizes)
            valid = (boxes[..., 2:] - boxes[..., :2] >= _LEAST_SIDE_PX).all(dim=-1)
            stays = suppress(Boxes(boxes, valid), _NMS_IOU)
            found.append(boxes)
            found_scores.append(score.where(stays, -torch.inf))
        together = torch.cat(found_scores, dim=1)
        best, rows = together.topk(min(self.num_proposals, together.shape[1]))
        return Boxes(pick(torch.cat(found, dim=1), rows), best > -torch.inf)

    def _losses(
        self, scores: Tensor, deltas: Tensor, anchors: Tensor, objects: Objects
    ) -> dict[str, Tensor]:
        """Return the losses of scores (B, n) and deltas (B, n, 4) at anchors (n, 4)."""
        matches = match(objects.boxes, anchors[None], finds_best=True)
        positive = (matches.overlaps >= _OBJECT_IOU) | matches.is_best
        negative = (matches.overlaps < _BACKGROUND_IOU) & ~positive
        rows, valid = sample(positive, negative, _NUM_SAMPLED, _POSITIVE_SHARE)
        num = valid.sum().clamp(min=1)
        is_object = pick(positive, rows) & valid
        of_scores = F.binary_cross_entropy_with_logits(
            pick(scores, rows), is_object.float(), valid.float(), reduction="sum"
        )
        matched = pick(objects.boxes.xyxy, pick(matches.rows, rows))
        own = pick(deltas, rows)
        wanted = self.coder.encode_single(matched.flatten(0, 1), anchors[rows].flatten(0, 1))
        wanted = wanted.view_as(own).where(is_object[..., None], own.detach())
        of_boxes = F.smooth_l1_loss(own, wanted, beta=_BETA, reduction="sum")
        return {"loss_objectness": of_scores / num, "loss_rpn_box_reg": of_boxes / num}


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Return boxes (B, n, 4) inside pictures of height and width (B, 2)."""
    most = sizes.flip(1).repeat(1, 2)[:, None]
    return torch.minimum(boxes.clamp(min=0), most)
