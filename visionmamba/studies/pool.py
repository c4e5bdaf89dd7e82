"""Several processes that train at once, on one device, and stop together.

A process takes one training after another, since importing and the first contact with a GPU take
seconds. It lives in a session of its own, so that Ctrl-C reaches the caller alone; the end of its
orders tells it to write a checkpoint and go, also when the caller dies.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from types import FrameType, TracebackType
from typing import Any

from visionmamba.studies.jobs import Job, Outcome, run_job


class TrainingProcessError(RuntimeError):
    """A process of the pool failed; the message names its log."""


class TrainingPool:
    """Trains jobs in so many processes; with one, in the caller's own."""

    def __init__(self, num_processes: int) -> None:
        """Starts nothing yet; the processes share the machine's cores, unless OMP_NUM_THREADS says
        how many threads each has."""
        self._num_processes = num_processes
        self._waiting: deque[Job] = deque()
        self._workers: list[_Worker] = []
        self._answers: queue.SimpleQueue[tuple[_Worker, Any]] = queue.SimpleQueue()
        self._former_handler: Any = None

    def __enter__(self) -> "TrainingPool":
        if threading.current_thread() is threading.main_thread():
            self._former_handler = signal.signal(signal.SIGTERM, _interrupt)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Lets every process write a checkpoint and end; a second Ctrl-C ends them at once."""
        self._waiting.clear()
        for worker in self._workers:
            worker.dismiss()
        try:
            for worker in self._workers:
                worker.wait()
        except KeyboardInterrupt:
            for worker in self._workers:
                worker.kill()
            raise
        finally:
            if self._former_handler is not None:
                signal.signal(signal.SIGTERM, self._former_handler)

    @property
    def num_unfinished(self) -> int:
        """Jobs that were submitted and have not come back."""
        return len(self._waiting) + sum(worker.job is not None for worker in self._workers)

    def submit(self, job: Job) -> None:
        """Adds a job behind those that wait."""
        self._waiting.append(job)
        if self._num_processes > 1:
            self._hand_out()

    def next_outcome(self) -> tuple[Job, Outcome]:
        """Returns one of the submitted jobs with what came of it, as soon as one is done.

        Raises:
            ValueError, OSError, ImportError, BatchTooLargeError: what a run complained of.
            TrainingProcessError: a run failed for another reason, or its process died.
            KeyboardInterrupt: stopped by Ctrl-C or a termination signal.
        """
        if self._num_processes == 1:
            own = self._waiting.popleft()
            return own, run_job(own)
        while True:
            worker, answer = self._answers.get()
            job, worker.job = worker.job, None
            if job is not None:
                break
            self._workers.remove(worker)  # it died with nothing to do
        if answer is None:
            worker.dismiss()  # it may live on after an answer that cannot be read
            code = worker.wait()
            self._workers.remove(worker)
            what = f"ended with code {code}" if code else "ended with an unreadable answer"
            raise TrainingProcessError(f"a training {what}; {job.log} tells why")
        if isinstance(answer, MemoryError):
            raise type(answer)(f"{answer}, or train fewer at once with --jobs") from answer
        if isinstance(answer, BaseException):
            raise answer
        self._hand_out()
        return job, answer

    def _hand_out(self) -> None:
        while self._waiting:
            idle = next((worker for worker in self._workers if worker.job is None), None)
            if idle is None:
                if len(self._workers) == self._num_processes:
                    return
                idle = _Worker(self._answers, threads=max(1, _num_cores() // self._num_processes))
                self._workers.append(idle)
            idle.give(self._waiting.popleft())


class _Worker:
    """A process that trains what it is given, and the thread that hears its answers, or its end."""

    def __init__(self, answers: "queue.SimpleQueue[tuple[_Worker, Any]]", *, threads: int) -> None:
        self.job: Job | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "visionmamba.studies.worker"],
            env={"OMP_NUM_THREADS": str(threads)} | os.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, args=(answers,), daemon=True)
        self._listener.start()

    def give(self, job: Job) -> None:
        assert self._process.stdin is not None
        self.job = job
        with contextlib.suppress(BrokenPipeError):  # it died, which the listener tells
            pickle.dump(job, self._process.stdin)
            self._process.stdin.flush()

    def dismiss(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone
            self._process.stdin.close()

    def wait(self) -> int:
        code = self._process.wait()
        self._listener.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _listen(self, answers: "queue.SimpleQueue[tuple[_Worker, Any]]") -> None:
        assert self._process.stdout is not None
        while True:
            try:
                answer = pickle.load(self._process.stdout)
            except Exception:  # it is gone, or its error cannot be built anew from the arguments
                answers.put((self, None))
                return
            answers.put((self, answer))


def _num_cores() -> int:
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux only
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a launcher may repeat it; Ctrl-C still ends all at once
    raise KeyboardInterrupt
