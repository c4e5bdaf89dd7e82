"""Weights on disk: safetensors with everything needed to use them.

The header of a file (metadata key "visionmamba", JSON) says which model it is, what its outputs
mean and how pictures are prepared. The authors' checkpoints are in published.py, the Hub in hub.py.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visionmamba import __version__
from visionmamba.models.card import model_card
from visionmamba.models.config import VimConfig
from visionmamba.models.deit import DeiT, DeiTConfig
from visionmamba.models.detection import DetectionModel, DetectorConfig
from visionmamba.models.segmentation import SegmentationModel, SegmenterConfig
from visionmamba.models.vim import Vim

METADATA_KEY = "visionmamba"
FORMAT_VERSION = 1
WEIGHTS_NAME = "model.safetensors"

Architecture = Literal["vim", "deit", "segmenter", "detector"]
Config = VimConfig | DeiTConfig | SegmenterConfig | DetectorConfig
"""Of any model that weights are saved of."""

_ARCHITECTURES: dict[type[Config], Architecture] = {
    VimConfig: "vim",
    DeiTConfig: "deit",
    SegmenterConfig: "segmenter",
    DetectorConfig: "detector",
}
_TASKS: dict[Architecture, str] = {
    "vim": "classification",
    "deit": "classification",
    "segmenter": "segmentation",
    "detector": "detection",
}


def task_of(architecture: Architecture) -> str:
    """Return the task that models of an architecture are for."""
    return _TASKS[architecture]


_WithBackbone = TypeVar("_WithBackbone", SegmenterConfig, DetectorConfig)


@dataclass(frozen=True, kw_only=True)
class WeightsHeader:
    """What a weights file says about itself."""

    format_version: int = FORMAT_VERSION
    """Raised when older packages can no longer read the file."""
    package_version: str = __version__
    """Version of visionmamba that wrote the file."""
    task: str = "classification"
    """What the model was trained for."""
    architecture: Architecture = "vim"
    """Which configuration class `config` is for."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of VimConfig, DeiTConfig, SegmenterConfig or DetectorConfig; the `backbone` of the
    last two holds "architecture" beside its fields."""
    class_names: tuple[str, ...] = ()
    """Names of the outputs, in order; empty when unknown."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """How pictures become the model's input: interpolation, mean and std; for a classifier also
    image_size, crop_fraction and channels, for a segmenter crop_size, short_side, max_long_side,
    for a detector image_size."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else the task needs to know; in the file only when there is any."""

    def to_dict(self) -> dict[str, Any]:
        """Return what the file holds, as plain values."""
        values = asdict(self)
        if not self.details:
            del values["details"]
        return values


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    task: str | None = None,
    class_names: tuple[str, ...] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write a Vim, DeiT, segmenter or detector as safetensors; what is there is never half.

    A path without ending, or of a folder, becomes a folder laid out for the Hub: model.safetensors,
    config.json (the header, for readers) and the model card README.md, unless there is one.

    Args:
        model: a model with one of these configurations as `.config`.
        path: NAME.safetensors or a folder; existing weights are replaced.
        task: see WeightsHeader; None is "segmentation" for a segmenter, "detection" for a detector,
            else "classification".
        class_names, preprocessing, details: see WeightsHeader; None takes those that the model was
            loaded with, if any.

    Raises:
        TypeError: the model is none of them.
        ValueError: the number of class names is not the model's number of classes, or the ending is
            another.
        FileNotFoundError: the folder does not exist.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, Config):
        raise TypeError(
            f"save takes a Vim, a DeiT, a segmenter or a detector; got {type(model).__name__}"
        )
    loaded_with = getattr(model, "header", None) or WeightsHeader()
    if class_names is None:
        class_names = loaded_with.class_names
    if class_names and len(class_names) != config.num_classes:
        raise ValueError(
            f"class_names must name the model's {config.num_classes} classes; "
            f"got {len(class_names)}"
        )
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent}; make it, then save again")
    architecture = _ARCHITECTURES[type(config)]
    header = WeightsHeader(
        task=task or _TASKS[architecture],
        architecture=architecture,
        config=_config_to_dict(config),
        class_names=tuple(class_names),
        preprocessing=dict(loaded_with.preprocessing if preprocessing is None else preprocessing),
        details=dict(loaded_with.details if details is None else details),
    )
    if target.suffix == ".safetensors" and not target.is_dir():
        _write_tensors(model, header, target)
        return
    if target.suffix and not target.is_dir():
        raise ValueError(
            f"save writes safetensors; got {target}: name the file {target.stem}.safetensors, or "
            "give a folder"
        )
    target.mkdir(exist_ok=True)
    _write_tensors(model, header, target / WEIGHTS_NAME)
    _write_text(json.dumps(header.to_dict(), indent=2) + "\n", target / "config.json")
    if not (target / "README.md").exists():
        _write_text(model_card(model, header.to_dict()), target / "README.md")


