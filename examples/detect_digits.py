"""Find handwritten digits: Vim and a feature pyramid under torchvision's detector FCOS.

Run:    pip install 'visionmamba[train]' && python examples/detect_digits.py
Learns on scenes of scikit-learn's real digits, which need no download, and prints how many held-out
digits are found; about 15 seconds on two CPU cores.
"""

import argparse
from collections import OrderedDict

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import pil_to_tensor

import visionmamba  # noqa: F401  # makes Vim known to timm
from visionmamba.data import Digits
from visionmamba.data.sets import ImageSet
from visionmamba.models.pyramid import FeaturePyramid

SIDE_PX, DIGIT_PX, PATCH_PX = 64, 24, 16
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # quarters of a scene


class VimPyramid(nn.Module):
    """Any Vim of timm with a pyramid of four levels, as torchvision's detectors want a backbone.

    Args:
        name: of the model.
        options: for timm.create_model.
    """

    def __init__(self, name: str, **options: object) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(-1,), **options)
        (channels,) = self.body.feature_info.channels()
        self.pyramid = FeaturePyramid(channels, out_channels=64)
        self.out_channels = self.pyramid.out_channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return maps at a quarter of the patch stride, half, the stride itself and twice it."""
        levels = self.pyramid(self.body(images))
        return OrderedDict((str(i), level) for i, level in enumerate(levels))


def draw_scenes(digits: ImageSet, count: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return pictures (3, 64, 64) in [0, 1] with up to four digits, and their boxes."""
    scenes, targets = [], []
    for _ in range(count):
        scene, boxes = torch.rand(1, SIDE_PX, SIDE_PX) * 0.3, []
        for row, column in CORNERS:
            if len(boxes) and torch.rand(()) < 0.5:
                continue
            index = int(torch.randint(len(digits), ()))
            digit = pil_to_tensor(digits.image(index).convert("L"))[None] / 255
            digit = F.interpolate(digit, size=(DIGIT_PX, DIGIT_PX), mode="bilinear")[0]
            free = SIDE_PX // 2 - DIGIT_PX
            top = row * SIDE_PX // 2 + int(torch.randint(free, ()))
            left = column * SIDE_PX // 2 + int(torch.randint(free, ()))
            scene[:, top : top + DIGIT_PX, left : left + DIGIT_PX] += digit
            boxes.append([left, top, left + DIGIT_PX, top + DIGIT_PX])
        scenes.append(scene.clamp(max=1).expand(3, -1, -1))
        labels = torch.ones(len(boxes), dtype=torch.int64)
        targets.append({"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": labels})
    return scenes, targets


def main(steps: int = 60) -> tuple[float, float]:
    """Train for a number of steps; return the share of held-out digits found, and of true finds."""
    torch.manual_seed(0)
    digits = Digits().build()
    # The options make a small model; without them it is the published size.
    backbone = VimPyramid("vim_tiny_patch16_224", img_size=SIDE_PX, embed_dim=64, depth=4)
    strides = (PATCH_PX // 4, PATCH_PX // 2, PATCH_PX, 2 * PATCH_PX)
    model = FCOS(
        backbone,
        num_classes=2,  # background and digit
        min_size=SIDE_PX,
        max_size=SIDE_PX,
        anchor_generator=AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * len(strides)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        losses = model(*draw_scenes(digits.train, 8))
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    scenes, targets = draw_scenes(digits.val, 32)
    with torch.inference_mode():
        answers = model.eval()(scenes)
    boxes = [answer["boxes"][answer["scores"] > 0.5] for answer in answers]
    overlaps = [box_iou(t["boxes"], found) > 0.5 for t, found in zip(targets, boxes, strict=True)]
    recall = torch.cat([one.any(dim=1) for one in overlaps]).float().mean().item()
    precision = torch.cat([one.any(dim=0) for one in overlaps]).float().mean().item()
    print(f"held-out digits found: {recall:.3f}; finds that are digits: {precision:.3f}")
    return recall, precision


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
