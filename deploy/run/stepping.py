"""Interruptible steps: after an interrupt the running step ends, the state is saved, and the interrupt is raised.

The loops of RL and of both stages of Latent-SFT use :func:`interruptible`; the latter count their steps with
:class:`LearnerSteps`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from latent_grpo.common.interrupts import (
    Interrupted,
    Stepping,
    check_interrupt,
    deferred_interrupts,
    finish_within,
    wait_for_step,
)
from latent_grpo.deploy.run.progress import Reporter


@contextlib.contextmanager
def interruptible(finish: Callable[[], str], reporter: Reporter) -> Iterator[None]:
    """Runs a loop. An interrupt inside calls `finish`, which saves the state and returns a report, and is raised again.

    A first SIGINT or SIGTERM waits for the loop's next :func:`common.interrupts.check_interrupt`.
    """
    try:
        with deferred_interrupts():
            yield
    except Interrupted:
        reporter.say(finish())
        raise


class StepLearner(Stepping, Protocol):
    """A learner that :class:`LearnerSteps` drives."""

    def start_step(self, *inputs: Any) -> None: ...


class LearnerSteps:
    """Takes the steps of a learner one at a time, counts and records them, and can save the state between any two.

    `done` is the number of steps taken before. `record(done, metrics)` is called after each step; `keep(done)` writes
    the state.
    """

    def __init__(
        self,
        learner: StepLearner,
        done: int,
        record: Callable[[int, dict[str, float]], None],
        keep: Callable[[int], None],
    ) -> None:
        self.done = self.saved = done
        self._learner, self._record, self._keep = learner, record, keep
        self._running = False

    def start(self, *inputs: Any) -> None:
        """Begins a step, unless an interrupt is pending."""
        check_interrupt()
        self._learner.start_step(*inputs)
        self._running = True

    def finish(self) -> dict[str, float]:
        """Waits for the step that was begun and returns its metrics."""
        return self._finished(wait_for_step(self._learner))

    def keep(self) -> None:
        """Writes the state, unless it has been written already."""
        if self.done != self.saved:
            self._keep(self.done)
            self.saved = self.done

    @contextlib.contextmanager
    def interruptible(self, name: str, reporter: Reporter) -> Iterator[None]:
        """Runs a loop over these steps as :func:`interruptible` does; `name` is the loop's name in the report."""

        def settle() -> str:
            if self._running and (metrics := finish_within(self._learner)) is not None:
                self._finished(metrics)
            if not self._running:
                self.keep()
            return f"interrupted; the state of {name} step {self.saved} is complete" if self.saved else "interrupted"

        with interruptible(settle, reporter):
            yield

    def _finished(self, metrics: dict[str, float]) -> dict[str, float]:
        self._running = False
        self.done += 1
        self._record(self.done, metrics)
        return metrics
