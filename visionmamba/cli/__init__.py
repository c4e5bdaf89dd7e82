"""The command `visionmamba`: parses its arguments, calls one function, prints what it returns.

Heavy packages are imported inside the commands, so that help appears at once.
"""

import os
import sys
from collections.abc import Callable, Sequence

from visionmamba import __version__
from visionmamba.cli import data, measure, study, train, use, weights
from visionmamba.cli.messages import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_WRONG_INPUT,
    complain,
    is_explained,
    sentence,
)
from visionmamba.cli.options import choose

_TRACEBACK_VARIABLE = "VISIONMAMBA_TRACEBACK"

_HELP = """\
usage: visionmamba COMMAND ...

Vision Mamba (Vim): train, use and measure it.

commands:
  train RECIPE --out DIR        train a recipe, or go on where an interrupted run was left;
                                `train finetune` is for a folder of your own
  eval WEIGHTS DATA             accuracy of own or published weights on labelled images, IoU of
                                segmenters on images with masks, average precision of detectors
  predict WEIGHTS IMAGE...      what images show; with a segmenter every pixel of them, with a
                                detector every object
  check DATA                    whether pictures with masks or objects can be used; what they hold
  models                        the published weights: names, accuracies, where they are
  convert IN OUT.safetensors    published weights as safetensors that eval and predict take
  info                          versions, devices, and which backend runs each operation
  demo                          train a small Vim beside a DeiT, measure both, write a report
  ablate bidirectional|readout|backbone|stride|choices --task TASK --out DIR
                                the paper's tables 4 and 5; Vim against DeiT: variants trained over
                                learning rates and seeds, or taken up where they were left
  bench efficiency|segmentation|detection|kernels|complexity|loader
                                time and memory against DeiT, of classifiers, segmenters and
                                detectors; the kernels one by one; operations and bytes beside the
                                paper's formulas; images/s of the loader

options:
  -h, --help                    this text; `visionmamba COMMAND --help` for a command's options
  --version                     the version
  --traceback                   show where an error came from (also VISIONMAMBA_TRACEBACK=1)

exit codes: 0 done, 1 failed while running (out of memory, loss not finite), 2 wrong input,
130 interrupted by Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a mistake ends in one sentence on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    shows_traceback = "--traceback" in given or bool(os.environ.get(_TRACEBACK_VARIABLE))
    given = [argument for argument in given if argument != "--traceback"]
    try:
        return _run(given)
    except BrokenPipeError:  # the reader of a pipe has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt as error:
        complain(str(error) or "interrupted")
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        if shows_traceback:
            raise
        complain(sentence(error))
        return EXIT_WRONG_INPUT
    except (MemoryError, RuntimeError) as error:
        if shows_traceback or not is_explained(error):
            raise
        complain(sentence(error))
        return EXIT_FAILED


def _run(given: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train.train,
        "eval": use.eval,
        "predict": use.predict,
        "check": data.check,
        "models": weights.models,
        "convert": weights.convert,
        "info": measure.info,
        "demo": measure.demo,
        "ablate": study.ablate,
        "bench": measure.bench,
    }
    if not given or given[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0 if given else EXIT_WRONG_INPUT
    if given[0] == "--version":
        print(f"visionmamba {__version__}")
        return 0
    command = choose(commands, given[0], what="command")
    return command(given[1:])
