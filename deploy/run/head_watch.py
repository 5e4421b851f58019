"""Whether Ray's head (its GCS) still answers.

Without it a run trains on, but it can neither replace a worker nor recover a rank nor end: it would wait in calls of
Ray that have no deadline. A head that has died ends the run by itself; one that is stopped (SIGSTOP) or hangs does not.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from latent_grpo.common.seen_time import SeenTime
from latent_grpo.deploy.run import link
from latent_grpo.deploy.run.background import watching
from latent_grpo.deploy.run.machine import head_answers

LOOK_EVERY_S, ANSWER_S = 5.0, 2.0
MISSES = 3  # answers in a row that it owes at least: a busy machine is late with one


@contextlib.contextmanager
def head_watch(
    address: str,
    limit_s: float,
    say: Callable[[str], None],
    answers: Callable[[str, float], bool] = head_answers,
    every_s: float = LOOK_EVERY_S,
    clock: SeenTime | None = None,
) -> Iterator[None]:
    """Says, and tells the supervisor, once the head at HOST:PORT has not answered for `limit_s` (`deadlines.driver_s`).

    Time in which this process itself is stopped does not count. Without a supervisor the run goes on.
    """
    seen = clock or SeenTime()

    def look(ended: threading.Event) -> None:
        heard_at, missed = 0.0, 0
        while not ended.wait(every_s):
            answered = answers(address, ANSWER_S)
            now = seen.look(every_s + ANSWER_S)
            if answered:
                heard_at, missed = now, 0
                continue
            missed += 1
            if missed >= MISSES and now - heard_at >= limit_s and not ended.is_set():
                what = f"has not answered for {now - heard_at:.0f} s (deadlines.driver_s = {limit_s:g})"
                say(f"[red]Ray's head (the GCS at {address}) {what}[/]")
                link.tell(stuck=f"has lost its Ray: the head (the GCS) {what}")
                return

    with watching("the watch over Ray's head", look):
        yield
