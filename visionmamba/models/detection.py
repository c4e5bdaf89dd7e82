"""Detectors with instance masks: a Vim or a DeiT, a simple feature pyramid, Cascade Mask R-CNN.

DetectorConfig and DetectionModel. Not here: proposals (proposals.py), box heads (cascade.py), masks
(instance_masks.py), attention in windows (windows.py), weights to start from (start.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionmamba.models.boxes import Objects
from visionmamba.models.cascade import STAGES, CascadeHeads
from visionmamba.models.config import VimConfig, names_valid_options
from visionmamba.models.deit import DeiTConfig
from visionmamba.models.proposals import ProposalNetwork
from visionmamba.models.pyramid import FeaturePyramid, OverBackbone
from visionmamba.models.vim import Vim
from visionmamba.models.windows import WindowedDeiT

if TYPE_CHECKING:
    from visionmamba.models.weights import WeightsHeader

DetectionHead = Literal["cascade", "mask"]

_NUM_LEVELS = 5  # those of the pyramid, and one that only proposals are made from


@names_valid_options
@dataclass(frozen=True, kw_only=True)
class DetectorConfig(OverBackbone):
    """Everything that defines a detector; `build()` or `DetectionModel(config)` makes it.

    The defaults are the published detection. A wrong option raises TypeError, a wrong value
    ValueError, both naming the valid ones.
    """

    backbone: VimConfig | DeiTConfig
    """What reads the picture. Its classifier is left out: num_classes becomes 0."""
    num_classes: int
    """Classes K of an object, without background."""
    head: DetectionHead = "cascade"
    """"cascade": three box stages (IoU 0.5, 0.6, 0.7) and masks; "mask": Mask R-CNN, the first of
    them and masks. Both move a box in the same way for every class."""
    window_size: int | None = None
    """Side in patches of the windows that the attention of a DeiT is confined to, as in ViTDet
    (there 14); None is global attention. A Vim has none."""
    num_global: int = 4
    """Blocks of a DeiT with windows that attend globally, the last of each equal part."""
    channels: int = 256
    """Channels of pyramid and heads."""
    box_width: int = 1024
    """Width of the last layer of a box head."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Side in pixels of the anchors at each level, from stride 4 to stride 64 with patches of 16;
    each with the ratios 0.5, 1 and 2."""
    num_proposals: int = 1000
    """Most boxes of a picture that the box heads see."""
    num_sampled: int = 512
    """Boxes of a picture that the box heads train on, a quarter of them objects at most."""
    score_threshold: float = 0.05
    """Objects scored lower are not reported."""
    nms_threshold: float = 0.5
    """Overlap with a better one of its class above which an object is not reported."""
    max_detections: int = 100
    """Most objects of a picture that are reported, best first."""
    mask_threshold: float = 0.5
    """Least probability of a pixel of an object."""
    pad_to_image_size: bool = True
    """Whether smaller pictures are padded to the backbone's image_size, as published, so that its
    positions are those of training. False pads to the next stride only."""

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, VimConfig | DeiTConfig):
            raise TypeError(
                "backbone must be a VimConfig or a DeiTConfig, e.g. VimConfig.tiny(); got "
                f"{type(self.backbone).__name__}"
            )
        object.__setattr__(self, "backbone", replace(self.backbone, num_classes=0))
        object.__setattr__(self, "anchor_sizes", tuple(self.anchor_sizes))
        if self.head not in get_args(DetectionHead):
            raise ValueError(f"head must be 'cascade' or 'mask'; got {self.head!r}")
        for name in (
            "num_classes",
            "num_global",
            "channels",
            "box_width",
            "num_proposals",
            "num_sampled",
            "max_detections",
        ):
            _check_int(name, getattr(self, name))
        if self.window_size is not None:
            _check_int("window_size", self.window_size)
            if isinstance(self.backbone, VimConfig):
                raise ValueError(
                    f"window_size {self.window_size} is for a DeiT; a Vim reads the whole picture: "
                    "leave it out"
                )
        if len(self.anchor_sizes) != _NUM_LEVELS:
            raise ValueError(
                f"anchor_sizes must be {_NUM_LEVELS} sizes in pixels, one a level; "
                f"got {self.anchor_sizes}"
            )
        for size in self.anchor_sizes:
            _check_int("each of anchor_sizes", size)
        for name in ("score_threshold", "nms_threshold", "mask_threshold"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1; got {value!r}")
        if self.stride not in (4, 8, 16, 32) or self.stride > self.backbone.patch_size:
            raise ValueError(
                "the backbone's patches must be at stride 4, 8, 16 or 32 px and leave no pixel "
                f"out; got patches of {self.backbone.patch_size} at stride {self.stride}"
            )

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the five levels, in pixels: from a quarter of the backbone's to four times that."""
        return tuple(self.stride * 2**k // 4 for k in range(_NUM_LEVELS))

    def build(self) -> "DetectionModel":
        """Return a freshly initialised model."""
        return DetectionModel(self)


class DetectionModel(nn.Module):
    """Pictures in; losses out in training, objects with boxes and masks in evaluation.

    Every parameter gets a gradient from any batch, one without objects too. Losses and the
    arithmetic of boxes run in float32 under autocast.

    Args:
        config: all options; `DetectionModel(DetectorConfig(backbone=..., num_classes=80))`.

    Raises:
        TypeError: config is no DetectorConfig.
    """

    header: "WeightsHeader | None" = None
    """What the weights file said of classes and pictures; None for a model that was not loaded."""
    has_varying_shapes = True
    """How many boxes the heads see hangs on the pictures, so that no CUDA graph repeats it."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        if not isinstance(config, DetectorConfig):
            raise TypeError(f"DetectionModel takes a DetectorConfig; got {type(config).__name__}")
        self.config = config
        self.backbone = _bare_backbone(config)
        self.pyramid = FeaturePyramid(config.d_model, out_channels=config.channels)
        self.rpn = ProposalNetwork(
            config.channels,
            sizes=config.anchor_sizes,
            strides=config.strides,
            num_proposals=config.num_proposals,
        )
        self.heads = CascadeHeads(
            config.channels,
            config.num_classes,
            strides=config.strides[:-1],
            stages=STAGES if config.head == "cascade" else STAGES[:1],
            channels=config.channels,
            width=config.box_width,
            num_sampled=config.num_sampled,
            score_threshold=config.score_threshold,
            nms_threshold=config.nms_threshold,
            max_detections=config.max_detections,
            mask_threshold=config.mask_threshold,
        )

    @property
    def num_classes(self) -> int:
        """Classes of an object, without background."""
        return self.config.num_classes

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses in training, objects in evaluation.

        Inside, pictures are padded with zeros, below and to the right, to one size that all levels
        fit; boxes and masks are in the pixels of each picture.

        Args:
            images: pictures (in_channels, H, W), normalised, of any sizes.
            targets: in training, for every picture: boxes (n, 4) float32 xyxy in pixels, labels
                (n,) int64 from 1, masks (n, H, W); n may be 0. Objects with iscrowd are left out.

        Returns:
            In training loss_objectness, loss_rpn_box_reg, loss_mask and, with a number from 1 in a
            cascade, loss_classifier and loss_box_reg; their sum is to be minimised. In evaluation
            for every picture, best object first: boxes (n, 4), scores (n,), labels (n,) and masks
            (n, H, W) bool.

        Raises:
            ValueError: no or wrong pictures, no targets in training or of wrong shapes, or an
                object that has no area or an unknown label; the message names the picture.
        """
        sizes = self._check_images(images)
        objects = None
        if self.training:
            if targets is None or len(targets) != len(images):
                raise ValueError(
                    f"in training every picture needs its targets; got {len(images)} pictures and "
                    f"{'no' if targets is None else len(targets)} targets: give them, or call "
                    "model.eval() first"
                )
            crowds = [target["iscrowd"] for target in targets if "iscrowd" in target]
            # asked once for all pictures: each question waits for the device
            has_crowds = bool(crowds) and bool(torch.cat(crowds).any())
            objects = [
                _single_objects(target, size, has_crowds=has_crowds)
                for target, size in zip(targets, sizes, strict=True)
            ]
            self._check_targets(objects, targets)
        batch = self._pad(images, sizes)
        levels = self._levels(batch)
        # RoIAlign runs in float32; one conversion serves all of its calls
        pooled_from = [level.float() for level in levels[:-1]]
        limits = torch.tensor(sizes, dtype=torch.float32, device=batch.device)
        if objects is None:
            proposals, _ = self.rpn(levels, limits, None)
            return self.heads.detect(pooled_from, proposals.separate(), sizes)
        together = Objects.of(*([one[name] for one in objects] for name in ("boxes", "labels")))
        proposals, losses = self.rpn(levels, limits, together)
        masks = [one["masks"] for one in objects]
        return {**losses, **self.heads.losses(pooled_from, proposals, limits, together, masks)}

    def _levels(self, batch: Tensor) -> list[Tensor]:
        """Return the five maps of padded pictures, from the finest."""
        if isinstance(self.backbone, Vim):
            (last,) = self.backbone.features(batch, [len(self.backbone.blocks) - 1])
        else:
            last = self.backbone.last_map(batch)
        levels = self.pyramid([last.to(batch.dtype)])
        return [*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2)]

    def _pad(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Return a batch of pictures padded to one size; patches lie on the cells of the levels."""
        multiple = self.config.strides[-2]
        least = self.config.image_size if self.config.pad_to_image_size else 0
        least_sides = least if isinstance(least, tuple) else (least, least)
        height, width = (
            -(-max(largest, side) // multiple) * multiple
            for largest, side in zip(map(max, zip(*sizes, strict=True)), least_sides, strict=True)
        )
        overlap = self.config.backbone.patch_size - self.config.stride
        before = overlap // 2  # patches that overlap are centred on their cells
        first = images[0]
        batch = first.new_zeros((len(images), first.shape[0], height + overlap, width + overlap))
        for padded, image, (rows, columns) in zip(batch, images, sizes, strict=True):
            padded[:, before : before + rows, before : before + columns] = image
        return batch

    def _check_images(self, images: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Return (height, width) of every picture."""
        if not len(images):
            raise ValueError("images must be at least one picture; got none")
        for image in images:
            if image.dim() != 3 or image.shape[0] != self.config.in_channels or 0 in image.shape:
                raise ValueError(
                    f"images must be a list of ({self.config.in_channels}, height, width); got one "
                    f"of {tuple(image.shape)}"
                )
        return [(image.shape[1], image.shape[2]) for image in images]

    def _check_targets(
        self,
        objects: Sequence[dict[str, Tensor]],
        targets: Sequence[Mapping[str, Any]],
    ) -> None:
        boxes = torch.cat([one["boxes"] for one in objects])
        labels = torch.cat([one["labels"] for one in objects])
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1)
        is_known = (labels >= 1) & (labels <= self.num_classes)
        if bool((has_area & is_known).all()):
            return
        row = int((~(has_area & is_known)).nonzero()[0])
        for i, (one, target) in enumerate(zip(objects, targets, strict=True)):
            if row < len(one["boxes"]):
                name = f"image_id {int(target['image_id'])}" if "image_id" in target else f"{i}"
                raise ValueError(
                    f"picture {name} has an object with box {one['boxes'][row].tolist()} and label "
                    f"{int(one['labels'][row])}; boxes must be x1 < x2, y1 < y2 and labels from 1 "
                    f"to {self.num_classes}"
                )
            row -= len(one["boxes"])


