"""`visionmamba check`: what it prints, its exit code and its sentences."""

from pathlib import Path

import pytest

from tests.data.drawn_masks import ade20k, bands, mask_folder, save_mask
from visionmamba.cli import main

pytestmark = pytest.mark.once

Output = pytest.CaptureFixture[str]


def test_good_folder_ends_with_zero_and_shares(tmp_path: Path, capsys: Output) -> None:
    assert main(["check", str(mask_folder(tmp_path))]) == 0
    printed = capsys.readouterr()
    lines = [line.split() for line in printed.out.splitlines()]
    assert ["train:", "2", "pictures", "with", "masks"] in lines
    assert ["class", "train", "val"] in lines
    assert lines[-1] == ["nothing", "is", "wrong"]
    sky = next(line for line in lines if line[0] == "sky")
    assert sky[2:4] == ["in", "2"]
    assert printed.err == ""


def test_bad_files_are_named_and_end_with_one(tmp_path: Path, capsys: Output) -> None:
    root = mask_folder(tmp_path / "set")
    save_mask(root / "train" / "masks" / "0.png", bands(12, 16, (0, 7)))
    (root / "val" / "masks" / "1.png").unlink()
    out = tmp_path / "report"
    assert main(["check", str(root), "--out", str(out), "--format", "folder"]) == 1
    printed = capsys.readouterr().out
    assert f"class index: {root / 'train' / 'masks' / '0.png'} holds the number 7" in printed
    assert f"missing mask: {root / 'val' / 'images' / '1.png'} has no mask" in printed
    assert printed.endswith("wrong: 1 x class index, 1 x missing mask\n")
    assert (out / "problems.csv").is_file()


def test_many_problems_are_cut_short(tmp_path: Path, capsys: Output) -> None:
    root = mask_folder(tmp_path, sizes=((4, 4),) * 15)
    for mask in root.glob("*/masks/*.png"):
        save_mask(mask, bands(2, 2))
    assert main(["check", str(root)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("wrong size: ") == 20
    assert "and 10 more; --out DIR writes all" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder nowhere; wanted one of pictures with masks"),
        ([".", "--format", "cityscapes"], "there is no folder leftImg8bit/train; wanted"),
        (["."], "holds no pictures with masks or objects in a known layout"),
        ([".", "--num-workers", "-1"], "--num-workers must be at least 0, got -1"),
    ],
)
def test_mistakes_end_in_a_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_public_layout_is_recognised(tmp_path: Path, capsys: Output) -> None:
    assert main(["check", str(ade20k(tmp_path))]) == 0
    assert "no training mask shows: " in capsys.readouterr().out
