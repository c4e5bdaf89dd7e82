"""Segment handwritten digits: Vim as encoder of segmentation-models-pytorch's DPT.

Run:    pip install visionmamba[train] segmentation-models-pytorch
        python examples/segment_digits.py
Learns on scenes of scikit-learn's real digits, which need no download, and prints how well held-out
digits are covered; about 25 seconds on two CPU cores.
"""

import argparse

import segmentation_models_pytorch as smp
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

import visionmamba  # noqa: F401  # makes Vim known to timm, and so to everything built on timm
from visionmamba.data import Digits
from visionmamba.data.sets import ImageSet

SIDE_PX, DIGIT_PX, DIGITS_A_SCENE = 64, 24, 3


def draw_scenes(digits: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    """Return scenes (count, 3, 64, 64) in [-1, 1] and masks (count, 1, 64, 64) of their digits."""
    scenes = torch.rand(count, 1, SIDE_PX, SIDE_PX) * 0.3
    for scene in scenes:
        for index in torch.randint(len(digits), (DIGITS_A_SCENE,)).tolist():
            digit = pil_to_tensor(digits.image(index).convert("L"))[None] / 255
            digit = F.interpolate(digit, size=(DIGIT_PX, DIGIT_PX), mode="bilinear")[0]
            top, left = torch.randint(SIDE_PX - DIGIT_PX, (2,)).tolist()
            place = scene[:, top : top + DIGIT_PX, left : left + DIGIT_PX]
            torch.maximum(place, digit, out=place)
    return scenes.expand(-1, 3, -1, -1) * 2 - 1, (scenes > 0.4).float()


def main(steps: int = 100) -> float:
    """Train for a number of steps and return the intersection over union on held-out digits."""
    torch.manual_seed(0)
    digits = Digits().build()
    # The options after encoder_weights make a small model; without them it is the published one.
    model = smp.DPT(
        "tu-vim_tiny_patch16_224",
        encoder_weights=None,  # True downloads the published weights
        decoder_intermediate_channels=(16, 32, 64, 64),
        decoder_fusion_channels=32,
        img_size=SIDE_PX,
        patch_size=8,
        embed_dim=48,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        scenes, masks = draw_scenes(digits.train, 8)
        loss = F.binary_cross_entropy_with_logits(model(scenes), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    scenes, masks = draw_scenes(digits.val, 64)
    with torch.inference_mode():
        found = model.eval()(scenes) > 0
    wanted = masks > 0
    iou = ((found & wanted).sum() / (found | wanted).sum()).item()
    print(f"intersection over union on held-out digits: {iou:.3f}")
    return iou


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
