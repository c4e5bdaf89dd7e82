"""`visionmamba info`, `visionmamba demo` and `visionmamba bench`: this machine, measured."""

import json
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from visionmamba import __version__
from visionmamba.cli.messages import EXIT_WRONG_INPUT
from visionmamba.cli.options import choose, parse

_INFO_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "pytorch-lightning", "triton")


@dataclass(frozen=True, kw_only=True)
class Info:
    """Versions, devices, and which backend runs each operation and why."""

    json: bool = False
    """Print JSON instead of text."""


def info(given: list[str]) -> int:
    options = parse(Info, given, prog="visionmamba info")
    facts = _facts()
    if options.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    for title, values in facts.items():
        print(f"{title}:")
        for name, value in values.items():
            print(f"  {name:28}{value}")
    return 0


def demo(given: list[str]) -> int:
    from visionmamba.demo import Demo

    print(parse(Demo, given, prog="visionmamba demo").run())
    return 0


def bench(given: list[str]) -> int:
    from visionmamba.bench.complexity import Complexity
    from visionmamba.bench.detection import DetectionSpeed
    from visionmamba.bench.efficiency import Efficiency
    from visionmamba.bench.kernels import Kernels
    from visionmamba.bench.loader import LoaderSpeed
    from visionmamba.bench.segmentation import SegmentationSpeed

    benchmarks: dict[
        str,
        type[Efficiency | SegmentationSpeed | DetectionSpeed | Kernels | Complexity | LoaderSpeed],
    ] = {
        "efficiency": Efficiency,
        "segmentation": SegmentationSpeed,
        "detection": DetectionSpeed,
        "kernels": Kernels,
        "complexity": Complexity,
        "loader": LoaderSpeed,
    }
    if not given or given[0] in ("-h", "--help"):
        print(f"usage: visionmamba bench {{{','.join(benchmarks)}}} [--help] ...")
        return 0 if given else EXIT_WRONG_INPUT
    chosen = choose(benchmarks, given[0], what="benchmark")
    parse(chosen, given[1:], prog=f"visionmamba bench {given[0]}").run()
    return 0


def _facts() -> dict[str, dict[str, str]]:
    import torch

    from visionmamba.ops import backends

    versions = {"visionmamba": __version__, "python": platform.python_version()}
    for package in _INFO_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads, "}
    devices["cpu"] += torch.backends.cpu.get_cpu_capability()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    running = {f"{one.op} on {one.device}": f"{one.name}: {one.reason}" for one in backends()}
    return {"versions": versions, "devices": devices, "backends": running}
