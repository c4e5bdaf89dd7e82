"""Weights and optimizer sharded over processes (FSDP2), and whole again for files.

Checkpoints hold whole tensors, numbered and named as those of one process, so that any number of
processes can go on from them, sharded or not.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from typing_extensions import override

from visionmamba.training.backbone import blocks_of
from visionmamba.training.checkpoint import read_checkpoint


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards a model in place: each of its blocks by itself, and the rest together."""
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    # the root, too, gives its weights back after the forward, so that a change of the shards shows
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this process holds; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor put together from all processes, each of which must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns named tensors put together from all processes, on the CPU."""
    return {name: whole(tensor).detach().cpu() for name, tensor in state.items()}


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns a whole tensor, known to all processes, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    moved = tensor.to(like.device)
    return distribute_tensor(moved, mesh, like.placements, src_data_rank=None)


class ShardedStrategy(ModelParallelStrategy):
    """pytorch-lightning's FSDP2 with checkpoints of whole tensors in one file."""

    def __init__(self, *, num_processes: int, process_group_backend: str | None) -> None:
        """Shards over all processes."""
        super().__init__(
            data_parallel_size=num_processes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(checkpoint_path)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return whole_state(self.lightning_module.state_dict())

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        wanted = self.lightning_module.state_dict()
        parts = {
            name: part_like(tensor, wanted[name]) if name in wanted else tensor
            for name, tensor in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(parts, strict=strict)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        entries = {
            number: {name: _whole_entry(value) for name, value in entry.items()}
            for number, entry in state["state"].items()
        }
        return {"state": entries, "param_groups": state["param_groups"]}

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        optimizer, state = self.optimizers[0], checkpoint["optimizer_states"][0]
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        entries = {
            number: {
                name: part_like(value, parameters[number]) if _is_shaped(value) else value
                for name, value in entry.items()
            }
            for number, entry in state["state"].items()
        }
        optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})


def _whole_entry(value: Any) -> Any:
    return whole(value).detach().cpu() if isinstance(value, Tensor) else value


def _is_shaped(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0
