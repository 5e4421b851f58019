"""After an interrupt the running step is either finished whole or left alone."""

from __future__ import annotations

import contextlib
import signal

import pytest

from deploy.interrupts import (
    Interrupted,
    awaited,
    check_interrupt,
    deferred_interrupts,
    settled,
    terminated_is_interrupted,
)

METRICS = {"loss": 1.0}


class Learner:
    """A step that ends after so many looks."""

    def __init__(self, looks):
        self.looks, self.collected = looks, 0

    def finished(self):
        self.looks -= 1
        return self.looks <= 0

    def finish_step(self):
        self.collected += 1
        return METRICS


def test_a_running_step_is_waited_for_and_collected_once():
    learner = Learner(looks=3)
    assert settled(learner, seconds=60) is METRICS
    assert learner.collected == 1


def test_a_step_that_takes_too_long_is_not_collected():
    learner = Learner(looks=10**9)
    assert settled(learner, seconds=0.0) is None
    assert learner.collected == 0


def signalled(*numbers, then=lambda: None):
    """What went on after the signals, up to `then` included."""
    done = []
    with contextlib.suppress(Interrupted), terminated_is_interrupted(), deferred_interrupts():
        for number in numbers:
            signal.raise_signal(number)
        done.append("went on")
        then()
        done.append("beyond")
    return done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_waits_for_a_check(number, capfd):
    assert signalled(number, then=check_interrupt) == ["went on"]
    assert capfd.readouterr().err.count("interrupt noted") == 1
    check_interrupt()  # it was taken: nothing is left


def test_a_signal_that_no_check_took_is_raised_at_the_end_of_the_block():
    with pytest.raises(Interrupted), deferred_interrupts():
        signal.raise_signal(signal.SIGINT)


def test_a_second_signal_ends_at_once():
    with pytest.raises(KeyboardInterrupt) as raised:
        signalled(signal.SIGINT, signal.SIGTERM)
    assert type(raised.value) is KeyboardInterrupt, "nothing is waited for and kept any more"


def test_an_error_is_not_hidden_by_an_interrupt_and_no_signal_stays_behind():
    def fail():
        raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"):
        signalled(signal.SIGINT, then=fail)
    assert signalled(then=check_interrupt) == ["went on", "beyond"]


def test_the_handlers_before_are_there_again():
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with terminated_is_interrupted(), deferred_interrupts():
        assert signal.getsignal(signal.SIGINT) is not handlers[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_wait_for_a_step_can_be_interrupted_and_settled():
    learner = Learner(looks=3)
    assert signalled(signal.SIGINT, then=lambda: awaited(learner)) == ["went on"]
    assert learner.collected == 0
    assert settled(learner) is METRICS
