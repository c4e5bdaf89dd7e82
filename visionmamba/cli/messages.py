"""How the command ends: exit codes, and mistakes told in one sentence on stderr."""

import sys

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130


def complain(sentence: str) -> None:
    print(f"visionmamba: {sentence}", file=sys.stderr)


def sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    return str(error) or type(error).__name__


def is_explained(error: BaseException) -> bool:
    from visionmamba.data import BatchTooLargeError
    from visionmamba.studies.pool import TrainingProcessError
    from visionmamba.training import NonFiniteError

    return isinstance(error, BatchTooLargeError | NonFiniteError | TrainingProcessError)
