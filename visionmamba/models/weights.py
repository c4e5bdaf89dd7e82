"""Weights on disk: safetensors with everything needed to use them, and the authors' checkpoints.

The header of a file (metadata key "visionmamba", JSON) says which model it is, what its outputs
mean and how pictures are prepared. Nothing is ever unpickled freely.
"""

import argparse
import json
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from visionmamba import __version__
from visionmamba.models.config import VimConfig, VimOptions
from visionmamba.models.deit import DeiT, DeiTConfig
from visionmamba.models.vim import Vim

METADATA_KEY = "visionmamba"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class WeightsHeader:
    """What a weights file says about itself."""

    format_version: int = FORMAT_VERSION
    """Raised when older packages can no longer read the file."""
    package_version: str = __version__
    """Version of visionmamba that wrote the file."""
    task: str = "classification"
    """What the model was trained for."""
    architecture: Literal["vim", "deit"] = "vim"
    """Which configuration class `config` is for."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of VimConfig or DeiTConfig."""
    class_names: tuple[str, ...] = ()
    """Names of the outputs, in order; empty when unknown."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """How pictures become the model's input: image_size, crop_fraction, interpolation, mean, std,
    channels."""


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    task: str = "classification",
    class_names: tuple[str, ...] = (),
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Write a Vim or DeiT as safetensors, under a temporary name first, so never half.

    Args:
        model: a model with a VimConfig or DeiTConfig as `.config`.
        path: file to write; an existing one is replaced.
        task, class_names, preprocessing: see WeightsHeader.

    Raises:
        TypeError: the model is neither.
        ValueError: the number of class names is not the model's number of classes.
        FileNotFoundError: the folder does not exist.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, VimConfig | DeiTConfig):
        raise TypeError(f"save takes a Vim or a DeiT; got {type(model).__name__}")
    if class_names and len(class_names) != config.num_classes:
        raise ValueError(
            f"class_names must name the model's {config.num_classes} classes; "
            f"got {len(class_names)}"
        )
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent}; make it, then save again")
    header = WeightsHeader(
        task=task,
        architecture="vim" if isinstance(config, VimConfig) else "deit",
        config=asdict(config),
        class_names=tuple(class_names),
        preprocessing=dict(preprocessing or {}),
    )
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(asdict(header))})
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_header(path: str | os.PathLike[str]) -> WeightsHeader:
    """Return what a weights file says about itself, without reading its tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole safetensors file, not from this package, or from a newer one.
    """
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as weights:
            metadata = weights.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} holds tensors but no visionmamba header; save it with visionmamba.save, or "
            "load the authors' checkpoints with visionmamba.load_published"
        )
    try:
        values = json.loads(metadata[METADATA_KEY])
        version = values["format_version"]
        if isinstance(version, bool) or not isinstance(version, int):
            raise TypeError("format_version is no number")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} has a damaged visionmamba header ({error}); get it again"
        ) from None
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has weights format {version}, written by visionmamba "
            f"{values.get('package_version', 'of unknown version')}; this is {__version__}, which "
            f"reads up to format {FORMAT_VERSION}: pip install --upgrade visionmamba"
        )
    known = {item.name for item in fields(WeightsHeader)}
    if set(values) != known or values["architecture"] not in ("vim", "deit"):
        raise ValueError(f"{path} has a damaged visionmamba header; get it again")
    return WeightsHeader(**{**values, "class_names": tuple(values["class_names"])})


def load(path: str | os.PathLike[str], *, device: str | torch.device = "auto") -> Vim | DeiT:
    """Return the model of a weights file in evaluation mode; its `.header` is a WeightsHeader.

    Args:
        path: a file written by `save`.
        device: where the model goes; "auto" is the GPU when there is one.

    Raises:
        FileNotFoundError, ValueError: as read_header, or the tensors do not fit the configuration.
    """
    header = read_header(path)
    try:
        model = _build(header)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes a model that cannot be built: {error}") from None
    try:
        with safe_open(path, framework="pt") as weights:
            state = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None
    _load_strictly(model, state, path)
    model.header = header  # type: ignore[assignment]
    return model.eval().to(resolve_device(device))


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device meant; "auto" is the GPU when there is one.

    Raises:
        ValueError: the device's name is unknown or the machine has no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f'device must be "auto", "cpu", "cuda" or "cuda:N"; got {device!r}'
        ) from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} was asked for but torch finds {torch.cuda.device_count()} CUDA "
            'devices here; use device="cpu" or "auto"'
        )
    return resolved


def load_published(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    which: Literal["model", "model_ema"] = "model",
    **config_overrides: Unpack[VimOptions],
) -> Vim:
    """Return a Vim with weights in the authors' format, in evaluation mode on the CPU.

    Pickles are read through an allow-list (tensors, plain containers, argparse.Namespace).
    Widths, depth, classes, states and readout are read off the keys and shapes; what shapes cannot
    tell (stride, picture size when it is not square, halve_directions, rope) is as in the released
    models unless overridden. Shapes must fit; nothing is resized.

    Args:
        source: the authors' .pth file, or a state_dict with their key names.
        which: entry of the file: the raw weights or their moving average.
        config_overrides: fields of VimConfig.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read safely, has no such entry, or keys or shapes do not fit.
    """
    if isinstance(source, Mapping):
        state, name = dict(source), "the state_dict"
    else:
        state, name = _read_checkpoint(source, which), os.fspath(source)
    missing = [key for key in ("norm_f.weight", "layers.0.mixer.A_log") if key not in state]
    if missing:
        raise ValueError(f"{name} is not a published Vim: it has no {' and no '.join(missing)}")
    options: dict[str, Any] = {**_options_from_shapes(state), **config_overrides}
    model = Vim(VimConfig(**options))
    _load_strictly(model, _from_published_keys(state), name)
    return model.eval()


def _build(header: WeightsHeader) -> Vim | DeiT:
    options: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in header.config.items()
    }
    if header.architecture == "vim":
        return Vim(VimConfig(**options))
    return DeiT(DeiTConfig(**options))


def _load_strictly(model: nn.Module, state: Mapping[str, Tensor], name: object) -> None:
    wanted = model.state_dict()
    absent, unknown = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if absent or unknown:
        parts = [f"lacks {_some(absent)}"] if absent else []
        parts += [f"has unknown {_some(unknown)}"] if unknown else []
        raise ValueError(f"{name} does not fit its model: it {' and '.join(parts)}")
    for key, tensor in state.items():
        if tensor.shape != wanted[key].shape:
            raise ValueError(
                f"{name} does not fit its model: {key} must be {tuple(wanted[key].shape)}; "
                f"got {tuple(tensor.shape)}"
            )
    model.load_state_dict(state)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _require_file(path: str | os.PathLike[str]) -> None:
    if not Path(path).is_file():
        what = "a folder" if Path(path).is_dir() else "missing"
        raise FileNotFoundError(f"weights file {os.fspath(path)} is {what}; check the path")


def _unreadable(path: str | os.PathLike[str], error: Exception) -> ValueError:
    return ValueError(
        f"{os.fspath(path)} is not a whole safetensors file ({error}); "
        "it may be cut short or another format: copy or download it again"
    )


def _read_checkpoint(path: str | os.PathLike[str], which: str) -> dict[str, Tensor]:
    _require_file(path)
    try:
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(action="ignore"),  # advice about pickle protocols
        ):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{os.fspath(path)} cannot be read safely: {reason}") from None
    state = checkpoint
    if isinstance(checkpoint, Mapping) and "model" in checkpoint:
        if which not in checkpoint:
            raise ValueError(f"{os.fspath(path)} has no entry {which!r}; use which='model'")
        state = checkpoint[which]
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{os.fspath(path)} holds no state_dict of tensors")
    return dict(state)


def _options_from_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    d_inner, d_state = state["layers.0.mixer.A_log"].shape
    if "cls_token_head" in state:
        readout, class_tokens = "double", 2
    elif "cls_token" in state:
        readout, class_tokens = "middle", 1
    else:
        readout, class_tokens = "mean", 0
    bidirectional = "none"
    if "layers.0.mixer.A_b_log" in state:
        bidirectional = "ssm+conv" if "layers.0.mixer.D_b" in state else "ssm"
    options: dict[str, Any] = {
        "patch_size": patch,
        "in_channels": channels,
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "d_model": width,
        "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers.")),
        "d_state": d_state,
        "d_conv": state["layers.0.mixer.conv1d.weight"].shape[-1],
        "expand": d_inner // width,
        "dt_rank": state["layers.0.mixer.dt_proj.weight"].shape[1],
        "bidirectional": bidirectional,
        "readout": readout,
        "norm": "layernorm" if "norm_f.bias" in state else "rmsnorm",
        "layer_scale": 1.0 if "layers.0.mixer.gamma" in state else None,
        "position_embedding": "learned" if "pos_embed" in state else "none",
    }
    if (
        "rope.freqs_cos" in state
    ):  # the models of January 2024, trained before directions were halved
        options.update(rope="tokens+residual", rope_layout="published", halve_directions=False)
    if "pos_embed" in state:
        side = round((state["pos_embed"].shape[1] - class_tokens) ** 0.5)
        # the released fine-tuned models see 224 px at stride 8, hence 27 patches a side
        stride = 8 if (side, patch) == (27, 16) else patch
        options.update(stride=stride, image_size=(side - 1) * stride + patch)
    return options


_PUBLISHED_NAMES: tuple[tuple[str, str], ...] = (
    (r"^pos_embed$", "position_embedding.weight"),
    (r"^patch_embed\.proj\.", "patch_embedding."),
    (r"^norm_f\.", "norm."),
    (r"^layers\.", "blocks."),
    (r"\.mixer\.gamma$", ".mixer.layer_scale"),
    (r"\.mixer\.A_b_log$", ".mixer.directions.1.A_log"),
    (r"\.mixer\.D_b$", ".mixer.directions.1.D"),
    (r"\.mixer\.(A_log|D)$", r".mixer.directions.0.\1"),
    (r"\.mixer\.(conv1d|dt_proj|x_proj)_b\.", r".mixer.directions.1.\1."),
    (r"\.mixer\.(conv1d|dt_proj|x_proj)\.", r".mixer.directions.0.\1."),
    (r"\.conv1d\.(weight|bias)$", r".conv_\1"),
    (r"\.dt_proj\.(weight|bias)$", r".dt_\1"),
)


def _from_published_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under this package's names and shapes."""
    shares_all_but_A = "layers.0.mixer.A_b_log" in state and "layers.0.mixer.D_b" not in state
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.startswith("rope.") or key.startswith("cls_token"):
            continue  # rotations are computed; class tokens are joined below
        name = key
        if shares_all_but_A:
            name = name.replace(".mixer.A_b_log", ".mixer.backward_A_log")
        for pattern, replacement in _PUBLISHED_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor.squeeze(1) if name.endswith("conv_weight") else tensor
    tokens = [
        state[key] for key in ("cls_token", "cls_token_head", "cls_token_tail") if key in state
    ]
    if tokens:
        renamed["class_token"] = torch.cat(tokens, dim=1)
    return renamed
