"""The command `visionmamba`: parses its arguments, calls one function, prints what it returns.

Heavy packages are imported inside the commands, so that help appears at once.
"""

import contextlib
import difflib
import io
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro

from visionmamba import __version__

if TYPE_CHECKING:
    from visionmamba.recipes import Recipe
    from visionmamba.tasks import Classification, Evaluation
    from visionmamba.training import FitResult

_EXIT_FAILED = 1
_EXIT_WRONG_INPUT = 2
_EXIT_INTERRUPTED = 130
_MAX_PIXELS = 89_478_485  # data.MAX_PIXELS, without importing torch
_TRACEBACK_VARIABLE = "VISIONMAMBA_TRACEBACK"
_INFO_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "pytorch-lightning", "triton")

_HELP = """\
usage: visionmamba COMMAND ...

Vision Mamba (Vim): train, use and measure it.

commands:
  train RECIPE --out DIR        train a recipe, or go on where an interrupted run was left
  eval WEIGHTS DATA             accuracy on digits or on a folder of labelled images
  predict WEIGHTS IMAGE...      what images show
  models                        the published weights: names, accuracies, where they are
  convert IN OUT.safetensors    published weights as safetensors that eval and predict take
  info                          versions, devices, and which backend runs each operation
  demo                          train a small Vim beside a DeiT, measure both, write a report
  bench efficiency|kernels|complexity
                                time and memory against DeiT; the kernels one by one; operations
                                and bytes beside the paper's formulas

options:
  -h, --help                    this text; `visionmamba COMMAND --help` for a command's options
  --version                     the version
  --traceback                   show where an error came from (also VISIONMAMBA_TRACEBACK=1)

exit codes: 0 done, 1 failed while running (out of memory, loss not finite), 2 wrong input,
130 interrupted by Ctrl-C
"""

Parsed = TypeVar("Parsed")
Choice = TypeVar("Choice")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a mistake ends in one sentence on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    shows_traceback = "--traceback" in given or bool(os.environ.get(_TRACEBACK_VARIABLE))
    given = [argument for argument in given if argument != "--traceback"]
    try:
        return _run(given)
    except BrokenPipeError:  # the reader of a pipe has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_FAILED
    except KeyboardInterrupt as error:
        _complain(str(error) or "interrupted")
        return _EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        if shows_traceback:
            raise
        _complain(_sentence(error))
        return _EXIT_WRONG_INPUT
    except (MemoryError, RuntimeError) as error:
        if shows_traceback or not _is_explained(error):
            raise
        _complain(_sentence(error))
        return _EXIT_FAILED


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


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Accuracy of trained weights on labelled images."""

    weights: tyro.conf.Positional[Path]
    """File that training wrote, such as runs/digits/best.safetensors."""
    data: tyro.conf.Positional[str]
    """digits, a folder with train/ and val/, or a folder of class folders."""
    split: Literal["train", "val"] = "val"
    """Which half of the data."""
    device: str = "auto"
    """"auto" (the GPU when there is one), "cpu", "cuda" or "cuda:N"."""
    batch_size: int = 64
    """Images that go through the model at once."""
    num_workers: int = 0
    """Processes that prepare images beside the main one."""
    on_unreadable: Literal["fail", "skip"] = "fail"
    """Stop at an image that cannot be opened, or leave it out and list it."""
    max_pixels: int = _MAX_PIXELS
    """Largest image, width times height, that is opened."""
    out: Path | None = None
    """Folder for evaluation.json."""


@dataclass(frozen=True, kw_only=True)
class Predict:
    """What images show."""

    weights: tyro.conf.Positional[Path]
    """File that training wrote, such as runs/digits/best.safetensors."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or folders of them."""
    top_k: int = 5
    """How many classes to name."""
    json: bool = False
    """Print JSON instead of text."""
    out: Path | None = None
    """Folder for a JSON file and an annotated picture of each image."""
    device: str = "auto"
    """"auto" (the GPU when there is one), "cpu", "cuda" or "cuda:N"."""
    batch_size: int = 32
    """Images that go through the model at once."""
    on_unreadable: Literal["fail", "skip"] = "fail"
    """Stop at an image that cannot be opened, or leave it out and report it."""
    max_pixels: int = _MAX_PIXELS
    """Largest image, width times height, that is opened."""


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


@dataclass(frozen=True, kw_only=True)
class Info:
    """Versions, devices, and which backend runs each operation and why."""

    json: bool = False
    """Print JSON instead of text."""


