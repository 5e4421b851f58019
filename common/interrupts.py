"""Deferral of Ctrl-C and SIGTERM until the end of a step, so that the state they leave is whole.

Python raises KeyboardInterrupt between any two instructions: between the calls that start a step on two ranks, say, or
between a step's end and the record that it ended. Inside :func:`deferred_interrupts` a first signal is only noted,
and :func:`check_interrupt` raises it where a loop waits; publishing weights, saving and writing dumps end first, each
within its own deadline. The loop then lets the running step end (`deploy.run.stepping`). A second signal raises at
once; the last checkpoint stays valid.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Protocol

from latent_grpo.common import main_loop

LEAVE_S = 30.0  # until every process is gone, from the end of the wait for the running step or from a second signal
POLL_S = 0.02  # nothing wakes a wait when the learner is done, so it polls often
SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTED = b"\ninterrupt received: the step ends and its state is saved; a second interrupt ends the command at once\n"


class Interrupted(KeyboardInterrupt):
    """An interrupt that a loop takes where it waits, so that its state can be finished and saved.

    `terminated` says whether the signal was SIGTERM; `at` is the `time.monotonic()` at which it came.
    """

    def __init__(self, number: int, at: float):
        super().__init__()
        self.terminated, self.at = number == signal.SIGTERM, at


class _Deferral:
    noted: Interrupted | None = None
    taken = False

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.noted and time.monotonic() - self.noted.at < _same_signal_s:
            return
        if self.noted:
            raise KeyboardInterrupt
        self.noted = Interrupted(number, time.monotonic())
        with contextlib.suppress(OSError):  # `| tee`: it may have died of the same Ctrl-C
            os.write(2, NOTED)  # not a print: the signal may have arrived inside one

    def take(self) -> None:
        if self.noted and not self.taken:
            self.taken = True
            raise self.noted


_innermost: _Deferral | None = None
_left: Interrupted | None = None  # noted in a block that an error has ended
_same_signal_s = 0.0


def ignore_repeats(seconds: float) -> None:
    """Takes signals within `seconds` of a first one for the same: a process may get one by more than one way."""
    global _same_signal_s
    _same_signal_s = seconds


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Defers a first SIGINT or SIGTERM to :func:`check_interrupt`, at the latest to the end of the block.

    Use it in the main thread. An ignored signal stays ignored. An error inside the block takes precedence over a
    signal that no check has raised; :func:`interrupt_left` returns that.
    """
    global _innermost, _left
    outer, deferral = _innermost, _Deferral()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        _innermost = deferral
        for number in before:
            signal.signal(number, deferral.note)
        yield
    except Exception:
        _left = deferral.noted
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _innermost = outer
    deferral.take()


def interrupt_left() -> Interrupted | None:
    """Returns, once, a signal that came before an error ended its block: whoever mends the error must not go on."""
    global _left
    found, _left = _left, None
    return found


def check_interrupt() -> None:
    """Raises :class:`Interrupted` once for a deferred signal."""
    main_loop.passed()
    if _innermost is not None:
        _innermost.take()


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Makes SIGTERM (a stopped job, an evicted pod) end a run as Ctrl-C does, with a checkpoint."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


class Stepping(Protocol):
    """A learner that takes steps, such as a subclass of `learner.group.RankGroup`."""

    def finished(self) -> bool:
        """Whether the started step is done or has failed; never waits."""

    def finish_step(self) -> dict[str, float]:
        """Waits for the started step and returns its metrics; raises what ended it."""


def wait_for_step(learner: Stepping, on_wait: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Waits for the running step and returns its metrics; raises an interrupt that comes meanwhile.

    `on_wait` is called again and again while it waits.
    """
    while not learner.finished():
        on_wait()
        check_interrupt()
        time.sleep(POLL_S)
    return learner.finish_step()


def finish_within(learner: Stepping, seconds: float) -> dict[str, float] | None:
    """Returns the running step's metrics after an interrupt, or None if it does not end within `seconds`."""
    deadline = time.monotonic() + seconds
    while not learner.finished():
        if time.monotonic() > deadline:
            return None
        main_loop.passed()
        time.sleep(POLL_S)
    return learner.finish_step()
