"""Dataclasses as options of the command line, and what is wrong with those that were given."""

import contextlib
import difflib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import groupby
from typing import TypeVar

import tyro

Parsed = TypeVar("Parsed")
Choice = TypeVar("Choice")

MAX_PIXELS = 89_478_485  # data.MAX_PIXELS, without importing torch
MAX_SHOWN_CLASSES = 30
NUM_WORST_CLASSES = 10

_MAX_WORKERS = 16


def parse(
    kind: type[Parsed], given: Sequence[str], *, prog: str, default: Parsed | None = None
) -> Parsed:
    """Returns the options; ValueError says in a sentence what is wrong with them."""
    parsed, unknown = parse_known(kind, given, prog=prog, default=default)
    if unknown:
        valid = [f"--{name}" for name in _option_names(parsed)]
        raise ValueError(
            f"{prog} does not know {unknown[0]}{nearest(unknown[0], valid)}; "
            f"valid options: {', '.join(valid)}"
        )
    return parsed


def parse_known(
    kind: type[Parsed], given: Sequence[str], *, prog: str, default: Parsed | None = None
) -> tuple[Parsed, list[str]]:
    """Returns the options, and what of the command line belongs to none of them."""
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
    return parsed, unknown


def image_size_of(given: tuple[int, ...] | None) -> int | tuple[int, int] | None:
    """Returns what `--image-size` means; ValueError for more than two numbers."""
    if given is None:
        return None
    if len(given) not in (1, 2):
        raise ValueError(
            f"--image-size takes a side, or height and width; got {len(given)} numbers"
        )
    return given[0] if len(given) == 1 else (given[0], given[1])


def num_workers_for(device: str, given: int | None, *, num_devices: int = 1) -> int:
    """Returns the processes that prepare images for one device, all cores by default on a GPU."""
    if given is not None:
        return given
    from visionmamba.models.weights import resolve_device

    if resolve_device(device).type != "cuda":
        return 0
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux only
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, min(_MAX_WORKERS, num_cores // num_devices))


def choose(choices: Mapping[str, Choice], name: str, *, what: str) -> Choice:
    if name in choices:
        return choices[name]
    raise ValueError(
        f"there is no {what} {name}{nearest(name, list(choices))}; "
        f"valid {what}s: {', '.join(choices)}"
    )


def nearest(name: str, valid: Sequence[str]) -> str:
    """Returns ", did you mean X?" when a valid name, or the end of a dotted one, is close."""
    short = {option.rsplit(".", 1)[-1].removeprefix("--"): option for option in reversed(valid)}
    wanted = name.rsplit(".", 1)[-1].removeprefix("--").replace("_", "-")
    close = difflib.get_close_matches(name, valid, n=1) or [
        short[match] for match in difflib.get_close_matches(wanted, list(short), n=1)
    ]
    return f", did you mean {close[0]}?" if close else ""


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
            is_unprefixed = field.name in ("run", "arguments", "recipe")
            names += _option_names(value, prefix if is_unprefixed else f"{prefix}{field.name}.")
        elif tyro.conf.Positional not in getattr(field.type, "__metadata__", ()):
            names.append(f"{prefix}{field.name}".replace("_", "-"))
    return names
