"""The README's promises: its code blocks run, in order, in one folder, as a reader would run them.

`python` blocks share their names; every line of a `bash` block is a visionmamba command; `sh`
blocks set a machine up, are not run, and may hold nothing else.
"""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from PIL import Image

from visionmamba.cli import main
from visionmamba.data import Digits

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETS_UP = ("make", "pip")
DOCUMENTS = (
    "README.md",
    "CHANGELOG.md",
    "docs/reproduction.md",
    "docs/kernels.md",
    "docs/weights.md",
    "docs/log.md",
)


def blocks(document: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / document).read_text())


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def make_readers_files(folder: Path) -> None:
    """The pictures that a reader has: digit.png and photos/{train,val}/{sky,sea}/*.jpg."""
    Digits().build().val.image(0).save(folder / "digit.png")
    for split in ("train", "val"):
        for name, color in (("sky", "skyblue"), ("sea", "teal")):
            place = folder / "photos" / split / name
            place.mkdir(parents=True)
            for index in range(8):
                Image.new("RGB", (64 + index, 48), color).save(place / f"{index}.jpg")


def test_every_block_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_readers_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for language, block in blocks("README.md"):
        if language == "python":
            exec(compile(block, "README.md", "exec"), names)
        elif language == "bash":
            for program, *arguments in commands(block):
                assert program == "visionmamba"
                assert main(arguments) == 0, arguments


def test_blocks_that_are_not_run_only_set_up() -> None:
    found = [block for language, block in blocks("README.md") if language == "sh"]
    assert found
    assert {words[0] for block in found for words in commands(block)} <= set(SETS_UP)


def test_tables_are_those_of_the_last_measurement() -> None:
    update = runpy.run_path(str(ROOT / "docs" / "update_results.py"))
    for document in update["DOCUMENTS"]:
        assert update["with_results"](document.read_text()) == document.read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_pictures_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
    local = [target for target in targets if "://" not in target]
    missing = [t for t in local if not ((ROOT / document).parent / t).exists()]
    assert missing == []
