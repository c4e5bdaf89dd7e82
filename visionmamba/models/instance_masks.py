"""Masks of objects: the head that draws them in a box, its targets, and masks back in the picture.

Coordinates are continuous, pixel (i, j) covering [j, j + 1) x [i, i + 1). torchvision's own targets
and pasting are half a pixel off and round boxes, which costs small objects much of their overlap.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align

from visionmamba.models.pyramid import ChannelNorm

_NUM_CONVOLUTIONS = 4
_AT_ONCE = 32  # masks of whole pictures in float32


class MaskHead(nn.Module):
    """Four 3x3 convolutions with norms, one that doubles the resolution, one mask a class.

    Args:
        in_channels: of what is pooled from the pyramid.
        num_classes: K, without background.
        channels: of the convolutions.
    """

    def __init__(self, in_channels: int, num_classes: int, *, channels: int) -> None:
        super().__init__()
        widths = [channels] * _NUM_CONVOLUTIONS
        self.convolutions = MaskRCNNHeads(in_channels, widths, 1, norm_layer=ChannelNorm)
        self.predictor = MaskRCNNPredictor(channels, channels, num_classes)
        self.predictor.mask_fcn_logits.reset_parameters()  # torchvision's logits start far from 0

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Return float32 logits (n, 2 s, 2 s) of each box's own class.

        Args:
            pooled: (n, in_channels, s, s) from the pyramid.
            labels: (n,) from 1 to K.
        """
        logits: Tensor = self.predictor(self.convolutions(pooled)).float()
        return logits[torch.arange(len(labels), device=labels.device), labels - 1]


def mask_targets(masks: Tensor, boxes: Tensor, matches: Tensor, size: int) -> Tensor:
    """Return what the mask head should draw in each box, float32 (n, size, size) of 0 and 1.

    Args:
        masks: (m, H, W) of a picture's objects.
        boxes: (n, 4) xyxy in pixels.
        matches: (n,) the object of each box.
        size: side of the target.
    """
    targets = []
    chunks = zip(torch.split(boxes, _AT_ONCE), torch.split(matches, _AT_ONCE), strict=True)
    for some, match in chunks:
        own = masks[match, None].float()
        rois = torch.cat((torch.arange(len(some), device=some.device)[:, None], some), dim=1)
        targets.append(roi_align(own, rois, size, aligned=True)[:, 0] >= 0.5)
    return torch.cat(targets).float()


def mask_loss(
    logits: Tensor,
    boxes: Sequence[Tensor],
    matches: Sequence[Tensor],
    masks: Sequence[Tensor],
) -> Tensor:
    """Return the mean binary cross-entropy of all pixels in all boxes; 0 without boxes.

    Args:
        logits: (n, s, s) of the boxes of all pictures.
        boxes, matches, masks: of each picture, as in `mask_targets`.
    """
    if not len(logits):
        return logits.sum()
    targets = [
        mask_targets(one, box, match, logits.shape[-1])
        for one, box, match in zip(masks, boxes, matches, strict=True)
        if len(box)
    ]
    return F.binary_cross_entropy_with_logits(logits, torch.cat(targets))


def paste_masks(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], *, threshold: float = 0.5
) -> Tensor:
    """Return masks (n, height, width) bool of a picture from masks drawn in boxes.

    Args:
        probabilities: (n, s, s) float, over the area of each box.
        boxes: (n, 4) xyxy in pixels.
        size: (height, width) of the picture.
        threshold: least probability of a pixel of the object.
    """
    height, width = size
    pasted = probabilities.new_zeros((len(boxes), height, width), dtype=torch.bool)
    for i, (left, top, right, bottom) in enumerate(boxes.tolist()):
        columns = max(math.floor(left), 0), min(math.ceil(right), width)
        rows = max(math.floor(top), 0), min(math.ceil(bottom), height)
        if columns[0] >= columns[1] or rows[0] >= rows[1]:
            continue
        at = [
            (torch.arange(*pixels, device=boxes.device) + 0.5 - start) / (end - start) * 2 - 1
            for pixels, start, end in ((rows, top, bottom), (columns, left, right))
        ]
        y, x = torch.meshgrid(*at, indexing="ij")
        grid = torch.stack((x, y), dim=-1).to(probabilities.dtype)
        drawn = F.grid_sample(probabilities[i][None, None], grid[None], align_corners=False)
        pasted[i, slice(*rows), slice(*columns)] = drawn[0, 0] >= threshold
    return pasted