def read_header(path: str | os.PathLike[str]) -> WeightsHeader:
    """Return what a weights file (or a folder with one) says about itself, without its tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole safetensors file, not from this package, or from a newer one.
    """
    metadata = read_metadata(weights_file(path))
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
    values = {"details": {}, **values}
    is_whole = (
        set(values) == known
        and values["architecture"] in get_args(Architecture)
        and isinstance(values["class_names"], list)
        and all(isinstance(name, str) for name in values["class_names"])
        and all(isinstance(values[name], dict) for name in ("config", "preprocessing", "details"))
    )
    if not is_whole:
        raise ValueError(f"{path} has a damaged visionmamba header; get it again")
    return WeightsHeader(**{**values, "class_names": tuple(values["class_names"])})


def load(
    path: str | os.PathLike[str], *, device: str | torch.device = "auto"
) -> Vim | DeiT | SegmentationModel | DetectionModel:
    """Return the model of a weights file in evaluation mode; its `.header` is a WeightsHeader.

    Args:
        path: a file or a folder written by `save`.
        device: where the model goes; "auto" is the GPU when there is one.

    Raises:
        FileNotFoundError, ValueError: as read_header, or the tensors do not fit the configuration.
        ImportError: a segmenter's head needs visionmamba[segmentation].
    """
    header = read_header(path)
    config: Config
    if header.architecture == "segmenter":
        config = segmenter_config_of(header, path)
    elif header.architecture == "detector":
        config = detector_config_of(header, path)
    else:
        config = config_of(header, path)
    model = config.build()
    load_strictly(model, read_tensors(path), path)
    model.header = header
    return model.eval().to(resolve_device(device))


def weights_file(path: str | os.PathLike[str]) -> Path:
    """Return the file itself, or the one that a folder written by `save` holds."""
    return Path(path) / WEIGHTS_NAME if Path(path).is_dir() else Path(path)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata of a safetensors file of any origin.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole safetensors file.
    """
    require_file(path)
    try:
        with safe_open(path, framework="pt") as weights:
            return dict(weights.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file of any origin.

    Raises:
        ValueError: it is not a whole safetensors file.
    """
    try:
        return load_file(weights_file(path))
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def config_of(header: WeightsHeader, path: str | os.PathLike[str]) -> VimConfig | DeiTConfig:
    """Return the configuration of a classifier in a header.

    Raises:
        ValueError: it does not hold, or is of another model; the message names `path`.
    """
    if header.architecture in ("segmenter", "detector"):
        held = header.architecture
        raise ValueError(
            f"{os.fspath(path)} holds a {held} and a classifier was wanted; load it with "
            f"visionmamba.load or {held.capitalize()}.load, or give weights of a classifier"
        )
    return _classifier_config(header.architecture, header.config, path)


