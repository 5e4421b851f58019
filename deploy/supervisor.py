"""The supervisor of a training run: a thin parent that starts the run's controller again when it dies or stands still.

    latent-grpo train ──► supervisor ──► controller (the same command; Ray's driver)
                              ▲  │
                              │  └ train --resume RUN, once the controller has crashed
                              └── pipe: the run's folder, a sign of life every two seconds, "stuck", "ended"

A controller that ends by itself, with success, an error or after a signal, says so, and its exit code is the command's.
One that is killed, that Ray ends because its head or raylet is gone, that gives no sign of life for
`deadlines.driver_s`, or whose main thread stands still for `deadlines.loop_s`, is started again from the run's last
checkpoint, at most `max_recoveries` times within an hour.
The supervisor imports neither torch nor Ray.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from latent_grpo.common.errors import RunError
from latent_grpo.common.interrupts import LEAVE_S
from latent_grpo.common.seen_time import SeenTime
from latent_grpo.deploy.run import recoveries
from latent_grpo.deploy.run.leftovers import clear
from latent_grpo.deploy.run.link import environment
from latent_grpo.deploy.run.recoveries import Recovery
from latent_grpo.deploy.run.stored import IDENTITY, StoredError, stored_object

POLL_S = 1.0
DRIVER_S = 120.0  # until the run's own deadlines.driver_s is known


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


class _Signals:
    """Signals to this command: each goes to the controller that runs, once; after one nothing is started again."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number, handler in ((signal.SIGINT, self._forward), (signal.SIGTERM, self._forward)):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as of a command in the background of a script
                self._before[number] = signal.signal(number, handler)
        self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._pause)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _send(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        self._send(number)

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: the controller stops with this process, and goes on with it after `fg` or `bg`."""
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)


def supervise(arguments: list[str], say: Callable[[str], None]) -> int:
    """Runs `latent-grpo train ARGUMENTS` until it ends by itself, and returns its exit code.

    Raises RunError where it may not recover again.
    """
    recovery, run = None, None
    with _Signals() as signals:
        while True:
            with _started(["train", *arguments], recovery, run) as child:
                signals.process = child.process
                if signals.received:  # while it was being started
                    child.process.send_signal(signals.received[-1])
                cause = _watched(child)
                signals.process = None
            if (ray := child.facts.get("ray")) is not None:
                clear(ray)
            if cause is None:
                return int(child.facts["ended"])
            run = child.facts.get("run", run)
            if signals.received or run is None:
                say(f"the run's controller {cause}" + ("" if run else " before the run had a folder"))
                return 128 + signals.received[0] if signals.received else _exit_code(child.process.returncode) or 1
            recovery = _recovery(Path(run), f"the run's controller {cause}")
            say(f"{recovery.cause}; it starts again from the last checkpoint of {run}")
            if signals.received:
                return 128 + signals.received[0]
            arguments = ["--resume", run]


def _recovery(folder: Path, cause: str) -> Recovery:
    try:
        stored, lineage = stored_object(folder / "config.json"), stored_object(folder / IDENTITY)["lineage"] + 1
    except StoredError as error:
        raise RunError(f"{cause}, and {error}") from error
    due, limit = stored.get("warm_start") is not None, stored.get("max_recoveries", 3)
    kind = "sft" if due and not (folder / "base" / "config.json").is_file() else "train"
    return recoveries.begin(folder, cause, lineage=lineage, limit=limit, kind=kind)


def _watched(child: _Child) -> str | None:
    """Waits for the end of a controller; returns None if it ended by itself, else what happened."""
    told_at: float | None = None  # that it leaves
    while child.listen():
        limit = float(child.facts.get("driver_s", DRIVER_S))
        told = child.facts.keys() & {"ended", "crashed"}
        if told and told_at is None:
            told_at = child.clock.seconds
        late = told_at is not None and child.clock.seconds - told_at > LEAVE_S
        silent = told_at is None and child.silent_s > limit
        stuck = told_at is None and "stuck" in child.facts
        if silent or stuck or late:  # Python and Ray may need for ever to leave
            child.process.kill()
            child.process.wait()
        if stuck:
            return str(child.facts["stuck"])
        if silent:
            return f"gave no sign of life for {child.silent_s:.0f} s (deadlines.driver_s = {limit:g})"
    code = child.process.wait()
    if "crashed" in child.facts:
        return str(child.facts["crashed"])
    if "ended" in child.facts:
        return None
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code} and without a word, as where its Ray is gone"


@contextlib.contextmanager
def _started(arguments: list[str], recovery: Recovery | None, run: str | None) -> Iterator[_Child]:
    """Starts a controller. It is told when the block ends, and then saves its state and ends, if it still runs."""
    its_read, alive = os.pipe()
    pipe, its_write = os.pipe()
    process = subprocess.Popen(
        [*_command(), *arguments],
        env=os.environ | environment(its_read, its_write, recovery, run),
        stdin=subprocess.DEVNULL,  # in a process group of its own it could not read from the terminal
        pass_fds=(its_read, its_write),
        process_group=0,  # Ctrl-C reaches it through this process alone
    )
    os.close(its_read)
    os.close(its_write)
    try:
        yield _Child(process, pipe, alive)
    finally:
        os.close(alive)
        os.close(pipe)


def _command() -> list[str]:
    """Returns how this program was started, up to its arguments: as a script, or with `python -m`."""
    return [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]]


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code
