"""Ctrl-C and SIGTERM: what they wait for, so that the state they leave is that of a whole step.

Python raises KeyboardInterrupt between any two instructions: between the calls that start a step on two ranks, say, or
between a step's end and the note that it ended. Inside :func:`deferred_interrupts` a first signal is only noted, and
:func:`check_interrupt` raises it where the loop waits. A second one raises at once: the last checkpoint stays valid.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Protocol

SETTLE_S = 15.0  # of the 30 s that an interrupt may take
POLL_S = 0.02  # nothing wakes a wait when the learner is done, so it looks often
SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTED = b"\ninterrupt noted: the step's state is kept first; again: ends at once\n"

_noted = False  # a signal that nothing has taken yet


class Interrupted(KeyboardInterrupt):
    """An interrupt taken where the loop waits: the state can be finished and kept."""


@contextlib.contextmanager
def terminated_is_interrupted() -> Iterator[None]:
    """SIGTERM (a job that is stopped, a pod that is evicted) ends a run as Ctrl-C does: with a checkpoint."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """A first SIGINT or SIGTERM inside waits for :func:`check_interrupt`, at the latest for the end of the block."""
    global _noted
    _noted = False

    def note(number: int, frame) -> None:
        global _noted
        if _noted:
            raise KeyboardInterrupt
        _noted = True
        os.write(2, NOTED)  # print could be what the signal fell into

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
        check_interrupt()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def check_interrupt() -> None:
    """Raises :class:`Interrupted` once for a signal that was deferred."""
    global _noted
    if _noted:
        _noted = False
        raise Interrupted


class Stepping(Protocol):
    """Any learner: `learner.group.RankGroup` with steps of its own."""

    def finished(self) -> bool: ...

    def finish_step(self) -> dict[str, float]: ...


def awaited(learner: Stepping) -> dict[str, float]:
    """The running step's metrics, once it is done; an interrupt is taken meanwhile."""
    while not learner.finished():
        check_interrupt()
        time.sleep(POLL_S)
    return learner.finish_step()


def settled(learner: Stepping, seconds: float = SETTLE_S) -> dict[str, float] | None:
    """As :func:`awaited`, after an interrupt; None: it took too long, and the last state stays the last."""
    deadline = time.monotonic() + seconds
    while not learner.finished():
        if time.monotonic() > deadline:
            return None
        time.sleep(POLL_S)
    return learner.finish_step()
