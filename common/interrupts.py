"""Ctrl-C and SIGTERM wait for the end of a step, so that the state they leave is whole.

Python raises KeyboardInterrupt between any two instructions: between the calls that start a step on two ranks, say, or
between a step's end and the note that it ended. Inside :func:`deferred_interrupts` a first signal is only noted, and
:func:`check_interrupt` raises it where a loop waits; publishing weights, saving and writing dumps end first, each
within its own deadline. A second signal raises at once: the last checkpoint stays valid.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

SETTLE_S = 15.0  # of the 30 s that an interrupt may take
POLL_S = 0.02  # nothing wakes a wait when the learner is done, so it looks often
SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTED = b"\ninterrupt noted: the state is kept first; again: ends at once\n"


class Interrupted(KeyboardInterrupt):
    """An interrupt taken where the loop waits: the state can be finished and kept."""


class _Deferral:
    noted = False
    taken = False

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True
        with contextlib.suppress(OSError):  # `| tee`: it may have died of the same Ctrl-C
            os.write(2, NOTED)  # a print could be what the signal fell into

    def take(self) -> None:
        if self.noted and not self.taken:
            self.taken = True
            raise Interrupted


_innermost: _Deferral | None = None


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """A first SIGINT or SIGTERM inside waits for :func:`check_interrupt`, at the latest for the end of the block.

    For the main thread. A signal that is ignored stays so. An error inside wins over a signal that nothing took.
    """
    global _innermost
    outer, deferral = _innermost, _Deferral()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        _innermost = deferral
        for number in before:
            signal.signal(number, deferral.note)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _innermost = outer
    deferral.take()


def check_interrupt() -> None:
    """Raises :class:`Interrupted`, once, for a signal that was deferred."""
    if _innermost is not None:
        _innermost.take()


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM (a job that is stopped, a pod that is evicted) ends a run as Ctrl-C does: with a checkpoint."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


class Stepping(Protocol):
    """Any learner: `learner.group.RankGroup` with steps of its own."""

    def finished(self) -> bool: ...

    def finish_step(self) -> dict[str, float]: ...


def wait_for_step(learner: Stepping) -> dict[str, float]:
    """The running step's metrics, once it is done; an interrupt is taken meanwhile."""
    while not learner.finished():
        check_interrupt()
        time.sleep(POLL_S)
    return learner.finish_step()


def finish_within(learner: Stepping, seconds: float = SETTLE_S) -> dict[str, float] | None:
    """The running step's metrics after an interrupt; None where it did not end within `seconds`."""
    deadline = time.monotonic() + seconds
    while not learner.finished():
        if time.monotonic() > deadline:
            return None
        time.sleep(POLL_S)
    return learner.finish_step()