def _run(given: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "predict": _predict,
        "models": _models,
        "convert": _convert,
        "info": _info,
        "demo": _demo,
        "bench": _bench,
    }
    if not given or given[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0 if given else _EXIT_WRONG_INPUT
    if given[0] == "--version":
        print(f"visionmamba {__version__}")
        return 0
    command = _choose(commands, given[0], what="command")
    return command(given[1:])


def _train(given: list[str]) -> int:
    from visionmamba.recipes import RECIPES

    if not given or given[0] in ("-h", "--help"):
        print("usage: visionmamba train RECIPE --out DIR [--FIELD VALUE ...]\n\nrecipes:")
        for name, make in RECIPES.items():
            print(f"  {name:16}{(make.__doc__ or '').splitlines()[0]}")
        print("\n`visionmamba train RECIPE --help` shows the fields of a recipe")
        return 0 if given else _EXIT_WRONG_INPUT
    make_recipe = _choose(RECIPES, given[0], what="recipe")
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
    parsed = _parse(Train, given, prog=f"visionmamba train {name}", default=default)
    return parsed.recipe, parsed.run


def _eval(given: list[str]) -> int:
    options = _parse(Eval, given, prog="visionmamba eval")
    from visionmamba.tasks import evaluate

    evaluation = evaluate(
        options.weights,
        options.data,
        split=options.split,
        device=options.device,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        on_unreadable=options.on_unreadable,
        max_pixels=options.max_pixels,
    )
    if options.out is not None:
        print(evaluation.save(options.out))
    _print_evaluation(evaluation)
    return 0


def _predict(given: list[str]) -> int:
    options = _parse(Predict, given, prog="visionmamba predict")
    if not options.images:
        raise ValueError("predict needs at least one image or folder: visionmamba predict W IMAGE")
    from visionmamba.data import split_readable
    from visionmamba.tasks import Classifier

    classifier = Classifier.load(options.weights, device=options.device)
    files = _image_files(options.images)
    if options.on_unreadable == "skip":
        files, reasons = split_readable(files, max_pixels=options.max_pixels)
        for reason in reasons:
            _complain(f"left out: {reason}")
    found = classifier(
        files,
        top_k=options.top_k,
        batch_size=options.batch_size,
        max_pixels=options.max_pixels,
    )
    if options.out is not None:
        _save_all(found, options.out)
    if options.json:
        print(json.dumps([one.to_dict() for one in found], indent=2, ensure_ascii=False))
        return 0
    for one in found:
        shares = zip(map(_readable, one.labels), one.probabilities, strict=True)
        print(f"{one.file}: " + ", ".join(f"{label} {share:.1%}" for label, share in shares))
    return 0


def _models(given: list[str]) -> int:
    if given and given[0] in ("-h", "--help"):
        print("usage: visionmamba models\n\nthe published weights, for convert and from_pretrained")
        return 0
    if given:
        raise ValueError(f"visionmamba models takes no options; got {given[0]}")
    from visionmamba.models.released import models_table

    print(models_table())
    print("\nAccuracies, per cent on ImageNet-1k, are the authors'. visionmamba convert NAME OUT")
    return 0


def _convert(given: list[str]) -> int:
    options = _parse(Convert, given, prog="visionmamba convert")
    size = options.image_size
    if size is not None and len(size) not in (1, 2):
        raise ValueError(f"--image-size takes a side, or height and width; got {len(size)} numbers")
    from visionmamba.models import Vim, save
    from visionmamba.models.config import VimOptions

    overrides: VimOptions = {}
    if options.num_classes is not None:
        overrides["num_classes"] = options.num_classes
    if options.in_channels is not None:
        overrides["in_channels"] = options.in_channels
    if size is not None:
        overrides["image_size"] = size[0] if len(size) == 1 else (size[0], size[1])
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


def _info(given: list[str]) -> int:
    options = _parse(Info, given, prog="visionmamba info")
    facts = _facts()
    if options.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    for title, values in facts.items():
        print(f"{title}:")
        for name, value in values.items():
            print(f"  {name:28}{value}")
    return 0


def _demo(given: list[str]) -> int:
    from visionmamba.demo import Demo

    print(_parse(Demo, given, prog="visionmamba demo").run())
    return 0


def _bench(given: list[str]) -> int:
    from visionmamba.bench.complexity import Complexity
    from visionmamba.bench.efficiency import Efficiency
    from visionmamba.bench.kernels import Kernels

    benchmarks: dict[str, type[Efficiency | Kernels | Complexity]] = {
        "efficiency": Efficiency,
        "kernels": Kernels,
        "complexity": Complexity,
    }
    if not given or given[0] in ("-h", "--help"):
        print(f"usage: visionmamba bench {{{','.join(benchmarks)}}} [--help] ...")
        return 0 if given else _EXIT_WRONG_INPUT
    chosen = _choose(benchmarks, given[0], what="benchmark")
    _parse(chosen, given[1:], prog=f"visionmamba bench {given[0]}").run()
    return 0


def _parse(
    kind: type[Parsed], given: Sequence[str], *, prog: str, default: Parsed | None = None
) -> Parsed:
    """Returns the options; ValueError says in a sentence what is wrong with them."""
    parsed: Parsed
    boxes = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxes):
            parsed, unknown = tyro.cli(
                kind,
                args=list(given),
                prog=prog,
                default=tyro.MISSING_NONPROP if default is None else default,
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as exit_request:
        if not exit_request.code:
            raise
        raise ValueError(f"{_first_sentence(boxes.getvalue())}; see {prog} --help") from None
    if unknown:
        valid = [f"--{name}" for name in _option_names(parsed)]
        raise ValueError(
            f"{prog} does not know {unknown[0]}{_nearest(unknown[0], valid)}; "
            f"valid options: {', '.join(valid)}"
        )
    return parsed


def _first_sentence(box: str) -> str:
    """Returns the text of a message that tyro drew as a box, without its title and what follows."""
    lines = [line.strip(" │╭╮╰╯") for line in box.splitlines()][1:]
    parts = [list(part) for is_text, part in groupby(lines, _is_text) if is_text]
    return " ".join(" ".join(parts[0]).split()).rstrip(".") if parts else box.strip()


def _is_text(line: str) -> bool:
    return bool(line.strip("─-"))


def _option_names(parsed: object, prefix: str = "") -> list[str]:
    assert is_dataclass(parsed)
    names: list[str] = []
    for field in fields(parsed):
        value = getattr(parsed, field.name)
        if is_dataclass(value):
            is_unprefixed = field.name in ("run", "recipe")
            names += _option_names(value, prefix if is_unprefixed else f"{prefix}{field.name}.")
        elif tyro.conf.Positional not in getattr(field.type, "__metadata__", ()):
            names.append(f"{prefix}{field.name}".replace("_", "-"))
    return names


def _choose(choices: dict[str, Choice], name: str, *, what: str) -> Choice:
    if name in choices:
        return choices[name]
    raise ValueError(
        f"there is no {what} {name}{_nearest(name, list(choices))}; "
        f"valid {what}s: {', '.join(choices)}"
    )


def _nearest(name: str, valid: Sequence[str]) -> str:
    """Returns ", did you mean X?" when a valid name, or the end of a dotted one, is close."""
    short = {option.rsplit(".", 1)[-1].removeprefix("--"): option for option in reversed(valid)}
    wanted = name.rsplit(".", 1)[-1].removeprefix("--").replace("_", "-")
    close = difflib.get_close_matches(name, valid, n=1) or [
        short[match] for match in difflib.get_close_matches(wanted, list(short), n=1)
    ]
    return f", did you mean {close[0]}?" if close else ""


def _readable(label: str) -> str:
    """Returns the label, with its meaning where it is a number of WordNet, as in ImageNet."""
    if not re.fullmatch(r"n\d{8}", label):
        return label
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    if label not in info.label_names():  # type: ignore[no-untyped-call]
        return label
    first_name = info.label_name_to_description(label).split(",")[0]
    return f"{first_name} ({label})"


def _image_files(paths: Sequence[Path]) -> list[Path]:
    from visionmamba.data import image_files_in

    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(image_files_in(path))
        if not inside:
            raise ValueError(f"folder {path} holds no images; give image files or a folder of them")
        files += inside
    return files


def _save_all(found: Sequence["Classification"], folder: Path) -> None:
    """Saves each under its file's name, numbered where files of several folders share one."""
    taken: set[str] = set()
    for one in found:
        stem = Path(one.file or "image").stem
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name)
        one.save(folder, name=name)


