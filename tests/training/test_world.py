"""Which of several processes this one is."""

import pytest
import torch

from visionmamba.training.world import World, device_of, find_world

pytestmark = pytest.mark.once

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "1",
    "WORLD_SIZE": "16",
    "LOCAL_WORLD_SIZE": "8",
    "RANK": "11",
    "LOCAL_RANK": "3",
}
SLURM = {
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "16",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [(TORCHRUN, "torchrun"), (SLURM, "slurm")],
    ids=["torchrun", "slurm"],
)
def test_launcher_says_the_place(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], launcher: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    world = find_world(devices=1, nodes=1)
    assert (world.rank, world.size, world.local_rank, world.nodes) == (11, 16, 3, 2)
    assert world.launcher == launcher
    assert not world.is_main


def test_interactive_slurm_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SLURM, "SLURM_JOB_NAME": "bash"}.items():
        monkeypatch.setenv(name, value)
    assert find_world(devices=1, nodes=1).size == 1


def test_without_launcher_this_is_the_main_process() -> None:
    world = find_world(devices=2, nodes=1)
    assert (world.rank, world.size, world.is_main) == (0, 2, True)


def test_one_process_has_all_by_itself() -> None:
    world = find_world(devices=1, nodes=1)
    assert world.gather("a") == world.gather_to_main("a") == ["a"]
    assert world.from_main({"a": 1}) == {"a": 1}


def test_several_machines_need_a_launcher() -> None:
    with pytest.raises(ValueError, match=r"nodes=2 needs a launcher .* torchrun --nnodes 2"):
        find_world(devices=8, nodes=2)


def test_other_number_than_the_launchers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="devices=4 was asked for but torchrun started 8"):
        find_world(devices=4, nodes=1)


def test_number_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="devices must be at least 1, got 0"):
        find_world(devices=0, nodes=1)


def test_one_gpu_for_several_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="device=cuda:1 is one GPU but 2 processes train"):
        device_of(World(size=2), torch.device("cuda:1"))


def test_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 1 of this machine needs a GPU of its own"):
        device_of(World(size=2, rank=1, local_rank=1), torch.device("cuda"))
