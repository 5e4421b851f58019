"""Autoscaling: the number of rollout workers follows the learner's wait and the workers' idle time.

Over a few steps at a time it is estimated how long they would have taken with other numbers of workers. Their work W
is shared, so each of n works W/n: with more workers the learner waits less, by the difference; with fewer it waits
longer, unless the others have idle time that they can use, which they have where rollouts overlap the learner's work
(`max_staleness` above 0). Workers are added while that would save a tenth of the time, and one is taken away where it
would cost less than a fiftieth.
"""

from __future__ import annotations

from dataclasses import dataclass

WORTH = 0.10  # share of the time that an increase must save
HARMLESS = 0.02  # share of the time that a decrease may cost
STEPS, SECONDS = 3, 10.0  # that a decision looks at, at least: workers tell of their work every two seconds


@dataclass(slots=True)
class Load:
    """What steps say about their workers, in seconds: `busy_s` is the work of all of them together."""

    step_s: float = 0.0
    waited_s: float = 0.0  # of the learner, for rollouts
    busy_s: float = 0.0
    steps: int = 0

    def with_workers(self, now: int, then: int, *, overlaps: bool) -> float:
        """Returns how many seconds the steps would have taken with `then` workers in place of `now`."""
        longer = self.busy_s / then - self.busy_s / now
        if longer < 0:
            return self.step_s - min(-longer, self.waited_s)
        if not overlaps:
            return self.step_s + longer
        idle = max(self.step_s - self.busy_s / now, 0.0)
        return self.step_s + max(longer - idle, 0.0)


class Autoscaler:
    """Decides between `least` and `most` workers (`rollout.min_workers`, `rollout.max_workers`)."""

    def __init__(self, least: int, most: int, *, overlaps: bool):
        self.least, self.most, self._overlaps = least, most, overlaps
        self._load = Load()

    def after(self, step_s: float, waited_s: float, busy_s: float, *, serving: int, wanted: int) -> int:
        """Returns the number of workers wanted after a step of these seconds; `wanted` is that before it.

        While other workers serve than are wanted, nothing is decided.
        """
        load = self._load
        load.step_s, load.waited_s = load.step_s + step_s, load.waited_s + waited_s
        load.busy_s, load.steps = load.busy_s + busy_s, load.steps + 1
        if serving != wanted:
            self._load = Load()
            return wanted
        if load.steps < STEPS or load.step_s < SECONDS:
            return wanted
        self._load = Load()
        more = min(wanted + max(wanted // 4, 1), self.most)
        if more > wanted and load.with_workers(wanted, more, overlaps=self._overlaps) <= (1 - WORTH) * load.step_s:
            return more
        fewer = wanted - 1
        if fewer >= self.least and load.with_workers(wanted, fewer, overlaps=self._overlaps) <= (
            (1 + HARMLESS) * load.step_s
        ):
            return fewer
        return min(max(wanted, self.least), self.most)
