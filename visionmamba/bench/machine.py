"""Where a number was measured: processor, threads, versions, commit, date and command."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from visionmamba import __version__

_COMMIT_VARIABLE = "VISIONMAMBA_COMMIT"
_PACKAGES = ("torch", "torchvision", "timm", "numpy")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The circumstances of a measurement, written beside every result."""

    processor: str
    """Model name of the CPU, with its widest vector instructions."""
    accelerator: str | None
    """Name and memory of the GPU used; None when the CPU was measured."""
    num_cores: int
    """Cores this process may run on."""
    num_threads: int
    """Threads of PyTorch."""
    memory_gib: float | None
    """Main memory; None where the system does not tell."""
    system: str
    """Operating system and architecture."""
    versions: dict[str, str]
    """Python and the packages that decide the speed."""
    commit: str | None
    """Commit of the source checkout, marked when files differ from it. In a copy of one it is what
    VISIONMAMBA_COMMIT says; None where nothing does."""
    date: str
    """When the measurement began, UTC."""
    command: str
    """The command that remakes it."""

    def sentence(self) -> str:
        """Say all of it in one line of Markdown, for below a table."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        commit = f"commit {self.commit}, " if self.commit else ""
        return (
            f"`{self.command}`: {self.accelerator or self.processor}, {self.num_threads} threads, "
            f"{versions}, {commit}{self.date}."
        )


def choose_device(wanted: str) -> str:
    """Return "cpu" or "cuda" for "auto", "cpu" or "cuda".

    Raises:
        ValueError: "cuda" without a CUDA device.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ValueError("device 'cuda' was asked for, but torch finds no CUDA device; use 'cpu'")
    if wanted == "auto":
        return "cuda" if has_gpu else "cpu"
    return wanted


def describe_machine(device: str, *, command: str) -> Machine:
    """Describe this machine as the given torch device ("cpu", "cuda") sees it."""
    import torch

    accelerator = None
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(torch.device(device))
        accelerator = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return Machine(
        processor=f"{_processor_name()} ({torch.backends.cpu.get_cpu_capability()})",
        accelerator=accelerator,
        num_cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        num_threads=torch.get_num_threads(),
        memory_gib=_memory_gib(),
        system=f"{platform.system()} {platform.machine()}",
        versions={"python": platform.python_version(), "visionmamba": __version__}
        | {package: version(package) for package in _PACKAGES}
        | (_gpu_versions() if accelerator else {}),
        commit=_commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=command,
    )


def _gpu_versions() -> dict[str, str]:
    import torch

    name, toolkit = (
        ("rocm", torch.version.hip) if torch.version.hip else ("cuda", torch.version.cuda)
    )
    cudnn: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {name: str(toolkit), "cudnn": str(cudnn)}


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None


def _commit() -> str | None:
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return os.environ.get(_COMMIT_VARIABLE)
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            cwd=checkout,
            capture_output=True,
            text=True,
            check=True,
        )
    except (
        OSError,
        subprocess.CalledProcessError,
    ):  # no git here, or the checkout is another user's
        return None
    return answer.stdout.strip()


def command_of(options: Any, *words: str, without: Collection[str] = ()) -> str:
    """Return the command line that gives a dataclass of options its values.

    Args:
        options: what is at its default is left out.
        words: of the command, after "visionmamba".
        without: fields to leave out.
    """
    line = ["visionmamba", *words]
    for field in fields(options):
        value, name = getattr(options, field.name), field.name.replace("_", "-")
        if value == field.default or field.name in without:
            continue
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no-{name}")
        else:
            line += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(line)
