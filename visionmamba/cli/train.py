"""`visionmamba train`: a recipe with its fields as options."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from visionmamba.cli.messages import EXIT_WRONG_INPUT, complain
from visionmamba.cli.options import choose, parse

if TYPE_CHECKING:
    from visionmamba.recipes import Recipe
    from visionmamba.training import FitResult


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where and how a recipe runs; nothing here changes its result on the CPU."""

    out: Path
    """Folder of the run; the same command goes on with what it finds there."""
    device: str = "auto"
    """"auto" (the GPU when there is one), "cpu", "cuda" or "cuda:N"."""
    num_workers: int = 0
    """Processes that prepare images beside the main one."""
    checkpoint_every_steps: int = 50
    """Steps between checkpoints, beside the one after each epoch."""
    quiet: bool = False
    """Show no progress."""


def train(given: list[str]) -> int:
    from visionmamba.recipes import RECIPES

    if not given or given[0] in ("-h", "--help"):
        print("usage: visionmamba train RECIPE --out DIR [--FIELD VALUE ...]\n\nrecipes:")
        for name, make in RECIPES.items():
            print(f"  {name:16}{(make.__doc__ or '').splitlines()[0]}")
        print("\n`visionmamba train RECIPE --help` shows the fields of a recipe")
        return 0 if given else EXIT_WRONG_INPUT
    make_recipe = choose(RECIPES, given[0], what="recipe")
    recipe, options = _parse_train(given[0], make_recipe(), given[1:])
    from visionmamba.training import fit

    result = fit(
        recipe,
        options.out,
        device=options.device,
        num_workers=options.num_workers,
        checkpoint_every_steps=options.checkpoint_every_steps,
        progress=not options.quiet,
    )
    print(_fit_text(result))
    _report_unreadable(result.out / "results.json")
    return 0


def _parse_train(name: str, recipe: "Recipe", given: list[str]) -> tuple["Recipe", RunOptions]:
    from visionmamba.recipes import Recipe

    @dataclass(frozen=True, kw_only=True)
    class Train:
        run: Annotated[RunOptions, tyro.conf.arg(name="")]
        recipe: Annotated[Recipe, tyro.conf.arg(name="")]

    default = Train(run=RunOptions(out=tyro.MISSING), recipe=recipe)
    parsed = parse(Train, given, prog=f"visionmamba train {name}", default=default)
    return parsed.recipe, parsed.run


def _fit_text(result: "FitResult") -> str:
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    if result.was_finished:
        return f"{result.out} is finished ({metrics}); nothing to do"
    return (
        f"{metrics} after {result.epochs} epochs; best in epoch {result.best['epoch']:.0f}; "
        f"{result.seconds:.1f} s, {result.images_per_second:.0f} images/s, "
        f"{result.parameters:,} parameters; all in {result.out}"
    )


def _report_unreadable(results: Path) -> None:
    unreadable = json.loads(results.read_text(encoding="utf-8"))["data"]["unreadable"]
    count = sum(len(files) for files in unreadable.values())
    if count:
        complain(f"unreadable images left out: {count}; {results} lists them")
