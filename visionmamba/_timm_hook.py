"""Registers our models as soon as timm is there, without importing it: timm takes seconds to load.

timm knows no entry points, so an import hook waits for `timm.models`.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "timm.models"
_ENTRY_POINTS = "visionmamba.models.timm"


def register_with_timm() -> None:
    """Register the models with timm: at once where it is loaded, else right after its import."""
    if _REGISTRY in sys.modules:
        import_module(_ENTRY_POINTS)
    else:
        sys.meta_path.insert(0, _AfterRegistry())


class _AfterRegistry(MetaPathFinder):
    """Makes the loader of `timm.models` import our entry points at its end; finds nothing else."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                import_module(_ENTRY_POINTS)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
