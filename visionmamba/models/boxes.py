"""Boxes of all pictures of a batch at once: overlaps, matches, samples, suppression.

The rules are torchvision's, whose matcher, samplers and NMS take a picture at a time and ask the
device after each how many boxes are left: on a GPU half of a step's launches and most of its
waiting. Here every picture has as many rows as any, of which some are valid, so that little waits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

_PAIRS_AT_ONCE = 2**25  # of boxes, each of which takes some 20 bytes meanwhile
_ROUNDS_A_QUESTION = 4  # of suppression, before the device is asked whether anything changed


class Boxes(NamedTuple):
    """Boxes of every picture of a batch."""

    xyxy: Tensor
    """(B, n, 4) in pixels, float32."""
    valid: Tensor
    """(B, n) bool: rows that are boxes; what is in the others means nothing."""

    def separate(self) -> list[Tensor]:
        """Returns the boxes (n, 4) of every picture; waits for the device."""
        return [xyxy[valid] for xyxy, valid in zip(*self, strict=True)]


class Objects(NamedTuple):
    """Annotated objects of every picture of a batch; at least one row, valid or not."""

    boxes: Boxes
    """(B, m) of them."""
    labels: Tensor
    """(B, m) int64, from 1."""

    @classmethod
    def of(cls, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> "Objects":
        """Returns the objects of every picture, (m, 4) and (m,), together."""
        nums = torch.tensor([len(one) for one in boxes])[:, None]
        place = torch.arange(max(1, int(nums.max())))
        valid = place < nums
        # rows that are not valid are the one of zeros behind all others
        rows = (nums.cumsum(dim=0) - nums + place).where(valid, nums.sum()).to(boxes[0].device)
        xyxy = torch.cat([*boxes, boxes[0].new_zeros((1, 4))])[rows]
        own = torch.cat([*labels, labels[0].new_zeros(1)])[rows]
        return cls(Boxes(xyxy, valid.to(xyxy.device)), own)


class Matches(NamedTuple):
    """For every box of every picture, the object that it overlaps most."""

    overlaps: Tensor
    """(B, n) intersection over union with it; -1 in a picture without objects."""
    rows: Tensor
    """(B, n) int64: which of the picture's objects it is."""
    is_best: Tensor
    """(B, n) bool: whether no other box overlaps some object more."""


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Returns intersection over union (B, m, n) of boxes (B, m, 4) and (B, n, 4); 0 of nothing."""
    left, top, right, bottom = first[..., None, :].unbind(-1)
    others = second[..., None, :, :].unbind(-1)
    width = (torch.minimum(right, others[2]) - torch.maximum(left, others[0])).clamp_(min=0)
    height = (torch.minimum(bottom, others[3]) - torch.maximum(top, others[1])).clamp_(min=0)
    shared = width.mul_(height)
    area = (right - left) * (bottom - top)
    other_area = (others[2] - others[0]) * (others[3] - others[1])
    union = torch.add(area, other_area, out=height).sub_(shared)
    return shared.div_(union.clamp_(min=torch.finfo(union.dtype).tiny))


def match(objects: Boxes, boxes: Tensor, *, finds_best: bool = False) -> Matches:
    """Returns which object each box (B, n, 4), or (1, n, 4) for all pictures, overlaps most.

    Args:
        objects: of every picture, one row at least.
        boxes: to be matched.
        finds_best: whether `is_best` is asked for; otherwise it is False everywhere.
    """
    parts = []
    pictures = max(1, _PAIRS_AT_ONCE // (objects.valid.shape[1] * max(boxes.shape[1], 1)))
    for start in range(0, len(objects.valid), pictures):
        part = slice(start, start + pictures)
        valid = objects.valid[part, :, None]
        found = overlaps(objects.xyxy[part], boxes if len(boxes) == 1 else boxes[part])
        found.masked_fill_(~valid, -1)
        most, rows = found.max(dim=1)
        if finds_best and boxes.shape[1]:
            best = found.amax(dim=2, keepdim=True)
            is_best = ((found == best) & (best > 0)).any(dim=1)
        else:
            is_best = torch.zeros_like(most, dtype=torch.bool)
        parts.append(Matches(most, rows, is_best))
    return Matches(*map(torch.cat, zip(*parts, strict=True)))


def sample(
    positive: Tensor, negative: Tensor, num_sampled: int, positive_share: float
) -> tuple[Tensor, Tensor]:
    """Chooses rows of every picture at random, positive ones up to a share and negative ones.

    Args:
        positive, negative: (B, n) bool: which rows there are to choose from.
        num_sampled: most rows of a picture.
        positive_share: most of them that are positive; negative ones fill up the rest.

    Returns:
        rows (B, s) int64 with s at most num_sampled, each once, and which are valid (B, s).
    """
    chance = torch.rand(positive.shape, device=positive.device)
    num_rows = positive.shape[1]
    most = min(int(num_sampled * positive_share), num_rows)
    first, rows = chance.where(positive, -1).topk(most)
    valid = first >= 0
    others, other_rows = chance.where(negative, -1).topk(min(num_sampled, num_rows))
    num_others = num_sampled - valid.sum(dim=1, keepdim=True)
    place = torch.arange(others.shape[1], device=others.device)
    rows = torch.cat((rows, other_rows), dim=1)
    valid = torch.cat((valid, (others >= 0) & (place < num_others)), dim=1)
    order = valid.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    order = order[:, : min(num_sampled, num_rows)]
    return rows.gather(1, order), valid.gather(1, order)


def suppress(boxes: Boxes, threshold: float) -> Tensor:
    """Returns which boxes (B, n) bool stay where each, best first, takes those it covers away.

    Those that overlap a better one that stays by more than the threshold go; on CPUs by
    torchvision's NMS, elsewhere for all pictures in rounds, as its kernel goes through the boxes of
    one picture on a single processor: 2.9 of 3.0 ms for 7,000 boxes on an H200 (docs/log.md).
    """
    if boxes.xyxy.device.type != "cpu":
        return suppress_in_rounds(boxes, threshold)
    stays = torch.zeros_like(boxes.valid)
    for xyxy, valid, one in zip(*boxes, stays, strict=True):
        rows = valid.nonzero()[:, 0]
        one[rows[nms(xyxy[rows], -rows.to(xyxy.dtype), threshold)]] = True
    return stays


def suppress_in_rounds(boxes: Boxes, threshold: float) -> Tensor:
    """Returns what `suppress` does, on any device.

    Round k settles boxes whose chain of better ones that cover each other is shorter than k.
    """
    stays = []
    num = boxes.valid.shape[1]
    pictures = max(1, _PAIRS_AT_ONCE // max(num * num, 1))
    parts = (torch.split(one, pictures) for one in boxes)
    for xyxy, valid in zip(*parts, strict=True):
        covers = (overlaps(xyxy, xyxy) > threshold).triu_(diagonal=1).to(torch.bfloat16)
        kept, is_settled = valid, num == 0
        while not is_settled:
            for _ in range(_ROUNDS_A_QUESTION):
                former = kept
                num_better = (kept[:, None].to(torch.bfloat16) @ covers)[:, 0]
                kept = valid & (num_better == 0)
            is_settled = torch.equal(former, kept)
        stays.append(kept)
    return torch.cat(stays)


def pick(values: Tensor, rows: Tensor) -> Tensor:
    """Returns of values (B, n) or (B, n, c) the rows (B, s) of every picture."""
    if values.dim() == 2:
        return values.gather(1, rows)
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[2]))
