"""Training on two pictures at once: mixup and CutMix."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mixes each picture of a batch with another one, and their labels likewise; default: never.

    mixup (arXiv 1710.09412) adds them, CutMix (arXiv 1905.04899) pastes a rectangle. One draw a
    batch, from numpy's global generator, as in timm.
    """

    mixup: float = 0.0
    """Parameter alpha of the Beta distribution of mixup's share; 0 never uses mixup."""
    cutmix: float = 0.0
    """Parameter alpha of the Beta distribution of CutMix's area; 0 never uses CutMix."""
    probability: float = 1.0
    """Share of the batches that are mixed."""
    switch_probability: float = 0.5
    """Share of the mixed batches that CutMix takes when both are in use."""

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name):g}")
        for name in ("probability", "switch_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name):g}")

    @property
    def is_active(self) -> bool:
        """Whether any batch is mixed."""
        return bool((self.mixup or self.cutmix) and self.probability)

    def mix(self, images: Tensor, labels: Tensor, *, num_classes: int) -> tuple[Tensor, Tensor]:
        """Returns mixed images and the shares of the classes, without changing its arguments.

        Args:
            images: (B, C, H, W), B even.
            labels: (B,) int64.
            num_classes: classes K.

        Returns:
            (B, C, H, W) and (B, K) float32, rows of which sum to 1; unmixed when inactive.

        Raises:
            ValueError: B is odd.
        """
        if not self.is_active:
            return images, F.one_hot(labels, num_classes).float()
        if len(images) % 2:
            raise ValueError(
                f"mixup and CutMix need an even number of images in a batch, got {len(images)}; "
                "change the batch size"
            )
        from timm.data.mixup import Mixup

        mixup = Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.probability,
            switch_prob=self.switch_probability,
            label_smoothing=0.0,
            num_classes=num_classes,
        )
        mixed: tuple[Tensor, Tensor] = mixup(images.clone(), labels)
        return mixed
