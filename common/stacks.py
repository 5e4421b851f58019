"""The stacks of all threads of a process that does not answer, requested from anywhere in the cluster.

Python's fault handler writes them inside the handler of SIGUSR1, so a process answers even while a thread waits in a
collective or in a C library. Only a process that the kernel does not run (stopped, or stuck in a device driver) cannot
answer, and the result says so.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

ANSWER_S = 5.0  # how long processes may take to write their stacks
ASK_S = 30.0  # how long a request to other nodes may take
_kept: list[BinaryIO] = []  # keeps the files open: the fault handler holds only a file's number


@dataclass(frozen=True, slots=True)
class ProcessAddress:
    """A process of the cluster, and the place to which it writes its stacks."""

    node_id: str
    pid: int
    path: str | None  # on its node; None: its own log
    inode: int  # of that file; a later process with the same pid has another


def serve_stacks() -> ProcessAddress:
    """Makes this process (an actor's) write the stacks of its threads whenever it gets SIGUSR1."""
    import ray

    path, inode, file = None, 0, sys.stderr
    if Path("/proc/self/fd").is_dir():  # a file without a name: nothing is left behind, however the process ends
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - as long as the process lives
        _kept.append(file)
        path, inode = f"/proc/{os.getpid()}/fd/{file.fileno()}", os.fstat(file.fileno()).st_ino
    faulthandler.register(signal.SIGUSR1, file, all_threads=True)
    return ProcessAddress(ray.get_runtime_context().get_node_id(), os.getpid(), path, inode)


def ask_for_stacks(processes: Sequence[ProcessAddress], ask_s: float = ASK_S) -> list[str]:
    """Returns the stacks of all threads of each process, or the reason in words why there are none.

    All processes are asked at once; it waits at most `ask_s`, or `ANSWER_S` for processes of this node. Never raises.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        here, by_node = ray.get_runtime_context().get_node_id(), defaultdict(list)
        for index, process in enumerate(processes):
            by_node[process.node_id].append(index)
        asked = {}
        for node_id in by_node.keys() - {here}:
            there = NodeAffinitySchedulingStrategy(node_id, soft=False)
            remote = ray.remote(_request_stacks).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked[node_id] = remote.remote([processes[i] for i in by_node[node_id]])
        found = {here: _request_stacks([processes[i] for i in by_node[here]])} if here in by_node else {}
        end = time.monotonic() + ask_s
        for node_id, reference in asked.items():
            try:
                found[node_id] = ray.get(reference, timeout=max(end - time.monotonic(), 0.0))
            except Exception as error:  # a node that does not answer must not hide the others' stacks
                ray.cancel(reference, force=True)
                found[node_id] = [f"its node could not be asked: {type(error).__name__}: {error}"] * len(
                    by_node[node_id]
                )
        return [found[p.node_id][by_node[p.node_id].index(i)] for i, p in enumerate(processes)]
    except Exception as error:  # a failing request must not hide the error that it is made for
        return [f"its stacks could not be asked for: {type(error).__name__}: {error}"] * len(processes)


def _request_stacks(processes: Sequence[ProcessAddress]) -> list[str]:
    """Asks processes of this node: all are signalled, then all files are watched until they stop growing."""
    known = [_signalled(process) for process in processes]
    texts = [_unasked(process, size) for process, size in zip(processes, known, strict=True)]
    sizes = list(known)
    end = time.monotonic() + ANSWER_S
    while None in texts and time.monotonic() < end:
        time.sleep(0.3)
        for index, (process, size_at_request) in enumerate(zip(processes, known, strict=True)):
            if texts[index] is not None or size_at_request is None or process.path is None:
                continue  # it has answered
            before, size = sizes[index], _size(process.path, process.inode)
            sizes[index] = size
            if size is None:
                texts[index] = "it no longer runs"
            elif size == before and size > size_at_request:  # complete: it has stopped growing
                texts[index] = _written(process.path, size_at_request)
    return [
        f"it did not write its stacks within {ANSWER_S:g} s; the kernel says: {_state(process.pid)}" if t is None else t
        for process, t in zip(processes, texts, strict=True)
    ]


def _signalled(process: ProcessAddress) -> int | None:
    """Signals a process; returns how many bytes it had written before, or None if it no longer runs."""
    size = 0 if process.path is None else _size(process.path, process.inode)
    if size is not None:
        try:
            os.kill(process.pid, signal.SIGUSR1)
        except ProcessLookupError:
            return None
    return size


def _unasked(process: ProcessAddress, known: int | None) -> str | None:
    if known is None:
        return "it no longer runs"
    return "its stacks are in its own log" if process.path is None else None


def _size(path: str, inode: int) -> int | None:
    """Returns the size in bytes of the file of that inode, or None if its process no longer runs."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return found.st_size if found.st_ino == inode else None


def _written(path: str, after: int) -> str:
    with open(path, "rb") as file:
        file.seek(after)
        return file.read().decode(errors="replace").strip()


def _state(pid: int) -> str:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return "it no longer runs"
    return next((line for line in lines if line.startswith("State:")), "nothing").replace("\t", " ")
