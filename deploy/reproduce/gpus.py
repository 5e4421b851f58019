"""The assignment of this machine's GPUs to the units of a suite that run at the same time. Pure.

Each unit starts a Ray of its own, and every Ray hands out its first GPU first: units that saw the same GPUs would all
begin on GPU 0. So each unit sees only its own GPUs (CUDA_VISIBLE_DEVICES).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from latent_grpo.common.config import RunConfig

ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class GpuNeed:
    """The GPUs that a unit needs: a number of whole ones, or a share of a single one."""

    devices: int
    share: float = 1.0


NO_GPU = GpuNeed(0)


def gpu_need(config: RunConfig) -> GpuNeed:
    """Returns what all actors of a run need: their sum rounded up, or more where fractions do not fit into it."""
    rollout, learner = config.rollout, config.learner
    actors = [rollout.resources.num_gpus] * rollout.workers + [learner.resources.num_gpus] * learner.ranks
    whole = 0
    begun: list[float] = []  # used shares of GPUs that fractions share
    for amount in filter(None, actors):
        with_room = [i for i, used in enumerate(begun) if used + amount <= 1 + ROUNDING]
        if amount >= 1:
            whole += math.ceil(amount)
        elif with_room:
            begun[max(with_room, key=begun.__getitem__)] += amount
        else:
            begun.append(amount)
    devices = whole + len(begun)
    return GpuNeed(devices, min(sum(actors), 1.0)) if devices == 1 else GpuNeed(devices)


def place(need: GpuNeed, used: Mapping[str, float]) -> tuple[str, ...] | None:
    """Chooses GPUs, where `used` says how much of each is taken; None if there is no room now.

    Whole GPUs are not shared. A share goes to the fullest GPU that has room, so that others stay whole.
    """
    if need.devices == 1:
        with_room = [name for name, amount in used.items() if amount + need.share <= 1 + ROUNDING]
        return (max(with_room, key=used.__getitem__),) if with_room else None
    free = [name for name, amount in used.items() if not amount]
    return tuple(free[: need.devices]) if len(free) >= need.devices else None


def at_once(need: GpuNeed, gpus: int) -> int:
    """Returns for how many such units :func:`place` finds room on so many GPUs."""
    if need.devices == 1:
        return gpus * math.floor(1 / need.share + ROUNDING)
    return gpus // need.devices


class Devices:
    """The GPUs, by their names in CUDA_VISIBLE_DEVICES, and their holders."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        self._held: dict[Hashable, tuple[tuple[str, ...], float]] = {}

    def take(self, holder: Hashable, need: GpuNeed) -> tuple[str, ...] | None:
        """Assigns GPUs to `holder` until it gives them back; returns None if there is no room now.

        A holder that needs more than exist gets all of them, and its own Ray reports what is missing.
        """
        need = GpuNeed(min(need.devices, len(self._names)), need.share)
        if not need.devices:
            return ()
        used = dict.fromkeys(self._names, 0.0)
        for names, share in self._held.values():
            for name in names:
                used[name] += share
        found = place(need, used)
        if found is not None:
            self._held[holder] = (found, need.share)
        return found

    def give_back(self, holder: Hashable) -> None:
        """Frees the devices of a holder; one that has none is no error."""
        self._held.pop(holder, None)


def visible_gpus(count: int, environment: Mapping[str, str]) -> list[str]:
    """Returns the names of the `count` GPUs that this process sees; a set CUDA_VISIBLE_DEVICES applies to units too."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(count)] if chosen is None else chosen.split(",")[:count]
