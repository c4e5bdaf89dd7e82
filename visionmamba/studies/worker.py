"""A process of a study's pool: `python -m visionmamba.studies.worker`, started by pool.py alone."""

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import BinaryIO

from visionmamba.studies.jobs import Job, run_job


def _serve() -> None:
    """Trains what comes on standard input and answers on standard output, until the input ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the caller may ignore it
    orders: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    listener = threading.Thread(target=_hear, args=(sys.stdin.buffer, orders.put), daemon=True)
    listener.start()
    try:
        while (job := orders.get()) is not None:
            _log_to(job)
            answers.write(_answer_of(job))
            answers.flush()
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # an ordinary end aborts, as the listener holds the lock of standard input


def _hear(orders: BinaryIO, put: Callable[[Job | None], None]) -> None:
    while True:
        try:
            put(pickle.load(orders))
        except (EOFError, pickle.UnpicklingError):  # the caller closed it, or died while writing
            break
    put(None)
    os.kill(os.getpid(), signal.SIGINT)  # `fit` writes a checkpoint and raises KeyboardInterrupt


def _log_to(job: Job) -> None:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)


def _answer_of(job: Job) -> bytes:
    """Returns the pickled outcome, or the error that the caller is to raise.

    Any other error ends this process; the log keeps the traceback of either.
    """
    try:
        return pickle.dumps(run_job(job))
    except (ValueError, OSError, ImportError, MemoryError) as error:
        traceback.print_exc()
        return pickle.dumps(error)


if __name__ == "__main__":
    _serve()
