"""The link between a supervised run and its supervisor (`deploy.supervisor`): two pipes, named in the environment.

The run tells where its folder is, that it lives, that its main thread stands still, and that it ended by itself. When
the supervisor is gone, the run ends as after SIGTERM: it saves its state, and nothing goes on unseen. Without a
supervisor every function does nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latent_grpo.common import interrupts, main_loop
from latent_grpo.common.seen_time import SeenTime
from latent_grpo.deploy.run.recoveries import Recovery

PIPES = "LATENT_GRPO_SUPERVISOR"  # "READ,WRITE": file descriptors of the run
RECOVERY = "LATENT_GRPO_RECOVERY"  # the recovery that starts the run again, as JSON
BEAT_S = 2.0
SAME_SIGNAL_S = 1.0  # one signal to a whole process group reaches the run twice: itself, and from its supervisor

_write: int | None = None
_recovery: dict[str, Any] | None = None
_limit_s: float | None = None


def supervised() -> bool:
    """Whether this process has a supervisor."""
    return _write is not None or PIPES in os.environ


def connect() -> None:
    """Begins to tell the supervisor that this process lives, and to watch whether the supervisor does.

    Both variables leave the environment, since they mean nothing to the processes that this one starts.
    """
    global _write, _recovery
    read, _write = map(int, os.environ.pop(PIPES).split(","))
    _recovery = json.loads(os.environ.pop(RECOVERY, "null"))
    interrupts.ignore_repeats(SAME_SIGNAL_S)
    for number in (read, _write):
        os.set_inheritable(number, False)  # no process that this one starts may hold the pipes open
    threading.Thread(target=_beat, daemon=True).start()
    threading.Thread(target=_watch, args=(read,), daemon=True).start()


def tell(**facts: Any) -> None:
    """Tells the supervisor facts, such as `run`, the run's folder."""
    if _write is not None:
        with contextlib.suppress(OSError):  # it is gone: `_watch` ends the run
            os.write(_write, (json.dumps(facts) + "\n").encode())


def expect_progress(seconds: float) -> None:
    """From now on a main thread that passes none of its waits for so long stands still, and the supervisor is told."""
    global _limit_s
    _limit_s = seconds


class Standstill:
    """Measures for how long nothing was counted, by a clock that stands still with this process."""

    def __init__(self, clock: SeenTime | None = None):
        self._clock, self._count, self._moved_at = clock or SeenTime(), -1, 0.0

    def look(self, count: int, waited_s: float) -> float:
        """Returns for how many seconds `count` has been the same; `waited_s` is how long was waited since last time."""
        now = self._clock.look(waited_s)
        if count != self._count:
            self._count, self._moved_at = count, now
        return now - self._moved_at


def recovery_here(folder: Path) -> Recovery | None:
    """Returns the recovery that has started this run again, or None."""
    given = _recovery
    return Recovery(**given["recovery"]) if given and Path(given["run"]) == folder.resolve() else None


def recovering() -> bool:
    """Whether the supervisor has started this process in the place of one that it lost."""
    return _recovery is not None


def environment(read: int, write: int, recovery: Recovery | None, run: str | None) -> dict[str, str]:
    """Returns the environment of a supervised run."""
    named = {PIPES: f"{read},{write}"}
    return named if recovery is None else named | {RECOVERY: json.dumps({"run": run, "recovery": asdict(recovery)})}


def _beat() -> None:
    still = Standstill()
    while True:
        seconds = still.look(main_loop.count(), BEAT_S)
        if _limit_s is not None and seconds > _limit_s:
            faulthandler.dump_traceback()  # all threads: the first line of the main one is the cause
            tell(stuck=f"did nothing but one thing for {seconds:.0f} s (deadlines.loop_s = {_limit_s:g}; its stacks)")
            return
        tell(lives=True)
        threading.Event().wait(BEAT_S)


def _watch(read: int) -> None:
    while os.read(read, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
