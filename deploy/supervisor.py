"""The supervisor of a training run: a thin parent that starts the run's controller again when it dies or stands still.

    latent-grpo train ──► supervisor ──► controller (the same command; Ray's driver)
                              ▲  │
                              │  └ train --resume RUN, once the controller has crashed
                              └── pipe: the run's folder, a sign of life every two seconds, "ended"

A controller that ends by itself, with success, an error or after a signal, says so, and its exit code is the command's.
One that is killed, that Ray ends because its head or raylet is gone, or that gives no sign of life for
`deadlines.driver_s` is started again from the run's last checkpoint, at most `max_recoveries` times within an hour.
The supervisor imports neither torch nor Ray.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from latent_grpo.common.interrupts import LEAVE_S
from latent_grpo.common.seen_time import SeenTime
from latent_grpo.deploy.run import recoveries
from latent_grpo.deploy.run.link import environment
from latent_grpo.deploy.run.recoveries import Recovery

POLL_S = 1.0
DRIVER_S = 120.0  # until the run's own deadlines.driver_s is known
LEFTOVERS_S = 15.0  # for a dead run's local Ray to end by itself


@dataclass(slots=True)
class _Child:
    """A controller's process, and what it has told."""

    process: subprocess.Popen[bytes]
    pipe: int  # what it writes
    alive: int  # it watches the other end; closed with this process
    clock: SeenTime = field(default_factory=SeenTime)
    heard_at: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    torn: bytes = b""

    def listen(self) -> bool:
        """Takes what it has written within `POLL_S`; returns False once it has closed the pipe."""
        ready, _, _ = select.select([self.pipe], [], [], POLL_S)
        now = self.clock.look(POLL_S)  # while this process stands still, too, nothing is heard
        if not ready:
            return self.process.poll() is None  # a process that it has forked may hold the pipe open
        data = os.read(self.pipe, 65536)
        *lines, self.torn = (self.torn + data).split(b"\n")
        for line in lines:
            self.facts |= json.loads(line)
        self.heard_at = now
        return bool(data)

    @property
    def silent_s(self) -> float:
        return self.clock.seconds - self.heard_at


def supervise(arguments: list[str], say: Callable[[str], None]) -> int:
    """Runs `latent-grpo train ARGUMENTS` until it ends by itself, and returns its exit code.

    Raises RunError where it may not recover again.
    """
    recovery, run = None, None
    while True:
        with _started(["train", *arguments], recovery, run) as (child, signalled):
            cause = _watched(child)
        if cause is None:
            return _exit_code(child.process.returncode)
        run = child.facts.get("run", run)
        _clear(child.facts.get("ray"))
        if signalled or run is None:
            say(f"the run's controller {cause}" + ("" if run else " before the run had a folder"))
            return _exit_code(child.process.returncode) or 1
        folder = Path(run)
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lineage = int(json.loads((folder / "run.json").read_text(encoding="utf-8"))["lineage"]) + 1
        cause = f"the run's controller {cause}"
        recovery = recoveries.begin(folder, cause, lineage=lineage, limit=stored.get("max_recoveries", 3))
        say(f"{cause}; it starts again from the last checkpoint of {folder}")
        arguments = ["--resume", run]


def _watched(child: _Child) -> str | None:
    """Waits for the end of a controller; returns None if it ended by itself, else what happened."""
    crashed_at: float | None = None
    while child.listen():
        limit = float(child.facts.get("driver_s", DRIVER_S))
        if "crashed" in child.facts and crashed_at is None:
            crashed_at = child.clock.seconds
        silent = child.silent_s > limit
        if silent or (crashed_at is not None and child.clock.seconds - crashed_at > LEAVE_S):
            child.process.kill()
            child.process.wait()
            stood_still = f"gave no sign of life for {child.silent_s:.0f} s (deadlines.driver_s = {limit:g})"
            return stood_still if silent else str(child.facts["crashed"])
    code = child.process.wait()
    if "crashed" in child.facts:
        return str(child.facts["crashed"])
    if "ended" in child.facts:
        return None
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code} and without a word, as where its Ray is gone"


@contextlib.contextmanager
def _started(arguments: list[str], recovery: Recovery | None, run: str | None) -> Iterator[tuple[_Child, list[int]]]:
    """Starts a controller; signals go to it once, and are listed. Whatever ends the block ends the process."""
    its_read, alive = os.pipe()
    pipe, its_write = os.pipe()
    process = subprocess.Popen(
        [*_command(), *arguments],
        env=os.environ | environment(its_read, its_write, recovery, run),
        pass_fds=(its_read, its_write),
        process_group=0,  # Ctrl-C reaches it through this process alone
    )
    os.close(its_read)
    os.close(its_write)
    child, signalled = _Child(process, pipe, alive), []

    def forward(number: int, frame: FrameType | None) -> None:
        signalled.append(number)
        if process.poll() is None:
            process.send_signal(number)

    def pause(number: int, frame: FrameType | None) -> None:  # Ctrl-Z: the controller stops with this process
        process.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        process.send_signal(signal.SIGCONT)  # after `fg` or `bg`

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, pause)
    try:
        yield child, signalled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(alive)  # a controller that still runs saves its state and ends
        os.close(pipe)


def _command() -> list[str]:
    """Returns how this program was started, up to its arguments: as a script, or with `python -m`."""
    return [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]]


def _clear(folder: str | None) -> None:
    """Ends what a dead run's local Ray has left on this machine, and removes its folder."""
    if folder is None:
        return
    end = time.monotonic() + LEFTOVERS_S
    while (left := _processes_of(folder)) and time.monotonic() < end:
        time.sleep(0.5)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def _processes_of(folder: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(folder in argument for argument in process.cmdline()):
                found.append(process)
    return found


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code
