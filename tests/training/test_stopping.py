"""Signals that ask a run to stop."""

import signal

import pytest

from visionmamba.training.stopping import StopRequest

pytestmark = pytest.mark.once


def test_repeated_termination_waits_for_the_end_of_the_step() -> None:
    stop = StopRequest()
    with stop.listening():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert stop.is_agreed


def test_second_interrupt_stops_a_lone_process_at_once() -> None:
    stop = StopRequest()
    with stop.listening():
        signal.raise_signal(signal.SIGINT)
        assert stop.is_agreed
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_second_interrupt_of_several_processes_waits() -> None:
    stop = StopRequest(num_processes=2)
    with stop.listening():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert not stop.is_agreed
        stop.agree(True)
    assert stop.is_agreed
