"""Which GPUs of this machine each unit of a suite has, where several run side by side.

Each unit starts a Ray of its own, and every Ray hands out its first GPU first: units that all saw the same GPUs would
all begin on GPU 0. So each sees its own only (CUDA_VISIBLE_DEVICES). Pure.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from latent_grpo.common.config import RunConfig

ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class GpuNeed:
    """So many whole GPUs; of a single one only a share."""

    devices: int
    share: float = 1.0


NO_GPU = GpuNeed(0)


def gpu_need(config: RunConfig) -> GpuNeed:
    """What all actors of a run need: their sum rounded up, and more where fractions would not fit into that many."""
    rollout, learner = config.rollout, config.learner
    actors = [rollout.resources.num_gpus] * rollout.workers + [learner.resources.num_gpus] * learner.ranks
    whole = 0
    begun: list[float] = []  # what is used of GPUs that fractions share
    for amount in filter(None, actors):
        checked_tensors = [i for i, used in enumerate(begun) if used + amount <= 1 + ROUNDING]
        if amount >= 1:
            whole += math.ceil(amount)
        elif checked_tensors:
            begun[max(checked_tensors, key=begun.__getitem__)] += amount
        else:
            begun.append(amount)
    devices = whole + len(begun)
    return GpuNeed(devices, min(sum(actors), 1.0)) if devices == 1 else GpuNeed(devices)


def place(need: GpuNeed, used: Mapping[str, float]) -> tuple[str, ...] | None:
    """The GPUs for it, where `used` says how much of each is taken; None: not before one is freed.

    Whole GPUs are shared with nobody. A share goes to the fullest GPU that has room, so that others stay whole.
    """
    if need.devices == 1:
        checked_tensors = [name for name, amount in used.items() if amount + need.share <= 1 + ROUNDING]
        return (max(checked_tensors, key=used.__getitem__),) if checked_tensors else None
    free = [name for name, amount in used.items() if not amount]
    return tuple(free[: need.devices]) if len(free) >= need.devices else None


def at_once(need: GpuNeed, gpus: int) -> int:
    """How many such units :func:`place` finds room for on so many GPUs."""
    if need.devices == 1:
        return gpus * math.floor(1 / need.share + ROUNDING)
    return gpus // need.devices


class Devices:
    """The GPUs (by their names in CUDA_VISIBLE_DEVICES) and who holds which."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        self._held: dict[Hashable, tuple[tuple[str, ...], float]] = {}

    def take(self, holder: Hashable, need: GpuNeed) -> tuple[str, ...] | None:
        """GPUs for `holder`, until it gives them back; None: there is no room now.

        Who needs more than there are gets them all, and is told by its own Ray what is short.
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
        self._held.pop(holder, None)


def visible_gpus(count: int, environment: Mapping[str, str]) -> list[str]:
    """The names of the `count` GPUs that this process sees; a CUDA_VISIBLE_DEVICES that is set holds for units too."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(count)] if chosen is None else chosen.split(",")[:count]
