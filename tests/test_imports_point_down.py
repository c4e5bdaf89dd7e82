"""A folder of the package imports lower ranks only, and `import visionmamba` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import visionmamba

PACKAGE = Path(visionmamba.__file__).parent
RANKS = {
    "ops": 0,
    "models": 1,
    "data": 1,
    "tasks": 2,
    "training": 3,
    "streaming": 3,
    "recipes": 4,
    "bench": 4,
    "demo": 5,
    "studies": 5,
    "serve": 5,
    "cli": 6,
    "__main__": 7,
}
SOURCES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in RANKS
)


def imported_layers(path: Path) -> set[str]:
    """The layers of visionmamba that a source file imports, absolutely or relatively."""
    package = ("visionmamba", *path.relative_to(PACKAGE).parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*base, *filter(None, [node.module])))
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "visionmamba" and part[1:] and part[1] in RANKS}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = {name for name, rank in RANKS.items() if rank < RANKS[layer]} | {layer}
    assert imported_layers(path) <= allowed


def test_every_folder_has_a_rank() -> None:
    folders = {
        path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    assert folders <= RANKS.keys()


def test_import_loads_nothing_heavy() -> None:
    heavy = {"torch", "timm", "pytorch_lightning", "matplotlib", "sklearn", "tyro"}
    program = f"import sys, visionmamba; print(sorted({heavy!r} & sys.modules.keys()))"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
