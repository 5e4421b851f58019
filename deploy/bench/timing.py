"""Interleaved timing of several ways to do one job, so that a noisy machine disturbs all of them alike.

Times are CPU seconds of this process: for one computing thread they are what the wall clock would show on an idle
machine, and other programs do not count. `wall=True` is for work on a device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each repeat of one way, and the work (tokens, gradings, steps) that a repeat does."""

    seconds: tuple[float, ...]
    work: float

    @property
    def per_second(self) -> float:
        """The median rate."""
        return self.work / float(np.median(self.seconds))

    def ratio_to(self, other: Timing) -> float:
        """Returns how much faster it is than `other`: the median over repeats of the ratio of neighbouring rates."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return float(np.median([(self.work / mine) / (other.work / theirs) for mine, theirs in pairs]))


def interleaved(ways: dict[str, Callable[[], float]], repeats: int, wall: bool = False) -> dict[str, Timing]:
    """Runs every way once to warm up, then `repeats` times in turn. A way does its job and returns the work done."""
    clock = time.perf_counter if wall else time.process_time
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, float] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            began = clock()
            work[name] = way()
            seconds[name].append(clock() - began)
    return {name: Timing(tuple(found), work[name]) for name, found in seconds.items()}
