"""Measurements in processes of their own, so that the memory of one is not that of another."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


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