def segmenter_config_of(header: WeightsHeader, path: str | os.PathLike[str]) -> SegmenterConfig:
    """Return the configuration of a segmenter in a header.

    Raises:
        ValueError: it does not hold, or is of another model; the message names `path`.
    """
    return _config_with_backbone(SegmenterConfig, header, path)


def detector_config_of(header: WeightsHeader, path: str | os.PathLike[str]) -> DetectorConfig:
    """Return the configuration of a detector in a header.

    Raises:
        ValueError: it does not hold, or is of another model; the message names `path`.
    """
    return _config_with_backbone(DetectorConfig, header, path)


def backbone_config_of(
    header: WeightsHeader, path: str | os.PathLike[str]
) -> VimConfig | DeiTConfig:
    """Return the configuration of what reads the pictures: a classifier, or the backbone of others.

    Raises:
        ValueError: it does not hold; the message names `path`.
    """
    if header.architecture == "segmenter":
        return segmenter_config_of(header, path).backbone
    if header.architecture == "detector":
        return detector_config_of(header, path).backbone
    return config_of(header, path)


def _config_with_backbone(
    config_class: type[_WithBackbone], header: WeightsHeader, path: str | os.PathLike[str]
) -> _WithBackbone:
    wanted = _ARCHITECTURES[config_class]
    if header.architecture != wanted:
        held = header.architecture
        name = "classifier" if held in ("vim", "deit") else held
        raise ValueError(
            f"{os.fspath(path)} holds a {name} and a {wanted} was wanted; start a {wanted}'s "
            "backbone from it with visionmamba.models.load_backbone, and train that"
        )
    options = dict(header.config)
    held_backbone = options.get("backbone")
    architecture = held_backbone.get("architecture") if isinstance(held_backbone, dict) else None
    if not isinstance(held_backbone, dict) or architecture not in ("vim", "deit"):
        raise ValueError(f"{os.fspath(path)} has a damaged visionmamba header; get it again")
    backbone = {name: value for name, value in held_backbone.items() if name != "architecture"}
    options["backbone"] = _classifier_config(architecture, backbone, path)
    try:
        return config_class(**options)
    except (TypeError, ValueError) as error:
        raise _unbuildable(path, error) from None


def _classifier_config(
    architecture: str, options: Mapping[str, Any], path: str | os.PathLike[str]
) -> VimConfig | DeiTConfig:
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in options.items()
    }
    config_class = VimConfig if architecture == "vim" else DeiTConfig
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise _unbuildable(path, error) from None


def _unbuildable(path: str | os.PathLike[str], error: Exception) -> ValueError:
    return ValueError(f"{os.fspath(path)} describes a model that cannot be built: {error}")


def _config_to_dict(config: Config) -> dict[str, Any]:
    values = asdict(config)
    if isinstance(config, SegmenterConfig | DetectorConfig):
        architecture = _ARCHITECTURES[type(config.backbone)]
        values["backbone"] = {"architecture": architecture, **values["backbone"]}
    return values


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


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], name: object) -> None:
    """Copy tensors into a model whose names and shapes must be the same.

    Raises:
        ValueError: they are not; the message begins with `name` and says where.
    """
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


def require_file(path: str | os.PathLike[str]) -> None:
    """Raise FileNotFoundError unless there is such a file."""
    if not Path(path).is_file():
        what = "a folder" if Path(path).is_dir() else "missing"
        raise FileNotFoundError(f"weights file {os.fspath(path)} is {what}; check the path")


def _unreadable(path: str | os.PathLike[str], error: Exception) -> ValueError:
    return ValueError(
        f"{os.fspath(path)} is not a whole safetensors file ({error}); "
        "it may be cut short or another format: copy or download it again"
    )


def _write_tensors(model: nn.Module, header: WeightsHeader, target: Path) -> None:
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    with _replacing(target) as temporary:
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(header.to_dict())})


def _write_text(text: str, target: Path) -> None:
    with _replacing(target) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[str]:
    """Yield a temporary name beside the target, which it replaces when all went well."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
