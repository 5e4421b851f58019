"""Measurements in processes of their own, so that the memory of one is not that of another."""

from __future__ import annotations

import multiprocessing
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS, PAGES = Path("/proc/self/status"), Path("/proc/self/statm")
SAMPLED_EVERY_S = 0.005


def alone(function: Callable[..., Any], *arguments: object) -> Any:
    """Calls a function of a module in a new process on the CPU, which ends with it, and returns its result."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says in each that it has found no GPU
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


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