def _facts() -> dict[str, dict[str, str]]:
    import torch

    from visionmamba.ops import backends

    versions = {"visionmamba": __version__, "python": platform.python_version()}
    for package in _INFO_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads, "}
    devices["cpu"] += torch.backends.cpu.get_cpu_capability()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    running = {f"{one.op} on {one.device}": f"{one.name}: {one.reason}" for one in backends()}
    return {"versions": versions, "devices": devices, "backends": running}


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
        _complain(f"unreadable images left out: {count}; {results} lists them")


def _print_evaluation(evaluation: "Evaluation") -> None:
    print(f"top-1 {evaluation.accuracy:.2%}, top-5 {evaluation.top5_accuracy:.2%}", end="")
    print(f" of {evaluation.num_images} images")
    for name, accuracy in evaluation.per_class.items():
        print(f"  {name:24}{accuracy:.2%}")
    for reason in evaluation.unreadable:
        _complain(f"left out: {reason}")


def _is_explained(error: BaseException) -> bool:
    from visionmamba.data import BatchTooLargeError
    from visionmamba.training import NonFiniteError

    return isinstance(error, BatchTooLargeError | NonFiniteError)


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    return str(error) or type(error).__name__


def _complain(sentence: str) -> None:
    print(f"visionmamba: {sentence}", file=sys.stderr)
