"""Interruptible steps: after an interrupt the running step ends, the state is saved, and the interrupt is raised.

The loops of RL and of both stages of Latent-SFT use :func:`interruptible` and a :class:`StateKeeper`; the latter count
their steps with :class:`LearnerSteps`.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from latent_grpo.common.config import DeadlineConfig
from latent_grpo.common.errors import RunError
from latent_grpo.common.interrupts import (
    Interrupted,
    Stepping,
    check_interrupt,
    deferred_interrupts,
    finish_within,
    wait_for_step,
)
from latent_grpo.deploy.run.background import BackgroundWork
from latent_grpo.deploy.run.progress import Advance, Reporter, StepShare

Result = TypeVar("Result")
RECENT = 8  # steps whose longest says how long the next one may be
MARGIN = 2.0  # the next step and its state are taken to need at most so many times as long as those seen
UNKNOWN = 0.5  # the share of the time after SIGTERM that a state is taken to need before one was written


@contextlib.contextmanager
def interruptible(finish: Callable[[Interrupted], str], reporter: Reporter) -> Iterator[None]:
    """Runs a loop. An interrupt inside calls `finish`, which saves the state and returns a report, and is raised again.

    A first SIGINT or SIGTERM waits for the loop's next :func:`common.interrupts.check_interrupt`; a second one is
    raised at once, during `finish` too.
    """
    try:
        with deferred_interrupts():
            yield
    except Interrupted as interrupt:
        try:
            said = finish(interrupt)
        except RunError as error:  # what ends a machine may end a rank too
            said = f"[red]interrupted; the running step could not be finished: {error}[/]"
        reporter.say(said)
        raise


class StateKeeper:
    """Writes the states of a loop between two of its steps, and waits for the running step after an interrupt.

    After SIGTERM there is `deadlines.terminate_s` for the step to end and for its state to be written; the step gets
    what the state will not need, by the last one's time. It cannot be given up and saved: its ranks may have made
    updates already. So while steps last so long that the next one may not end in its time, the state before it is
    written first (:meth:`keep_ahead`), and giving the step up loses nothing whole.

    `write(done)` writes the state after `done` steps, or copies it and returns a function that writes the copy. That
    runs in `background`, while the next step goes on; one is written at a time, and `saved` is the last that is whole.
    `record(done, metrics)` is called with the seconds that it took, and those that the steps waited for it.
    """

    def __init__(
        self,
        name: str,
        done: int,
        write: Callable[[int], Callable[[], None] | None],
        record: Callable[[int, dict[str, float]], None],
        deadlines: DeadlineConfig,
        reporter: Reporter,
        background: BackgroundWork | None = None,
    ) -> None:
        self.name, self.saved = name, done
        self._background = background or BackgroundWork()
        self._begun: tuple[int, float, float] | None = None  # state in the background, when it began, seconds waited
        self._write, self._record, self._deadlines, self._reporter = write, record, deadlines, reporter
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._save_s: float | None = None  # of the last state
        self._told = False

    def keep(self, done: int) -> None:
        """Writes the state after `done` steps, or begins to, unless it has been written already.

        Waits for the state before; raises what writing that, or this, raises.
        """
        if done in (self.saved, self._begun[0] if self._begun is not None else None):
            return
        began = time.monotonic()
        self.finish()
        rest = self._write(done)
        self._begun = done, began, time.monotonic() - began
        if rest is None:
            self._whole()
        else:
            self._background.start(rest)

    def look(self) -> None:
        """Notes that the state in the background is whole, if it is; raises what writing it has raised."""
        if self._begun is not None and not self._background.running:
            self.finish()

    def finish(self) -> None:
        """Waits until the state in the background is whole; raises what writing it raises."""
        if self._begun is None:
            return
        begun, self._begun = self._begun, None
        self._background.wait()
        self._begun = begun
        self._whole()

    def _whole(self) -> None:
        if self._begun is not None:
            done, began, waited = self._begun
            seconds = time.monotonic() - began
            self.saved, self._save_s, self._begun = done, seconds, None
            self._record(done, {"seconds": seconds, "waited_seconds": waited})

    def took(self, seconds: float) -> None:
        """Notes the duration of a step of the learner."""
        self._steps.append(seconds)

    def keep_ahead(self, done: int) -> None:
        """Writes the state after `done` steps if the next step may not end in the time that SIGTERM leaves it."""
        if done == self.saved or not self._may_be_given_up():
            return
        self.keep(done)
        if not self._told and self._may_be_given_up():  # with the state's time known
            self._told = True
            limit = self._deadlines.terminate_s
            self._reporter.say(
                f"{self.name}: a step takes up to {max(self._steps):,.0f} s, and SIGTERM leaves {limit:g} s for it and "
                f"its state (deadlines.terminate_s): the state is written after every step, {self._save_s or 0.0:,.1f} "
                "s each. Raise that key if the machine waits longer"
            )

    def _may_be_given_up(self) -> bool:
        return MARGIN * max(self._steps, default=0.0) > self._deadlines.terminate_s - self._for_state()

    def _for_state(self) -> float:
        """Returns the seconds of `deadlines.terminate_s` that are kept for the state after the step."""
        limit = self._deadlines.terminate_s
        return min(limit, UNKNOWN * limit if self._save_s is None else MARGIN * self._save_s)

    def finish_step(self, interrupt: Interrupted, finish: Callable[[float], Result | None]) -> Result | None:
        """Gives the running step the time that the signal leaves, and returns its result, or None if it is given up.

        `finish(seconds)` waits for the step and returns None if it does not end in time.
        """
        limit, key = self._deadlines.after_signal(interrupt.terminated)
        for_state = self._for_state() if interrupt.terminated else 0.0  # after Ctrl-C nothing ends the process
        left = max(interrupt.at + limit - for_state - time.monotonic(), 0.0)
        rest = f", {for_state:,.1f} s of it for the state" if for_state else ""
        self._reporter.say(f"{self.name}: the running step may take {left:,.0f} s more ({key}{rest})")
        result = finish(left)
        if result is None:
            self._reporter.say(f"[yellow]{self.name}: the running step did not end in time ({key}) and is given up[/]")
        return result

    def report(self, done: int) -> str:
        """Says what an interrupt after `done` whole steps leaves on the disk."""
        if done > self.saved:
            lost = f"; not saved: step {self.saved + 1}" + (f" to {done}" if done > self.saved + 1 else "")
        else:
            lost = ""
        kept = f"; the checkpoint of {self.name} step {self.saved} is complete" if self.saved else ""
        return f"interrupted{kept}{lost}"


class StepLearner(Stepping, Protocol):
    """A learner that :class:`LearnerSteps` drives."""

    def start_step(self, *inputs: Any) -> None:
        """Starts a step on the inputs of the learner's kind and returns at once."""


