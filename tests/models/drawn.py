"""Drawn pictures with boxes, labels and masks for tests of detectors."""

import torch
from torch import Tensor

SIDE_PX = 64


def draw_objects(count: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return pictures (3, 64, 64) of noise with a square and a disc each, and what is in them."""
    at = torch.arange(SIDE_PX) + 0.5
    y, x = torch.meshgrid(at, at, indexing="ij")
    images, targets = [], []
    for _ in range(count):
        squares = torch.randint(8, 12, (2,)).tolist()
        centres = torch.randint(14, 18, (2, 2)) + torch.tensor([[0, 0], [30, 30]])
        (a, b), (c, d) = centres.tolist()
        square = (torch.maximum((x - a).abs(), (y - b).abs()) < squares[0]).to(torch.uint8)
        disc = ((x - c) ** 2 + (y - d) ** 2 < squares[1] ** 2).to(torch.uint8)
        masks = torch.stack((square, disc))
        colours = torch.tensor([[2.0, 0, 0], [0, 2.0, 1.0]])
        images.append(torch.einsum("nhw,nc->chw", masks.float(), colours))
        images[-1] += 0.1 * torch.randn(3, SIDE_PX, SIDE_PX)
        targets.append(
            {
                "boxes": torch.stack([_box(mask) for mask in masks]),
                "labels": torch.tensor([1, 3]),
                "masks": masks,
            }
        )
    return images, targets


def _box(mask: Tensor) -> Tensor:
    rows, columns = mask.nonzero().unbind(1)
    corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return torch.stack(corners).float()
