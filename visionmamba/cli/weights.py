"""`visionmamba models` and `visionmamba convert`: the published weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from visionmamba.cli.options import image_size_of, parse


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Published weights as safetensors with all that eval and predict need."""

    source: tyro.conf.Positional[str]
    """The authors' .pth file, any weights file or folder, or a name that `visionmamba models`
    lists."""
    target: tyro.conf.Positional[Path]
    """OUT.safetensors, or a folder, which gets config.json and a model card too."""
    which: Literal["model", "model_ema"] = "model"
    """Entry of the authors' file: the raw weights or their moving average."""
    filename: str | None = None
    """Weights in the folder, or in the repository, that the source names."""
    num_classes: int | None = None
    """Classes of a new head; 0 for none. By default the head stays."""
    in_channels: int | None = None
    """Channels of the pictures; filters are summed or repeated."""
    image_size: tuple[int, ...] | None = None
    """Side, or height and width, in pixels; the position embedding is resized."""
    stride: int | None = None
    """Distance of patches in pixels; the position embedding is resized."""
    resize: Literal["grid", "published"] = "grid"
    """How positions are resized; "published" repeats the authors' way."""


def models(given: list[str]) -> int:
    if given and given[0] in ("-h", "--help"):
        print("usage: visionmamba models\n\nthe published weights, for convert and from_pretrained")
        return 0
    if given:
        raise ValueError(f"visionmamba models takes no options; got {given[0]}")
    from visionmamba.models.released import models_table

    print(models_table())
    print("\nAccuracies, per cent on ImageNet-1k, are the authors'. visionmamba convert NAME OUT")
    return 0


def convert(given: list[str]) -> int:
    options = parse(Convert, given, prog="visionmamba convert")
    size = image_size_of(options.image_size)
    from visionmamba.models import Vim, save
    from visionmamba.models.config import VimOptions

    overrides: VimOptions = {}
    if options.num_classes is not None:
        overrides["num_classes"] = options.num_classes
    if options.in_channels is not None:
        overrides["in_channels"] = options.in_channels
    if size is not None:
        overrides["image_size"] = size
    if options.stride is not None:
        overrides["stride"] = options.stride
    model = Vim.from_pretrained(
        options.source,
        filename=options.filename,
        which=options.which,
        resize=options.resize,
        **overrides,
    )
    save(model, options.target)
    print(model.load_report)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.target}: {num_parameters:,} parameters")
    return 0
