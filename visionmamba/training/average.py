"""Exponential moving average of a model's weights and buffers (EMA)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from visionmamba.training.sharding import local, part_like, whole_state


class MovingAverage:
    """A second set of weights, `decay` of itself and the rest of the model after every step.

    As timm's ModelEma and the published training: from the initial weights on, without warm-up of
    the decay. Sharded models have sharded averages.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        """Averages nothing before `begin`."""
        self._model = model
        self._decay = decay
        self._average: dict[str, Tensor] = {}
        self._averaged: list[Tensor] = []  # the parts that this process holds, and the model's
        self._current: list[Tensor] = []

    def begin(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Starts where the model is to stay in memory, unless it has begun.

        Args:
            state: what `state` returned, to go on from; None begins with the model's weights.
        """
        if self._average:
            return
        current = self._model.state_dict()
        for name, tensor in current.items():
            start = tensor if state is None else part_like(state[name], tensor)
            self._average[name] = start.detach().to(tensor.device, copy=True)
        self._averaged = [local(self._average[name]) for name in current]
        self._current = [local(tensor) for tensor in current.values()]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the model after a step."""
        pairs = list(zip(self._averaged, self._current, strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        averaged, current = zip(*floating, strict=True)
        torch._foreach_lerp_(averaged, current, 1 - self._decay)
        for counted, count in pairs:
            if not counted.is_floating_point():
                counted.copy_(count)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Puts the average into the model for its body, and the model's own weights back."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, Tensor]:
        """Returns the whole average, by the model's names; all processes must call this."""
        return whole_state(self._average)

    @torch.no_grad()
    def _swap(self) -> None:
        for averaged, current in zip(self._averaged, self._current, strict=True):
            kept = current.clone()
            current.copy_(averaged)
            averaged.copy_(kept)
