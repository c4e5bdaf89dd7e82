"""The page on training: its blocks run with small weights, its options and messages exist."""

import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.test_readme import BLOCK, ROOT, commands, make_readers_files, run, stand_in_weights
from visionmamba.cli.train import _parse_train
from visionmamba.recipes import RECIPES, vim_small_imagenet, vim_tiny_imagenet

pytestmark = pytest.mark.once

PAGE = ROOT / "docs" / "training.md"
SBATCH = ROOT / "docs" / "vim_imagenet.sbatch"
OF_OTHER_PROGRAMS = {
    *("--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"),
    *("--help", "--stride", "--resize"),  # convert's
    *("--workers", "--seconds"),  # bench's
}


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_readers_files(tmp_path)
    stand_in_weights(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    for language, block in BLOCK.findall(PAGE.read_text()):
        if language == "python":
            exec(compile(block, PAGE.name, "exec"), {})
        elif language == "bash":
            for words in commands(block):
                run(*words)
    judged = {path.name for path in Path("runs/photos/judged").iterdir()}
    assert judged == {"evaluation.json", "per_class.csv", "confusion.csv", "confusion.png"}


def options_of(recipe: str, *given: str) -> set[str]:
    with pytest.raises(ValueError, match="valid options: ") as caught:
        _parse_train(recipe, RECIPES[recipe], ["--out", "x", *given, "--no-such-option", "1"])
    return set(str(caught.value).split("valid options: ")[1].split(", "))


def test_every_option_on_the_page_exists() -> None:
    named = set(re.findall(r"--[a-z][a-z0-9.-]*", PAGE.read_text())) - OF_OTHER_PROGRAMS
    valid = options_of("finetune") | options_of("vim_tiny_imagenet")
    for source in ("folder", "shards", "hugging-face", "timm"):
        valid |= options_of("finetune", "--source", source)
    valid |= {"--no-cuda-graphs"}
    assert {option for option in named if option.rstrip(".") != "--data"} <= valid


def test_every_recipe_is_on_the_page() -> None:
    assert {name for name in RECIPES if f"`{name}`" not in PAGE.read_text()} == set()


def test_table_of_hyper_parameters_is_that_of_the_recipes() -> None:
    tiny, small = vim_tiny_imagenet(), vim_small_imagenet()
    rows = [line.strip("|").split(" | ") for line in PAGE.read_text().splitlines()]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 5}
    assert table["pictures in a step"][:2] == [str(tiny.batch_size), str(small.batch_size)]
    decays = [str(recipe.optimizer.weight_decay) for recipe in (tiny, small)]
    assert table["weight decay"][:2] == decays
    assert table["drop path"][:2] == ["0", str(small.model.drop_path)]


def test_batch_file_for_slurm_is_sound() -> None:
    assert subprocess.run(["bash", "-n", str(SBATCH)], check=False).returncode == 0
    text = SBATCH.read_text().replace("\\\n", " ").replace('"$run"', "runs/x")
    line = next(line for line in text.splitlines() if line.startswith("srun "))
    words = shlex.split(line)
    recipe, *given = words[words.index("train") + 1 :]
    parsed, options = _parse_train(recipe, RECIPES[recipe], given)
    assert parsed == replace(vim_tiny_imagenet(), precision="bfloat16")
    assert (options.num_workers, options.quiet) == (16, True)
