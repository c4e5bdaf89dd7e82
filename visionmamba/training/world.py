"""The processes that train together: who this one is, and what all of them agree on.

Processes are started by torchrun, by SLURM's srun, or by pytorch-lightning when fit is asked for
several devices of one machine. How they share a step is in engine.py and sharding.py.
"""

import os
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, distributed

Launcher = Literal["torchrun", "slurm", "fit"]
ValueType = TypeVar("ValueType")


@dataclass(frozen=True, kw_only=True)
class World:
    """One process among those that train together."""

    rank: int = 0
    """Number of this process; 0 writes the files."""
    size: int = 1
    """Processes, one a device."""
    local_rank: int = 0
    """Number of this process on its machine, which is that of its GPU."""
    nodes: int = 1
    """Machines."""
    launcher: Launcher = "fit"
    """Who starts the processes."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Adds a tensor up over all processes, in place, and returns it."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def gather(self, value: ValueType) -> list[ValueType]:
        """Returns what all processes have, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def gather_to_main(self, value: ValueType) -> list[ValueType]:
        """Returns to the main process what each has, its own first, and to the others nothing."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        distributed.gather_object(value, values)
        return values or []

    def from_main(self, value: ValueType) -> ValueType:
        """Returns what the main process has; all must call this, the others with anything."""
        if self.size == 1:
            return value
        values: list[Any] = [value if self.is_main else None]
        distributed.broadcast_object_list(values)
        held: ValueType = values[0]
        return held


def find_world(*, devices: int, nodes: int) -> World:
    """Returns this process's place, from the launcher's environment where there is one.

    Args:
        devices: processes of each machine that were asked for; 1 takes what the launcher says.
        nodes: machines that were asked for; 1 takes what the launcher says.

    Raises:
        ValueError: the launcher started another number of processes, or none did for several nodes.
    """
    for name, number in (("devices", devices), ("nodes", nodes)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    found = _launched_world(devices)
    if found is None:
        if nodes > 1:
            raise ValueError(
                f"nodes={nodes} needs a launcher on every machine; start with torchrun --nnodes "
                f"{nodes} --nproc-per-node {devices} -m visionmamba train ..., or with SLURM's srun"
            )
        return World(size=devices)
    per_node = found.size // found.nodes
    for name, asked, there in (("devices", devices, per_node), ("nodes", nodes, found.nodes)):
        if asked not in (1, there):
            raise ValueError(
                f"{name}={asked} was asked for but {found.launcher} started {there}; leave the "
                "option out or give both the same number"
            )
    return found


def device_of(world: World, device: torch.device) -> torch.device:
    """Returns the device of this process when "cuda" or "cpu" was asked for.

    Raises:
        ValueError: one device for several processes was asked for, or there are too few.
    """
    if world.size == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(
            f"device={device} is one GPU but {world.size} processes train; give device=cuda"
        )
    if world.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {world.local_rank} of this machine needs a GPU of its own but sees "
            f"{torch.cuda.device_count()}; start fewer, or let every process see all GPUs "
            "(with SLURM: --gpus-per-node, not --gpus-per-task)"
        )
    return torch.device("cuda", world.local_rank)


def _launched_world(devices: int) -> World | None:
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        size, per_node = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
        return World(
            rank=int(environment["RANK"]),
            size=size,
            local_rank=int(environment["LOCAL_RANK"]),
            nodes=size // per_node,
            launcher="torchrun",
        )
    if "LOCAL_RANK" in environment and "WORLD_SIZE" in environment:  # started by fit itself
        local_rank = int(environment["LOCAL_RANK"])
        return World(rank=local_rank, size=devices, local_rank=local_rank)
    is_batch_job = environment.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    if "SLURM_NTASKS" in environment and "SLURM_PROCID" in environment and is_batch_job:
        return World(
            rank=int(environment["SLURM_PROCID"]),
            size=int(environment["SLURM_NTASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            nodes=int(environment.get("SLURM_NNODES", "1")),
            launcher="slurm",
        )
    return None
