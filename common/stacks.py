"""Where a process that does not answer stands: the stacks of all its threads, asked for from anywhere in the cluster.

Python's fault handler writes them inside the handler of SIGUSR1, so a thread that waits in a collective or in a C
library does not keep a process from answering; only one that the kernel does not run (stopped, or stuck in a device
driver) cannot, and that is said instead.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

ANSWER_S = 5.0  # how long a process may take to write its stacks
ASK_S = 30.0  # how long asking on another node may take
_kept: list[BinaryIO] = []  # the fault handler holds a file's number only


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """A process of the cluster, and where it writes its stacks."""

    node_id: str
    pid: int
    path: str | None  # on its node; None: its own log


def answer_with_stacks() -> Whereabouts:
    """From now on this process (an actor's) writes the stacks of its threads when it gets SIGUSR1."""
    import ray

    path, file = None, sys.stderr
    if Path("/proc/self/fd").is_dir():  # a file without a name: nothing is left behind, however the process ends
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - as long as the process lives
        _kept.append(file)
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
    faulthandler.register(signal.SIGUSR1, file, all_threads=True)
    return Whereabouts(ray.get_runtime_context().get_node_id(), os.getpid(), path)


def stacks_of(process: Whereabouts) -> str:
    """The stacks of all threads of `process`, or in words why there are none. Waits at most `ASK_S`; never raises."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        if process.node_id == ray.get_runtime_context().get_node_id():
            return _ask(process)
        there = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
        asked = ray.remote(_ask).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(process)
        return ray.get(asked, timeout=ASK_S)
    except Exception as error:  # whatever keeps us from asking must not hide what we ask for
        return f"its stacks could not be asked for: {type(error).__name__}: {error}"


def _ask(process: Whereabouts) -> str:
    """On the node of `process`."""
    try:
        known = 0 if process.path is None else os.stat(process.path).st_size
        os.kill(process.pid, signal.SIGUSR1)
    except (ProcessLookupError, FileNotFoundError):
        return "it no longer runs"
    if process.path is None:
        return "its stacks are in its own log"
    end, size = time.monotonic() + ANSWER_S, known
    while time.monotonic() < end:
        time.sleep(0.2)
        before, size = size, os.stat(process.path).st_size
        if size == before > known:  # complete: it has stopped growing
            with open(process.path, "rb") as file:
                file.seek(known)
                return file.read().decode(errors="replace").strip()
    return f"it did not write its stacks within {ANSWER_S:g} s; the kernel says: {_state(process.pid)}"


def _state(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.startswith("State:")), "nothing").replace("\t", " ")
