"""AdamW with the parameter groups and the learning rate of transformer training."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from visionmamba.training.backbone import backbone_of

_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers)\.(\d+)\.")
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:patch_embed(?:ding)?|pos_embed|position_embedding|(?:class|cls|dist|reg)_token)"
)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, linear warm-up, then a fall; learning rates are of a whole step, never rescaled."""

    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["step", "linear", "drops", "published"] = "step"
    """"step" changes the rate at every step, with a cosine from the end of the warm-up. "linear"
    falls straight over all steps, and the warm-up scales that line: the published segmentation.
    "drops" stays at the peak but for drops_at: the published detection.
    "published" is what the authors' classification does: one rate an epoch, that of the epoch
    before (so that epochs 1 and 2 both run at warmup_lr), on a cosine that begins with epoch 1."""
    drops_at: tuple[float, ...] = ()
    """Shares of all steps, growing, at which "drops" multiplies the learning rate by drop_factor;
    no other schedule has any."""
    drop_factor: float = 0.1
    """What is left of the learning rate at each of drops_at."""
    min_lr_share: float = 0.01
    """Learning rate at the end, as a share of the peak; of no effect with "drops"."""
    min_lr: float | None = None
    """Learning rate at the end; overrides min_lr_share."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; overrides warmup_epochs, and is not for "published"."""
    warmup_lr: float = 0.0
    """Learning rate that the warm-up begins from."""
    layer_decay: float | None = None
    """Factor of the learning rate from one block to the one below: the head learns with lr, block k
    of n with lr * layer_decay**(n - k), k from 0, patch and position embedding with
    lr * layer_decay**(n + 1). Blocks are those of model.backbone where there is one. None gives all
    the same."""
    layer_decay_reach: Literal["blocks", "embeddings"] = "blocks"
    """"embeddings" leaves the blocks at lr, as the authors' segmentation code does, which looks for
    them under a name that they do not have."""
    weight_decay: float = 0.05
    """On matrices; biases, other 1-D parameters and what no_weight_decay() of the model and of its
    parts names are exempt."""
    decay_a_log: bool = False
    """True also decays the A_log of the state-space models, as the published training does."""
    decay_embeddings: bool = False
    """True also decays what no_weight_decay() names, as the authors' segmentation code does."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of gradient and squared gradient."""
    eps: float = 1e-8
    """Added to the root of the squared gradient."""
    clip_norm: float | None = 1.0
    """Largest norm of the whole gradient; None never clips."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.min_lr_share <= 1:
            raise ValueError(f"min_lr_share must lie between 0 and 1, got {self.min_lr_share}")
        if list(self.drops_at) != sorted(set(self.drops_at)) or not all(
            0 < share < 1 for share in self.drops_at
        ):
            raise ValueError(
                f"drops_at must be growing shares of the run between 0 and 1, got {self.drops_at}"
            )
        if bool(self.drops_at) != (self.schedule == "drops"):
            raise ValueError(
                f'schedule "drops" goes with drops_at, got schedule="{self.schedule}" and '
                f"drops_at={self.drops_at}; set both or none"
            )
        if not 0 < self.drop_factor < 1:
            raise ValueError(f"drop_factor must lie between 0 and 1, got {self.drop_factor}")
        for name in ("warmup_epochs", "warmup_steps", "weight_decay"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.schedule == "published" and self.warmup_steps is not None:
            raise ValueError(
                f'schedule "published" has one rate an epoch, got warmup_steps={self.warmup_steps};'
                " give warmup_epochs instead"
            )
        for name in ("min_lr", "warmup_lr"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= self.lr:
                raise ValueError(f"{name} must lie between 0 and lr={self.lr}, got {value}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"layer_decay must be above 0, at most 1, or None, got {self.layer_decay}"
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be positive or None, got {self.clip_norm}")

    def build(
        self, model: nn.Module, *, steps_per_epoch: int, epochs: int
    ) -> tuple[torch.optim.AdamW, LambdaLR]:
        """Returns the optimizer of a model and its schedule, to be advanced once a step.

        Raises:
            ValueError: layer_decay is set and the model has no numbered blocks.
        """
        on_gpu = all(parameter.is_cuda for parameter in model.parameters())
        optimizer = torch.optim.AdamW(
            self._groups_with_rates(model),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=True if on_gpu else None,  # a launch for many parameters
        )
        if self.schedule == "published":
            return optimizer, LambdaLR(
                optimizer,
                lambda step: self.published_lr_share(step // steps_per_epoch, epochs=epochs),
            )
        num_steps = steps_per_epoch * epochs
        num_warmup = self.warmup_steps
        if num_warmup is None:
            num_warmup = round(self.warmup_epochs * steps_per_epoch)
        num_warmup = min(num_warmup, num_steps)
        shares = {"linear": self.linear_lr_share, "drops": self.dropping_lr_share}
        share = shares.get(self.schedule, self.lr_share)
        return optimizer, LambdaLR(
            optimizer, lambda step: share(step, num_warmup=num_warmup, num_steps=num_steps)
        )

    def groups(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Returns the parameters that are decayed and those that are exempt, by name."""
        names_exempt = set() if self.decay_embeddings else _names_exempt(model)
        decayed: dict[str, nn.Parameter] = {}
        exempt: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            is_exempt = (
                parameter.ndim <= 1
                or name.endswith(".bias")
                or name in names_exempt
                or (name.endswith("A_log") and not self.decay_a_log)
            )
            (exempt if is_exempt else decayed)[name] = parameter
        return decayed, exempt

    def layer_scales(self, model: nn.Module) -> dict[str, float]:
        """Returns the factor of each parameter's learning rate, by name; see layer_decay.

        Raises:
            ValueError: layer_decay is set and no parameter has a name like blocks.3.weight.
        """
        names = [name for name, _ in model.named_parameters()]
        if self.layer_decay is None:
            return dict.fromkeys(names, 1.0)
        prefix, _ = backbone_of(model)
        found = {name: _BLOCK.search(name) for name in names if name.startswith(prefix)}
        numbers = {name: int(match[1]) for name, match in found.items() if match}
        if not numbers:
            raise ValueError(
                f"layer_decay={self.layer_decay} needs parameters named blocks.0, blocks.1, ...; "
                f"{type(model).__name__} has none: set it to None"
            )
        depth = max(numbers.values()) + 1
        scales: dict[str, float] = {}
        for name in names:
            above = 0
            if name in numbers:
                above = depth - numbers[name] if self.layer_decay_reach == "blocks" else 0
            elif name in found and _EMBEDDING.search(name):
                above = depth + 1
            scales[name] = self.layer_decay**above
        return scales

    def lr_share(self, step: int, *, num_warmup: int, num_steps: int) -> float:
        """Returns the learning rate of a zero-based step as a share of the peak."""
        start = self.warmup_lr / self.lr
        if step < num_warmup:
            return start + (1 - start) * (step + 1) / num_warmup
        progress = min((step - num_warmup) / max(num_steps - num_warmup, 1), 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self._end_share + (1 - self._end_share) * cosine

    def linear_lr_share(self, step: int, *, num_warmup: int, num_steps: int) -> float:
        """Returns the learning rate of a zero-based step of "linear" as a share of the peak."""
        line = 1 - (1 - self._end_share) * min(step / num_steps, 1.0)
        return line * self._warmup_share(step, num_warmup)

    def dropping_lr_share(self, step: int, *, num_warmup: int, num_steps: int) -> float:
        """Returns the learning rate of a zero-based step of "drops" as a share of the peak."""
        num_drops = sum(step >= round(share * num_steps) for share in self.drops_at)
        return self.drop_factor**num_drops * self._warmup_share(step, num_warmup)

    def published_lr_share(self, epoch: int, *, epochs: int) -> float:
        """Returns the learning rate of a zero-based epoch of "published" as a share of the peak."""
        start, last = self.warmup_lr / self.lr, max(epoch - 1, 0)
        if last < self.warmup_epochs:
            return start + (1 - start) * last / self.warmup_epochs
        cosine = 0.5 * (1 + math.cos(math.pi * last / epochs))
        return self._end_share + (1 - self._end_share) * cosine

    def _warmup_share(self, step: int, num_warmup: int) -> float:
        """Returns what a warm-up that scales the schedule leaves of it, from step 0 on."""
        if step >= num_warmup:
            return 1.0
        start = self.warmup_lr / self.lr
        return start + (1 - start) * step / num_warmup

    @property
    def _end_share(self) -> float:
        return self.min_lr_share if self.min_lr is None else self.min_lr / self.lr

    def _groups_with_rates(self, model: nn.Module) -> list[dict[str, Any]]:
        """Returns AdamW's groups: those decayed first, each by falling learning rate."""
        scales = self.layer_scales(model)
        groups: list[dict[str, Any]] = []
        for named, weight_decay in zip(self.groups(model), (self.weight_decay, 0.0), strict=True):
            for scale in sorted({scales[name] for name in named}, reverse=True):
                parameters = [value for name, value in named.items() if scales[name] == scale]
                groups.append(
                    {
                        "params": parameters,
                        "weight_decay": weight_decay,
                        "lr": self.lr * scale,
                    }
                )
        return groups


def _names_exempt(model: nn.Module) -> set[str]:
    """Returns what the model and its parts exempt, by the model's names."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "no_weight_decay", set[str])()
    }
