"""What an interrupt waits for, so that the state it leaves is that of a whole step."""

from __future__ import annotations

import time
from typing import Protocol

SETTLE_S = 15.0  # of the 30 s that an interrupt may take
POLL_S = 0.1


class Stepping(Protocol):
    """Any learner: `learner.group.RankGroup` with steps of its own."""

    def finished(self) -> bool: ...

    def finish_step(self) -> dict[str, float]: ...


def settled(learner: Stepping, seconds: float = SETTLE_S) -> bool:
    """Waits for the step that is running; False: it took too long, and the last state stays the last."""
    deadline = time.monotonic() + seconds
    while not learner.finished():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    learner.finish_step()
    return True
