"""What is installed: public names, the typing marker, kernel sources, one version everywhere."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import visionmamba

PACKAGE = Path(visionmamba.__file__).parent


@pytest.mark.parametrize("name", visionmamba.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(visionmamba, name) is not None
    assert name in dir(visionmamba)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'vim'"):
        visionmamba.vim  # noqa: B018  # type: ignore[attr-defined]


def test_version_is_that_of_the_installed_package() -> None:
    assert visionmamba.__version__ == importlib.metadata.version("visionmamba")


@pytest.mark.parametrize("name", ["py.typed", "demo/report.html", "ops/cpu/selective_scan.cpp"])
def test_package_carries_its_data(name: str) -> None:
    assert (PACKAGE / name).is_file()


def test_every_kernel_source_belongs_to_the_package() -> None:
    from visionmamba.ops.cpu.build import SOURCES

    assert all((PACKAGE / "ops" / "cpu" / name).is_file() for name in SOURCES)


def test_runs_as_a_module() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "visionmamba", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == f"visionmamba {visionmamba.__version__}"
