"""Asking a run to stop: signals are noted, and all processes stop after the same step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """The run was asked to stop and has done so, between two steps."""


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether Ctrl-C or a termination signal has asked to stop.

    A second Ctrl-C stops a process that is alone at once; several, whose launcher may repeat it, go
    on to the end of the step. A termination signal may always be repeated, as timeout does.
    """

    def __init__(self, *, num_processes: int = 1) -> None:
        """One process alone agrees with itself at once."""
        self._is_alone = num_processes == 1
        self._is_agreed = False
        self.is_made = False
        """Whether this process was asked."""

    @property
    def is_agreed(self) -> bool:
        """Whether all processes know that one of them was asked."""
        return self.is_made if self._is_alone else self._is_agreed

    def agree(self, is_made_anywhere: bool) -> None:
        """Notes what all processes have found out together."""
        self._is_agreed = is_made_anywhere

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over in its body; signals reach the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.getsignal(number) for number in _SIGNALS}
        self.take_signals()
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def take_signals(self) -> None:
        """Takes the signals over once more, in case somebody else has."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_made and self._is_alone and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_made = True
