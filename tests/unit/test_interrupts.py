"""After an interrupt the running step is either finished whole or left alone."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time

import pytest

from latent_grpo.common.interrupts import (
    Interrupted,
    check_interrupt,
    deferred_interrupts,
    finish_within,
    sigterm_as_interrupt,
    wait_for_step,
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
    assert finish_within(learner, seconds=60) is METRICS
    assert learner.collected == 1


def test_a_step_that_takes_too_long_is_not_collected():
    learner = Learner(looks=10**9)
    assert finish_within(learner, seconds=0.0) is None
    assert learner.collected == 0


def signalled(*numbers, then=lambda: None):
    """What went on after the signals, up to `then` included."""
    done = []
    with contextlib.suppress(Interrupted), sigterm_as_interrupt(), deferred_interrupts():
        for number in numbers:
            signal.raise_signal(number)
        done.append("went on")
        then()
        done.append("beyond")
    return done


def fail():
    raise ValueError("the cause")


@pytest.mark.parametrize(("number", "terminated"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_an_interrupt_knows_which_signal_came_and_when(number, terminated):
    def interrupted():
        with sigterm_as_interrupt(), deferred_interrupts():
            signal.raise_signal(number)
            time.sleep(0.05)
            check_interrupt()

    before = time.monotonic()
    with pytest.raises(Interrupted) as raised:
        interrupted()
    assert raised.value.terminated is terminated
    assert before <= raised.value.at <= time.monotonic() - 0.05


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_waits_for_a_check(number, capfd):
    assert signalled(number, then=check_interrupt) == ["went on"]
    assert capfd.readouterr().err.count("interrupt received") == 1
    check_interrupt()  # it was taken: nothing is left


def test_a_signal_that_no_check_took_is_raised_at_the_end_of_the_block():
    with pytest.raises(Interrupted), deferred_interrupts():
        signal.raise_signal(signal.SIGINT)


def test_a_second_signal_ends_at_once():
    with pytest.raises(KeyboardInterrupt) as raised:
        signalled(signal.SIGINT, signal.SIGTERM)
    assert type(raised.value) is KeyboardInterrupt, "nothing is waited for and kept any more"


def test_an_error_is_not_hidden_by_an_interrupt_and_no_signal_stays_behind():
    with pytest.raises(ValueError, match="the cause"):
        signalled(signal.SIGINT, then=fail)
    assert signalled(then=check_interrupt) == ["went on", "beyond"]


@pytest.mark.parametrize(
    "fault", [lambda: signalled(signal.SIGINT, signal.SIGINT), lambda: signalled(signal.SIGINT, then=fail)]
)
def test_what_was_noted_does_not_outlive_the_block(fault):
    with contextlib.suppress(KeyboardInterrupt, ValueError):
        fault()
    check_interrupt()


def test_the_handlers_before_are_there_again():
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with sigterm_as_interrupt(), deferred_interrupts():
        assert signal.getsignal(signal.SIGINT) is not handlers[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert signalled(signal.SIGINT, then=check_interrupt) == ["went on", "beyond"]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_block_in_a_block_leaves_the_outer_one_as_it_was():
    def inner():
        with deferred_interrupts():
            pass
        signal.raise_signal(signal.SIGINT)

    assert signalled(then=inner) == ["went on", "beyond"], "only the outer block's end raised"


def test_a_signal_is_kept_when_nobody_reads_the_message():
    """`train 2>&1 | tee log`: the reader ends at the same Ctrl-C."""
    code = (
        "import signal, sys\n"
        "from latent_grpo.common.interrupts import Interrupted, deferred_interrupts\n"
        "from latent_grpo.deploy.run.progress import Reporter\n"
        "sys.stdin.readline()\n"
        "reporter, kept = Reporter(), False\n"
        "try:\n"
        "    with deferred_interrupts(), reporter.phase('steps', 1):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "        reporter.say('going on')\n"
        "except Interrupted:\n"
        "    reporter.say('keeping the state')\n"
        "    sys.exit(130)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    process.stdout.close()
    process.stdin.write(b"go\n")
    process.stdin.close()
    assert process.wait(60) == 130


def test_a_wait_for_a_step_can_be_interrupted_and_settled():
    learner = Learner(looks=3)
    assert signalled(signal.SIGINT, then=lambda: wait_for_step(learner)) == ["went on"]
    assert learner.collected == 0
    assert finish_within(learner, seconds=60) is METRICS
