"""`visionmamba train`: a recipe with its arguments and its fields as options."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from visionmamba.cli.messages import EXIT_WRONG_INPUT, complain
from visionmamba.cli.options import choose, num_workers_for, parse, parse_known

if TYPE_CHECKING:
    from visionmamba.recipes import DetectionRecipe, MakeRecipe, Recipe, SegmentationRecipe
    from visionmamba.training import FitResult

Source = Literal["folder", "shards", "hugging-face", "timm", "digits"]
MaskSource = Literal["ade20k", "cityscapes", "masks", "shapes"]
ObjectSource = Literal["coco", "objects"]

_HELP_OPTIONS = ("-h", "--help")
_ARGUMENT_HELP = {
    "variant": "What the recipe follows where the paper and the authors' script differ.",
    "weights": "What to begin with: a file of this package, the authors' .pth, a published name; "
    "None begins with drawn weights.",
    "size": "Of the model, without weights.",
    "image_size": "Side in pixels, of the model and of its pictures.",
    "source": "Where the pictures come from, instead of what the recipe says; --data.FIELD are its "
    "options (docs/training.md, docs/segmentation.md, docs/detection.md).",
}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where and how a recipe runs; nothing here changes its result on the CPU."""

    out: Path
    """Folder of the run; the same command goes on with what it finds there."""
    device: str = "auto"
    """"auto" (the GPU when there is one), "cpu", "cuda" or "cuda:N"."""
    devices: int = 1
    """Devices of this machine that share each step; under torchrun and srun leave it out."""
    nodes: int = 1
    """Machines; under torchrun and srun leave it out."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How devices share the work: "ddp" keeps the model on each, "fsdp" divides it among them."""
    num_workers: int | None = None
    """Processes that prepare images beside the one of each device; by default the machine's cores
    divided by its devices (at most 16) on GPUs, none on the CPU."""
    checkpoint_every_steps: int = 500
    """Steps between checkpoints, beside the one after each epoch."""
    cuda_graphs: tyro.conf.DisallowNone[bool | None] = None  # not on the command line, that is
    """Record forward and backward of the model once and replay them, which spares the host. Without
    either: on one NVIDIA GPU, but for --compile and what cannot be recorded, such as detectors."""
    quiet: bool = False
    """Show no progress."""


def train(given: list[str]) -> int:
    """Runs `visionmamba train`."""
    from visionmamba.recipes import RECIPES

    if not given or given[0] in _HELP_OPTIONS:
        print("usage: visionmamba train RECIPE --out DIR [--FIELD VALUE ...]\n\nrecipes:")
        width = max(map(len, RECIPES)) + 2
        for name, make in RECIPES.items():
            print(f"  {name:{width}}{(make.__doc__ or '').splitlines()[0]}")
        print("\n`visionmamba train RECIPE --help` shows the fields of a recipe")
        return 0 if given else EXIT_WRONG_INPUT
    make_recipe = choose(RECIPES, given[0], what="recipe")
    recipe, options = _parse_train(given[0], make_recipe, given[1:])
    from visionmamba.training import fit
    from visionmamba.training.world import find_world

    world = find_world(devices=options.devices, nodes=options.nodes)
    result = fit(
        recipe,
        options.out,
        device=options.device,
        devices=options.devices,
        nodes=options.nodes,
        strategy=options.strategy,
        num_workers=num_workers_for(
            options.device, options.num_workers, num_devices=world.size // world.nodes
        ),
        checkpoint_every_steps=options.checkpoint_every_steps,
        cuda_graphs=options.cuda_graphs,
        progress=not options.quiet,
    )
    if world.is_main:
        print(_fit_text(result))
        _report_unreadable(result.out / "results.json")
    return 0


def _parse_train(
    name: str, make_recipe: "MakeRecipe", given: list[str]
) -> tuple["Recipe | SegmentationRecipe | DetectionRecipe", RunOptions]:
    """Returns the recipe and how it shall run.

    What the recipe's function takes is read first, since it decides the defaults of all else.
    """
    prog = f"visionmamba train {name}"
    arguments = _argument_fields(make_recipe)
    early: type[Any] = dataclasses.make_dataclass("Arguments", arguments, frozen=True, kw_only=True)
    wants_help = any(option in given for option in _HELP_OPTIONS)
    chosen, rest = parse_known(early, [x for x in given if x not in _HELP_OPTIONS], prog=prog)
    values = dataclasses.asdict(chosen)
    source = values.pop("source")
    recipe = make_recipe(**values)
    recipe_class: type[Any] = type(recipe)
    if source is not None:
        recipe = dataclasses.replace(recipe, **{"data": _source(source)})
    fields_of_recipe = {field.name for field in dataclasses.fields(recipe)}
    shown = [one for one in arguments if one[0] not in fields_of_recipe]  # those are shown anyway
    shown_class = dataclasses.make_dataclass("Arguments", shown, frozen=True, kw_only=True)

    @dataclass(frozen=True, kw_only=True)
    class Train:
        run: Annotated[RunOptions, tyro.conf.arg(name="")]
        arguments: Annotated[Any, tyro.conf.arg(name="", constructor=shown_class)]
        recipe: Annotated[recipe_class, tyro.conf.arg(name="")]  # type: ignore[valid-type]

    default = Train(
        run=RunOptions(out=tyro.MISSING),
        arguments=shown_class(**{one[0]: getattr(chosen, one[0]) for one in shown}),
        recipe=recipe,
    )
    rest = [*rest, "--help"] if wants_help else rest
    parsed = parse(Train, rest, prog=prog, default=default)
    return parsed.recipe, parsed.run


def _argument_fields(
    make_recipe: "MakeRecipe",
) -> list[tuple[str, Any, Any]]:
    """Returns the arguments of a recipe's function, and `source`, as fields of a dataclass."""
    from visionmamba.recipes import DetectionRecipe, Recipe, SegmentationRecipe

    signature = inspect.signature(make_recipe)
    sources_of: dict[type[Any], Any] = {
        Recipe: Source,
        SegmentationRecipe: MaskSource,
        DetectionRecipe: ObjectSource,
    }
    sources = sources_of[signature.return_annotation]
    fields: list[tuple[str, Any, Any]] = [("source", sources | None, None)]
    fields += [
        (name, parameter.annotation, parameter.default)
        for name, parameter in signature.parameters.items()
        if name != "root"  # which is --data.root
    ]
    return [
        (name, Annotated[kind, tyro.conf.arg(help=_ARGUMENT_HELP[name])], default)
        for name, kind, default in fields
    ]


def _source(name: Source | MaskSource | ObjectSource) -> Any:
    from visionmamba.data import (
        ADE20K,
        Cityscapes,
        Coco,
        Digits,
        DrawnObjects,
        HuggingFaceData,
        ImageFolder,
        MaskFolder,
        Shapes,
        TimmData,
        WebShards,
    )

    sources: Mapping[Source | MaskSource | ObjectSource, Callable[[], Any]] = {
        "folder": ImageFolder,
        "shards": WebShards,
        "hugging-face": HuggingFaceData,
        "timm": TimmData,
        "digits": Digits,
        "ade20k": ADE20K,
        "cityscapes": Cityscapes,
        "masks": MaskFolder,
        "shapes": Shapes,
        "coco": Coco,
        "objects": DrawnObjects,
    }
    return sources[name]()


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
    unreadable = json.loads(results.read_text(encoding="utf-8"))["unreadable"]
    count = sum(len(files) for files in unreadable.values())
    if count:
        complain(f"unreadable images left out: {count}; {results} lists them")
