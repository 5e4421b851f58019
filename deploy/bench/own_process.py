"""Measurements in processes of their own, so that the memory of one is not that of another."""

from __future__ import annotations

import multiprocessing
import os
import resource
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from latent_grpo.common.errors import RunError

STATUS, PAGES = Path("/proc/self/status"), Path("/proc/self/statm")
SAMPLED_EVERY_S = 0.005


def alone(function: Callable[..., Any], *arguments: object) -> Any:
    """Calls a function of a module in a new process on the CPU, which ends with it, and returns its result.

    Raises what :func:`side_by_side` raises.
    """
    return side_by_side(function, [arguments])[0]


def side_by_side(function: Callable[..., Any], calls: Sequence[tuple[object, ...]]) -> list[Any]:
    """Calls a function once in a new process for each tuple of arguments, all at once, and returns the results.

    The first failure ends the other processes, which may wait for the one that failed, and is raised: RunError where a
    process was killed, else what the function raised.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says in each that it has found no GPU
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    answers: dict[Any, int] = {}  # the pipes of the processes that have not ended
    results: dict[int, Any] = {}
    try:
        for index, arguments in enumerate(calls):
            answer, own_end = context.Pipe(duplex=False)
            processes.append(context.Process(target=_answer, args=(own_end, function, arguments)))
            processes[-1].start()
            own_end.close()  # the process alone holds it now: its end is the pipe's
            answers[answer] = index
        while answers:
            for ready in wait(list(answers)):
                results[answers.pop(ready)] = _received(ready)
    finally:
        for process in processes:
            process.kill()  # a rank may wait for ever for one that failed
            process.join()
    return [results[index] for index in range(len(calls))]


def _answer(answers: Connection, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    try:
        answers.send((function(*arguments), None))
    except Exception as error:  # raised again by the process that waits
        answers.send((None, error))


def _received(answer: Any) -> Any:
    try:
        result, error = answer.recv()
    except EOFError:
        raise RunError("a measured process was killed; the machine may have too little memory for it") from None
    if error is not None:
        raise error
    return result


def peak_mib() -> float:
    """The largest memory that this process has had so far, in MiB."""
    if STATUS.exists():  # Linux; what `getrusage` says there begins with the parent's peak
        (line,) = [line for line in STATUS.read_text("utf-8").splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes, on a Mac


class PrivatePeak:
    """The largest memory that is this process's alone from its beginning on, sampled, in MiB; on Linux.

    Pages of mapped files are no part of it: the kernel drops them where memory is short, and processes share them.
    """

    def __init__(self) -> None:
        self.before = self.most = private_mib()
        threading.Thread(target=self._sample, daemon=True).start()

    @property
    def added(self) -> float:
        return self.most - self.before

    def _sample(self) -> None:
        pause = threading.Event()
        while not pause.wait(SAMPLED_EVERY_S):
            self.most = max(self.most, private_mib())


def private_mib() -> float:
    """The memory that is this process's alone now, in MiB; on Linux."""
    _, resident, shared, *_ = PAGES.read_text("utf-8").split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE") / 2**20
