"""The clock of deadlines: it runs only while somebody watches.

A driver that was stopped, or was busy with a checkpoint, has not seen what the others did meanwhile. Counting that time
would make it kill processes that are well.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from latent_grpo.common import main_loop

GRACE_S = 1.0  # a wait that was asked for takes a little longer


class SeenTime:
    """Seconds that were spent watching, for deadlines of processes that one loop watches."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic):
        self._monotonic, self._last = monotonic, monotonic()
        self.seconds = 0.0

    def look(self, waited_s: float = 0.0) -> float:
        """Counts the time since the last look, at most `waited_s` and a second; returns :attr:`seconds`.

        `waited_s` is how long the caller has asked to wait since then.
        """
        main_loop.passed()
        now = self._monotonic()
        self.seconds += min(now - self._last, waited_s + GRACE_S)
        self._last = now
        return self.seconds
