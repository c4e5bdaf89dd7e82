"""Cascade R-CNN's box heads (arXiv 1712.00726) and the mask head: proposals to objects.

One stage makes it Mask R-CNN. Box arithmetic, RoIAlign and NMS are torchvision's. Not here:
proposals (proposals.py), matching and sampling (boxes.py), masks (instance_masks.py), the whole
detector (detection.py).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.ops import batched_nms, clip_boxes_to_image, roi_align
from torchvision.ops.poolers import LevelMapper

from visionmamba.models.boxes import Boxes, Objects, match, pick, sample
from visionmamba.models.instance_masks import MaskHead, mask_loss, paste_masks
from visionmamba.models.proposals import clip
from visionmamba.models.pyramid import ChannelNorm

BOX_CELLS = 7
"""Side of what is pooled for a box head."""
MASK_CELLS = 14
"""Side of what is pooled for the mask head, which draws at twice that."""

_NUM_CONVOLUTIONS = 4
_POSITIVE_SHARE = 0.25
_LEAST_SIDE_PX = 1e-2


class StageSettings(NamedTuple):
    """What makes one stage different from the others."""

    iou: float
    """Least overlap of a box and an object that make a match."""
    weights: tuple[float, float, float, float]
    """Factors of the shifts of x and y and of the logarithms of width and height."""


STAGES = (
    StageSettings(0.5, (10.0, 10.0, 5.0, 5.0)),
    StageSettings(0.6, (20.0, 20.0, 10.0, 10.0)),
    StageSettings(0.7, (30.0, 30.0, 15.0, 15.0)),
)
"""Of Cascade R-CNN; Mask R-CNN has the first alone."""


class Detected(NamedTuple):
    """The objects found in a picture, best first."""

    boxes: Tensor
    """(n, 4) xyxy in pixels, float32."""
    scores: Tensor
    """(n,) from 0 to 1."""
    labels: Tensor
    """(n,) from 1."""


class BoxSamples(NamedTuple):
    """Boxes of every picture in training, and what each is."""

    boxes: Boxes
    """(B, n) of them."""
    labels: Tensor
    """(B, n) from 1; 0 is background, and rows that are not valid."""
    matches: Tensor
    """(B, n) the object of each box; of no meaning for background."""
    matched: Tensor
    """(B, n, 4) the boxes of these objects."""


class BoxStage(nn.Module):
    """Four convolutions with norms and a layer: scores of the classes, and one better box.

    Args:
        in_channels: of what is pooled from the pyramid.
        num_classes: K, without background.
        channels: of the convolutions.
        width: of the layer.
        settings: of the stage.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int,
        width: int,
        settings: StageSettings,
    ) -> None:
        super().__init__()
        self.head = FastRCNNConvFCHead(
            (in_channels, BOX_CELLS, BOX_CELLS),
            [channels] * _NUM_CONVOLUTIONS,
            [width],
            norm_layer=ChannelNorm,
        )
        # initialised as torch does: the published 0.01 and 0.001 are for layers 1024 wide and long
        # training, and let heads 96 wide learn no class in 200 steps
        self.class_logits = nn.Linear(width, num_classes + 1)
        self.box_deltas = nn.Linear(width, 4)
        self.coder = BoxCoder(settings.weights)
        self.iou = settings.iou

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 logits (n, K + 1), background first, and box deltas (n, 4)."""
        hidden = self.head(pooled)
        return self.class_logits(hidden).float(), self.box_deltas(hidden).float()

    def decode(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Return the boxes (n, 4) that deltas make of boxes."""
        decoded: Tensor = self.coder.decode_single(deltas, boxes)
        return decoded

    def label(self, boxes: Boxes, objects: Objects) -> BoxSamples:
        """Return what boxes (B, n) are, given the objects of their pictures."""
        matches = match(objects.boxes, boxes.xyxy)
        labels = pick(objects.labels, matches.rows)
        is_object = (matches.overlaps >= self.iou) & boxes.valid
        matched = pick(objects.boxes.xyxy, matches.rows)
        return BoxSamples(boxes, labels.where(is_object, 0), matches.rows, matched)

    def losses(self, logits: Tensor, deltas: Tensor, samples: BoxSamples) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of the classes and the L1 loss of the boxes of objects.

        Both are means over all boxes, background too, as in the published detection.
        """
        boxes, valid = samples.boxes.xyxy.flatten(0, 1), samples.boxes.valid.flatten()
        labels = samples.labels.flatten()
        num = valid.sum().clamp(min=1)
        wanted = self.coder.encode_single(samples.matched.flatten(0, 1), boxes)
        wanted = wanted.where(labels[:, None] > 0, deltas.detach())
        loss_class = F.cross_entropy(logits, labels, reduction="none").where(valid, 0).sum()
        return loss_class / num, F.l1_loss(deltas, wanted, reduction="sum") / num


class CascadeHeads(nn.Module):
    """Box stages, each of which starts from the boxes of the one before, then masks.

    Args:
        in_channels: of the pyramid.
        num_classes: K, without background.
        strides: of the pyramid's levels that boxes are pooled from, in pixels.
        stages: STAGES, or the first alone.
        channels, width: of the heads.
        num_sampled: boxes of a picture that are trained on, a quarter of them objects at most.
        score_threshold, nms_threshold, max_detections: which boxes of a picture are kept: those
            scored above, without those that overlap a better one of their class by more, best
            first.
        mask_threshold: least probability of a pixel of an object.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        strides: Sequence[int],
        stages: Sequence[StageSettings],
        channels: int,
        width: int,
        num_sampled: int,
        score_threshold: float,
        nms_threshold: float,
        max_detections: int,
        mask_threshold: float,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            BoxStage(in_channels, num_classes, channels=channels, width=width, settings=one)
            for one in stages
        )
        self.mask_head = MaskHead(in_channels, num_classes, channels=channels)
        self.strides = tuple(strides)
        self.num_sampled = num_sampled
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections
        self.mask_threshold = mask_threshold

    @property
    def _stages(self) -> list[BoxStage]:
        return cast(list[BoxStage], list(self.stages))

    def losses(
        self,
        levels: Sequence[Tensor],
        proposals: Boxes,
        sizes: Tensor,
        objects: Objects,
        masks: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Return loss_classifier and loss_box_reg, numbered from 1 with stages, and loss_mask.

        Args:
            levels: maps (B, C, h, w) at the strides.
            proposals: of every picture.
            sizes: (B, 2) float32: height and width of every picture.
            objects: of every picture.
            masks: (m, H, W) of the objects of every picture.
        """
        samples = sampled = self._sample(proposals, objects)
        losses: dict[str, Tensor] = {}
        for k, stage in enumerate(self._stages):
            pooled = self._pool(levels, list(samples.boxes.xyxy), BOX_CELLS)
            # every stage's gradient reaches the pyramid; the mean does
            pooled = torch.lerp(pooled.detach(), pooled, 1 / len(self.stages))
            logits, deltas = stage(pooled)
            number = f"_{k + 1}" if len(self.stages) > 1 else ""
            losses[f"loss_classifier{number}"], losses[f"loss_box_reg{number}"] = stage.losses(
                logits, deltas, samples
            )
            if k + 1 < len(self.stages):
                samples = self._next(k, deltas.detach(), samples, sizes, objects)
        is_object = sampled.labels > 0
        num_objects = is_object.sum(dim=1).tolist()
        boxes = torch.split(sampled.boxes.xyxy[is_object], num_objects)
        matches = torch.split(sampled.matches[is_object], num_objects)
        pooled = self._pool(levels, boxes, MASK_CELLS)
        mask_logits = self.mask_head(pooled, sampled.labels[is_object])
        losses["loss_mask"] = mask_loss(mask_logits, boxes, matches, masks)
        return losses

    def detect(
        self,
        levels: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Return boxes, scores, labels and masks (n, H, W) bool of every picture, best first.

        Args:
            levels: as in `losses`.
            proposals: (n, 4) xyxy of every picture.
            sizes: (height, width) of every picture.
        """
        boxes = list(proposals)
        counts = [len(one) for one in boxes]
        shares = levels[0].new_zeros(())
        for stage in self._stages:
            logits, deltas = stage(self._pool(levels, boxes, BOX_CELLS))
            shares = shares + logits.softmax(dim=-1) / len(self.stages)
            decoded = torch.split(stage.decode(deltas, torch.cat(boxes)), counts)
            boxes = [clip_boxes_to_image(*both) for both in zip(decoded, sizes, strict=True)]
        found = [
            self._select(one, scores)
            for one, scores in zip(boxes, torch.split(shares, counts), strict=True)
        ]
        pooled = self._pool(levels, [one.boxes for one in found], MASK_CELLS)
        logits = self.mask_head(pooled, torch.cat([one.labels for one in found]))
        drawn = torch.split(logits.sigmoid(), [len(one.labels) for one in found])
        return [
            {
                **one._asdict(),
                "masks": paste_masks(mask, one.boxes, size, threshold=self.mask_threshold),
            }
            for one, mask, size in zip(found, drawn, sizes, strict=True)
        ]

    def _sample(self, proposals: Boxes, objects: Objects) -> BoxSamples:
        """Return what the first stage trains on: some proposals and objects of every picture."""
        together = Boxes(
            *(torch.cat(both, dim=1) for both in zip(proposals, objects.boxes, strict=True))
        )
        labelled = self._stages[0].label(together, objects)
        is_object = labelled.labels > 0
        rows, valid = sample(
            is_object, together.valid & ~is_object, self.num_sampled, _POSITIVE_SHARE
        )
        boxes = Boxes(pick(together.xyxy, rows), valid)
        labels = pick(labelled.labels, rows).where(valid, 0)
        return BoxSamples(boxes, labels, pick(labelled.matches, rows), pick(labelled.matched, rows))

    def _next(
        self, k: int, deltas: Tensor, samples: BoxSamples, sizes: Tensor, objects: Objects
    ) -> BoxSamples:
        """Return what the stage after stage k trains on: the boxes that stage k made."""
        former = samples.boxes
        decoded = self._stages[k].decode(deltas, former.xyxy.flatten(0, 1))
        xyxy = clip(decoded.view_as(former.xyxy), sizes)
        has_area = (xyxy[..., 2:] > xyxy[..., :2]).all(dim=-1)
        return self._stages[k + 1].label(Boxes(xyxy, former.valid & has_area), objects)

    def _pool(self, levels: Sequence[Tensor], boxes: Sequence[Tensor], cells: int) -> Tensor:
        """Return what lies in the boxes, float32 (n, C, cells, cells), of a level for each size.

        torchvision's MultiScaleRoIAlign takes a map's values to lie at the corners of its pixels
        (aligned=False) and guesses strides from the first picture it sees.
        """
        everything = torch.cat(list(boxes))
        nums = torch.tensor([len(one) for one in boxes])
        picture = torch.arange(len(boxes)).repeat_interleave(nums).to(everything)
        rois = torch.cat((picture[:, None], everything), dim=1)
        least, most = (round(math.log2(stride)) for stride in (self.strides[0], self.strides[-1]))
        of_level = LevelMapper(least, most)([everything])
        order = of_level.argsort(stable=True)
        which = torch.arange(len(levels), device=of_level.device)
        counts = (of_level == which[:, None]).sum(dim=1).tolist()
        pooled = [
            roi_align(level, some, cells, 1 / stride, aligned=True)
            for level, stride, some in zip(
                levels, self.strides, torch.split(rois[order], counts), strict=True
            )
        ]
        # the layout that norms over channels read without copies
        whole = torch.empty(
            (len(rois), levels[0].shape[1], cells, cells),
            device=rois.device,
            memory_format=torch.channels_last,
        )
        return whole.index_copy_(0, order, torch.cat(pooled))

    def _select(self, boxes: Tensor, shares: Tensor) -> Detected:
        """Return the objects among boxes (n, 4) with shares (n, K + 1) of the classes."""
        rows, classes = torch.where(shares[:, 1:] > self.score_threshold)
        scores, boxes, labels = shares[rows, classes + 1], boxes[rows], classes + 1
        is_box = (boxes[:, 2:] - boxes[:, :2] >= _LEAST_SIDE_PX).all(dim=1)
        scores, boxes, labels = scores[is_box], boxes[is_box], labels[is_box]
        kept = batched_nms(boxes, scores, labels, self.nms_threshold)[: self.max_detections]
        return Detected(boxes[kept], scores[kept], labels[kept])