def _bare_backbone(config: DetectorConfig) -> Vim | WindowedDeiT:
    """Return a fresh backbone without what a detector does not use."""
    if isinstance(config.backbone, DeiTConfig):
        return WindowedDeiT(
            config.backbone, window_size=config.window_size, num_global=config.num_global
        )
    backbone = config.backbone.build()
    backbone.norm = nn.Identity()  # type: ignore[assignment]
    backbone.register_readout = None
    return backbone


def _single_objects(
    target: Mapping[str, Any], size: tuple[int, int], *, has_crowds: bool
) -> dict[str, Tensor]:
    """Return boxes, labels and masks of a picture's objects without crowds."""
    missing = [name for name in ("boxes", "labels", "masks") if name not in target]
    if missing:
        raise ValueError(f"targets need boxes, labels and masks; one has no {' or '.join(missing)}")
    count = len(target["boxes"])
    for name, shape in (("boxes", (count, 4)), ("labels", (count,)), ("masks", (count, *size))):
        if target[name].shape != shape:
            raise ValueError(
                f"{name} of {count} objects in a picture of {size[0]}x{size[1]} must be {shape}; "
                f"got {tuple(target[name].shape)}"
            )
    is_single = target["iscrowd"] == 0 if has_crowds and "iscrowd" in target else slice(None)
    return {
        "boxes": target["boxes"][is_single].float(),
        "labels": target["labels"][is_single].to(torch.int64),
        "masks": target["masks"][is_single],
    }


def _check_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1; got {value!r}")