class LearnerSteps:
    """Takes the steps of a learner one at a time, counts and records them, and can save the state between any two.

    `done` is the number of steps taken before, `took` the seconds of the last one. `record(done, metrics)` is called
    after each step.
    """

    def __init__(
        self, learner: StepLearner, done: int, record: Callable[[int, dict[str, float]], None], keeper: StateKeeper
    ) -> None:
        self.done, self.took = done, 0.0
        self._learner, self._record, self._keeper = learner, record, keeper
        self._began: float | None = None  # of the running step
        self._share = StepShare()

    def start(self, *inputs: Any) -> None:
        """Begins a step, unless an interrupt is pending."""
        self._keeper.keep_ahead(self.done)
        check_interrupt()
        self._learner.start_step(*inputs)
        self._began = time.monotonic()

    def finish(self, advance: Advance = lambda completed, note="": None) -> dict[str, float]:
        """Waits for the step that was begun, which `advance` shows, and returns its metrics."""

        def waiting() -> None:
            share, note = self._share.at("learner", None)
            advance(self.done + share, note)

        return self._finished(wait_for_step(self._learner, waiting))

    def keep(self) -> None:
        """Writes the state, unless it has been written already."""
        self._keeper.keep(self.done)

    @contextlib.contextmanager
    def interruptible(self, reporter: Reporter) -> Iterator[None]:
        """Runs a loop over these steps as :func:`interruptible` does."""

        def settle(interrupt: Interrupted) -> str:
            if self._began is not None:
                metrics = self._keeper.finish_step(interrupt, lambda seconds: finish_within(self._learner, seconds))
                if metrics is not None:
                    self._finished(metrics)
            if self._began is None:
                self.keep()
            return self._keeper.report(self.done)

        with interruptible(settle, reporter):
            yield

    def _finished(self, metrics: dict[str, float]) -> dict[str, float]:
        if self._began is not None:
            self.took = time.monotonic() - self._began
            self._keeper.took(self.took)
            self._share.learn(learner=self.took)
        self._began = None
        self.done += 1
        self._record(self.done, metrics)
        return metrics
