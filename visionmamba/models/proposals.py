"""Region proposals: torchvision's network on a pyramid of any strides, in float32 under autocast.

What torchvision lacks is here; the network itself, matching, sampling and NMS are torchvision's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

ASPECT_RATIOS = (0.5, 1.0, 2.0)


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

    def forward(self, images: ImageList, levels: list[Tensor]) -> list[Tensor]:
        """Return the anchors (n, 4) of every picture, level after level, xyxy in pixels."""
        device = levels[0].device
        self.set_cell_anchors(torch.float32, device)
        grids = [level.shape[-2:] for level in levels]
        anchors = torch.cat(self.grid_anchors(grids, [(s, s) for s in self.strides]))
        return [anchors] * len(images.image_sizes)


class ProposalHead(RPNHead):  # type: ignore[misc]
    """torchvision's head with results in float32, whatever the convolutions run in."""

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return objectness (B, A, h, w) and box deltas (B, 4 A, h, w) of every level."""
        objectness, deltas = super().forward(levels)
        return [one.float() for one in objectness], [one.float() for one in deltas]


def proposal_network(
    channels: int, *, sizes: Sequence[int], strides: Sequence[int], num_proposals: int
) -> RegionProposalNetwork:
    """Return a region proposal network with the settings of the published detection.

    Two convolutions, IoU 0.7 and 0.3, 256 anchors a picture, NMS 0.7. The loss of boxes is smooth
    L1 with beta 1/9, torchvision's; the published detection has plain L1.

    Args:
        channels: of the levels.
        sizes, strides: of the anchors of each level, in pixels.
        num_proposals: most boxes of a picture; NMS gets as many of each level, in training twice
            as many.
    """
    return RegionProposalNetwork(
        Anchors(sizes, strides),
        ProposalHead(channels, len(ASPECT_RATIOS), conv_depth=2),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * num_proposals, "testing": num_proposals},
        post_nms_top_n={"training": num_proposals, "testing": num_proposals},
        nms_thresh=0.7,
    )
