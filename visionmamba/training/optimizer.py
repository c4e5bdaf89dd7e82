"""AdamW with the parameter groups and the learning rate of transformer training."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, linear warm-up, then a cosine down to a share of the peak, step by step."""

    lr: float = 1e-3
    """Peak learning rate."""
    min_lr_share: float = 0.01
    """Learning rate at the end, as a share of the peak."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up."""
    weight_decay: float = 0.05
    """On matrices; biases, other 1-D parameters and the model's no_weight_decay() are exempt."""
    decay_a_log: bool = False
    """True also decays the A_log of the state-space models, as the published training does."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of gradient and squared gradient."""
    clip_norm: float | None = 1.0
    """Largest norm of the whole gradient; None never clips."""
    accumulate_batches: int = 1
    """Batches whose gradients are averaged into one step."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.min_lr_share <= 1:
            raise ValueError(f"min_lr_share must lie between 0 and 1, got {self.min_lr_share}")
        if self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {self.warmup_epochs}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be positive or None, got {self.clip_norm}")
        if self.accumulate_batches < 1:
            raise ValueError(
                f"accumulate_batches must be at least 1, got {self.accumulate_batches}"
            )

    def build(
        self, model: nn.Module, *, steps_per_epoch: int, epochs: int
    ) -> tuple[torch.optim.AdamW, LambdaLR]:
        """Returns the optimizer of a model and its schedule, to be advanced once a step."""
        decayed, exempt = self.groups(model)
        optimizer = torch.optim.AdamW(
            [
                {"params": list(decayed.values()), "weight_decay": self.weight_decay},
                {"params": list(exempt.values()), "weight_decay": 0.0},
            ],
            lr=self.lr,
            betas=self.betas,
        )
        num_steps = steps_per_epoch * epochs
        num_warmup = min(round(self.warmup_epochs * steps_per_epoch), num_steps)
        return optimizer, LambdaLR(
            optimizer, lambda step: self.lr_share(step, num_warmup=num_warmup, num_steps=num_steps)
        )

    def groups(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Returns the parameters that are decayed and those that are exempt, by name."""
        names_exempt = getattr(model, "no_weight_decay", set[str])()
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

    def lr_share(self, step: int, *, num_warmup: int, num_steps: int) -> float:
        """Returns the learning rate of a zero-based step as a share of the peak."""
        if step < num_warmup:
            return (step + 1) / num_warmup
        progress = min((step - num_warmup) / max(num_steps - num_warmup, 1), 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_lr_share + (1 - self.min_lr_share) * cosine
