"""Where a model keeps its numbered blocks, and which part of it those belong to."""

import re

from torch import nn

_NUMBERED = re.compile(r"(?:^|\.)(?:blocks|layers)$")


def backbone_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Returns the part that has the blocks, after how its parameters' names begin.

    That is `model.backbone` where there is one ("backbone."), else the model itself ("").
    """
    backbone = getattr(model, "backbone", None)
    return ("backbone.", backbone) if isinstance(backbone, nn.Module) else ("", model)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a model or of its backbone, however deep they lie, in order.

    Raises:
        ValueError: there are none.
    """
    _, backbone = backbone_of(model)
    found = [name for name, module in backbone.named_modules() if _is_numbered(name, module)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no blocks.0, blocks.1, ... to compile or to shard by "
            'themselves; leave compile out, and take strategy="ddp"'
        )
    return list(backbone.get_submodule(min(found, key=lambda name: name.count("."))).children())


def _is_numbered(name: str, module: nn.Module) -> bool:
    return bool(_NUMBERED.search(name)) and isinstance(module, nn.ModuleList | nn.Sequential)
