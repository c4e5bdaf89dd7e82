"""Which implementation runs each op on each device, and why: what `visionmamba info` shows."""

from dataclasses import dataclass

import torch

from visionmamba.ops.cpu import cpu_backend
from visionmamba.ops.cuda import cuda_backend

OPS = (
    "selective_scan",
    "bidirectional_scan",
    "causal_conv1d",
    "bidirectional_conv1d",
    "rms_norm",
)


@dataclass(frozen=True, kw_only=True)
class BackendStatus:
    """The implementation that one op uses on one kind of device."""

    op: str
    """Name of the op, e.g. "selective_scan"."""
    device: str
    """Device type as torch names it: "cpu" or "cuda"."""
    name: str
    """"cpp" (compiled at first use), "cuda" and "triton" (kernels for GPUs), "torch" (PyTorch)."""
    reason: str
    """One sentence: why this one."""


def backends() -> tuple[BackendStatus, ...]:
    """Return the implementation of each op on each device; compiles the CPU's if that is due."""
    cpu = cpu_backend()
    name = "torch" if cpu.kernels is None else "cpp"
    found = [BackendStatus(op=op, device="cpu", name=name, reason=cpu.reason) for op in OPS]
    if torch.cuda.is_available():
        found += [_on_cuda(op) for op in (*OPS, "fused_mixer")]
    return tuple(found)


def _on_cuda(op: str) -> BackendStatus:
    cuda = cuda_backend(torch.device("cuda"))
    name = cuda.name if op.endswith("scan") or cuda.has_kernels else "torch"
    return BackendStatus(op=op, device="cuda", name=name, reason=cuda.reason)
