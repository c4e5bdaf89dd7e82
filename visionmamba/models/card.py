"""The model card of a folder laid out for the Hub: what a README.md says of a saved model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from visionmamba.models.released import PUBLISHED_MODELS

_NAMED_CLASSES = 20


class _Use(NamedTuple):
    """What a card says of a model with a backbone inside."""

    pipeline: str
    predictor: str
    what: str
    result: str
    outputs: str


_USES = {
    "segmenter": _Use(
        "image-segmentation", "Segmenter", "A semantic segmenter", "segmentation", "at every pixel"
    ),
    "detector": _Use(
        "object-detection", "Detector", "A detector with instance masks", "detections",
        "with a box and a mask each",
    ),
}  # fmt: skip
_HEADS = {
    "upernet": "UperNet",
    "segmenter": "the mask transformer of Segmenter",
    "cascade": "Cascade Mask R-CNN",
    "mask": "Mask R-CNN",
}


def model_card(model: nn.Module, header: Mapping[str, Any]) -> str:
    """Return a card with the Hub's metadata, the way to load the model and what it is.

    Args:
        model: a Vim, a DeiT, a segmenter or a detector.
        header: the fields of its WeightsHeader.
    """
    config, is_vim = header["config"], header["architecture"] == "vim"
    if header["architecture"] in _USES:
        return _card_with_backbone(model, header)
    report = getattr(model, "load_report", None)
    origin = Path(report.source).name if report else None
    released = next((one for one in PUBLISHED_MODELS if one.filename == origin), None)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    metadata = ["library_name: visionmamba"]
    if config["num_classes"]:
        metadata.append("pipeline_tag: image-classification")
    if released:
        metadata += [f"license: {released.license}", f"base_model: {released.repository}"]
    if is_vim:
        metadata += ["tags:", "- vision-mamba", "- state-space-model", "- arxiv:2401.09417"]
    facts = [
        f"- Parameters: {num_parameters:,}",
        f"- Pictures: {_size(config['image_size'])} px, {config['in_channels']} channels",
        f"- Patches of {config['patch_size']} px, {config['depth']} blocks",
        f"- Outputs: {_outputs(config['num_classes'], header['class_names'])}",
    ]
    if header["preprocessing"]:
        facts.append(f"- Preparation of pictures: {_listed(header['preprocessing'])}")
    if released:
        facts.append(
            f"- Made from {released.filename} of {released.repository}, which its authors give "
            f"{released.top1} top-1 and {released.top5} top-5 on ImageNet-1k"
        )
    if report:
        lines = str(replace(report, source=origin)).splitlines()
        facts += ["", "How the weights were loaded:", "", "```text", *lines, "```"]
    load = "visionmamba.Vim.from_pretrained" if is_vim else "visionmamba.load"
    title = "Vision Mamba (Vim)" if is_vim else "DeiT"
    return "\n".join(
        (
            *("---", *metadata, "---", ""),
            *(f"# {title}, {config['d_model']} wide", ""),
            *("A model of the Python package `visionmamba`. Download this folder, then:", ""),
            *("```python", "import visionmamba", ""),
            *(f'model = {load}("path/to/this/folder")', "```", ""),
            *(*facts, ""),
            "`config.json` and the header of `model.safetensors` hold the whole configuration.",
            "",
        )
    )


def _card_with_backbone(model: nn.Module, header: Mapping[str, Any]) -> str:
    config, backbone = header["config"], header["config"]["backbone"]
    name = "Vision Mamba (Vim)" if backbone["architecture"] == "vim" else "DeiT"
    head, use = _HEADS[config["head"]], _USES[header["architecture"]]
    metadata = ["library_name: visionmamba", f"pipeline_tag: {use.pipeline}"]
    if backbone["architecture"] == "vim":
        metadata += ["tags:", "- vision-mamba", "- state-space-model", "- arxiv:2401.09417"]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = [
        f"- Parameters: {num_parameters:,}",
        f"- Pictures: any size, {backbone['in_channels']} channels; positions learned for "
        f"{_size(backbone['image_size'])} px",
        f"- Patches of {backbone['patch_size']} px, {backbone['depth']} blocks",
        f"- Outputs: {_outputs(config['num_classes'], header['class_names'])}, {use.outputs}",
    ]
    if header["preprocessing"]:
        facts.append(f"- Preparation of pictures: {_listed(header['preprocessing'])}")
    return "\n".join(
        (
            *("---", *metadata, "---", ""),
            *(f"# {name}, {backbone['d_model']} wide, with {head}", ""),
            f"{use.what} of the Python package `visionmamba`. Download this folder, then:",
            "",
            *("```python", f"from visionmamba import {use.predictor}", ""),
            f'{use.result} = {use.predictor}.load("path/to/this/folder")("picture.jpg")',
            *(f'{use.result}.save("result")', "```", "", *facts, ""),
            "`config.json` and the header of `model.safetensors` hold the whole configuration.",
            "",
        )
    )


def _size(size: int | list[int] | tuple[int, int]) -> str:
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height}x{width}"


def _outputs(num_classes: int, names: tuple[str, ...]) -> str:
    if not num_classes:
        return "features; there is no classifier"
    if not names:
        return f"{num_classes} classes"
    shown = ", ".join(names[:_NAMED_CLASSES])
    return f"{num_classes} classes: {shown}{', ...' if len(names) > _NAMED_CLASSES else ''}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
