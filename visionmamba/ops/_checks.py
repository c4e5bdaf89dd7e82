"""What the faces of the ops share: complaints in one sentence, and the choice of dtypes."""

from collections.abc import Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_shape(op: str, name: str, tensor: Tensor, axes: str, wanted: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has the shape `wanted`; `axes` spells it: '(B, L, N)'."""
    if tuple(tensor.shape) != wanted:
        raise ValueError(
            f"{op}: {name} must have shape {axes} = {wanted}, got {tuple(tensor.shape)}; "
            f"reshape {name} or correct the other arguments that set these sizes"
        )


def check_ndim(op: str, name: str, tensor: Tensor, axes: str, ndim: int) -> None:
    """Raise ValueError unless `tensor` has `ndim` axes and none of them is empty."""
    shape = tuple(tensor.shape)
    if len(shape) != ndim:
        raise ValueError(
            f"{op}: {name} must have shape {axes}, got {shape}; "
            f"reshape {name} to {ndim} axes (a single sequence needs a batch axis of 1)"
        )
    if 0 in shape:
        raise ValueError(
            f"{op}: {name} must have shape {axes} without empty axes, got {shape}; "
            "pass at least one sample, token and channel"
        )


def check_dtypes_and_devices(op: str, named: Sequence[tuple[str, Tensor | None]]) -> None:
    """Raise ValueError unless all are floating, on one device, and all or none are float64."""
    first_name, first = named[0]
    assert first is not None
    for name, tensor in named:
        if tensor is None:
            continue
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on {first.device} like {first_name}, got {tensor.device}; "
                f"move it with {name}.to({first_name}.device)"
            )
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{op}: {name} must be float32, bfloat16 or float16, got {_short(tensor.dtype)}; "
                f"convert it with {name}.float()"
            )
        if (tensor.dtype == torch.float64) != (first.dtype == torch.float64):
            raise ValueError(
                f"{op}: {name} must not mix float64 with other dtypes, got {_short(tensor.dtype)} "
                f"beside {first_name} in {_short(first.dtype)}; convert it with {name}.float()"
            )


def parameter_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of parameters and states beside x: float32, in gradient checks float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def activation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which matrix products of x run: its own or, inside autocast, that one.

    Autocast leaves float64 alone.
    """
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def as_stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in an output's dtype, stopping at float16's largest instead of infinity."""
    return values.clamp(-65504, 65504).half() if dtype == torch.float16 else values.to(dtype)


def same_dtype(*tensors: Tensor) -> bool:
    """Return whether all tensors share one dtype."""
    return all(tensor.dtype == tensors[0].dtype for tensor in tensors)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Return whether a backward through any of these tensors may follow."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
