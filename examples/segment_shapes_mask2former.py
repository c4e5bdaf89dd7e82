"""Segment drawn shapes with Mask2Former of transformers over a Vim.

Run:    pip install "visionmamba[segmentation]" && python examples/segment_shapes_mask2former.py
Any model of transformers that takes a backbone's configuration is built this way; that Vim is not
among the backbones it knows of, as it says, does no harm. Learns discs, squares and triangles,
which need no download, and prints how well held-out ones are covered; about 25 seconds on one core.
"""

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from visionmamba.data import SegmentationSet, Shapes
from visionmamba.models import VimConfig
from visionmamba.models.transformers import VimBackboneConfig

SIDE_PX = 64


def build(num_classes: int) -> Mask2FormerForUniversalSegmentation:
    """Return a small Mask2Former; without the options it is the published size.

    To start from a classifier, call visionmamba.models.load_backbone(model, weights) on it.
    """
    vim = VimConfig(image_size=SIDE_PX, patch_size=8, d_model=64, depth=4, readout="mean")
    config = Mask2FormerConfig(
        backbone_config=VimBackboneConfig(vim=vim),
        num_labels=num_classes,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        encoder_feedforward_dim=64,
        decoder_layers=2,
        dim_feedforward=64,
        num_attention_heads=2,
        num_queries=8,
        train_num_points=256,
    )
    return Mask2FormerForUniversalSegmentation(config)


def read(pictures: SegmentationSet, indices: list[int]) -> tuple[Tensor, Tensor]:
    """Return images (B, 3, H, W) in [-1, 1] and masks (B, H, W) of class indices."""
    images = torch.stack([pil_to_tensor(pictures.image(index)) for index in indices])
    masks = torch.stack([torch.from_numpy(pictures.mask(index)) for index in indices])
    return images / 127.5 - 1, masks.long()


def segment(model: Mask2FormerForUniversalSegmentation, images: Tensor) -> Tensor:
    """Return masks (B, H, W): each pixel's class by the masks of all queries and their classes."""
    outputs = model(images)
    classes = outputs.class_queries_logits.softmax(-1)[..., :-1]  # the last is "no object"
    masks = outputs.masks_queries_logits.sigmoid()
    scores = torch.einsum("bqk,bqhw->bkhw", classes, masks)
    return F.interpolate(scores, size=images.shape[-2:], mode="bilinear").argmax(dim=1)


def main(steps: int = 200) -> float:
    """Train for a number of steps and return the mean intersection over union on held-out ones."""
    torch.manual_seed(0)
    shapes = Shapes(num_val=64).build()
    num_classes = len(shapes.train.class_names)
    model = build(num_classes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        images, masks = read(shapes.train, torch.randint(len(shapes.train), (8,)).tolist())
        found = [mask.unique() for mask in masks]  # the classes in each picture
        each = [
            (mask == classes[:, None, None]).float()
            for mask, classes in zip(masks, found, strict=True)
        ]
        loss = model(images, mask_labels=each, class_labels=found).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    images, masks = read(shapes.val, list(range(len(shapes.val))))
    with torch.inference_mode():
        found = segment(model.eval(), images)
    confusion = torch.bincount((masks * num_classes + found).flatten(), minlength=num_classes**2)
    confusion = confusion.reshape(num_classes, num_classes)
    both, rows, columns = confusion.diag(), confusion.sum(0), confusion.sum(1)
    miou = (both / (rows + columns - both)).mean().item()
    print(f"mean intersection over union on held-out shapes: {miou:.3f}")
    return miou


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
