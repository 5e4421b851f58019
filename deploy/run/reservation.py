"""Room in the cluster for what a run cannot do without: all learner ranks and `rollout.min_workers` workers.

It is one placement group of Ray, so that a run gets all of it or waits: of two jobs that fit only one after the other,
neither holds a half that the other needs. An autoscaling cluster sees what is missing and grows. Workers beyond
`rollout.min_workers` take what room there is (`rollout_workers.pool`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from latent_grpo.common.config import ActorResources, ConfigError, RunConfig
from latent_grpo.common.interrupts import check_interrupt
from latent_grpo.common.ray_calls import ensure_own_node
from latent_grpo.common.seen_time import SeenTime

Services = Literal["both", "rollout", "learner"]
POLL_S = 0.5
SAY_AFTER_S, SAY_EVERY_S = 3.0, 60.0


@dataclass(frozen=True, slots=True)
class Reservation:
    """Ray scheduling strategies of the reserved places; empty: actors take any place.

    `await_room` waits until all places are there, also again after a node with one of them was lost.
    """

    ranks: tuple[Any, ...] = ()
    workers: tuple[Any, ...] = ()
    await_room: Callable[[], None] = lambda: None


def amounts(resources: ActorResources) -> dict[str, float]:
    """Returns what Ray reserves for an actor, by the names of its resources."""
    given = {"CPU": resources.num_cpus, "GPU": resources.num_gpus, **resources.custom}
    return {name: amount for name, amount in given.items() if amount > 0}


def counts(config: RunConfig, services: Services) -> tuple[int, int]:
    """Returns the numbers of ranks and of workers without which the run cannot begin."""
    ranks = config.learner.ranks if services != "rollout" else 0
    workers = min(config.rollout.min_workers, config.rollout.workers) if services != "learner" else 0
    return ranks, workers


@contextlib.contextmanager
def reserved(config: RunConfig, services: Services, say: Callable[[str], None]) -> Iterator[Reservation]:
    """Waits for the room, and gives it back with the end of the block.

    While it waits it says what is missing and for how long. Raises ConfigError after `deadlines.place_s`.
    """
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ranks, workers = counts(config, services)
    needs = [amounts(config.learner.resources)] * ranks + [amounts(config.rollout.resources)] * workers
    bundles = [need for need in needs if need]  # Ray knows none of nothing: who needs nothing always has a place
    if not bundles:
        yield Reservation()
        return
    group = placement_group(bundles, strategy="PACK")
    who = f"{ranks} learner rank(s) and {workers} rollout worker(s)"
    await_room = partial(_await, group, needs, who, config.deadlines.place_s, say)
    try:
        await_room()
        numbers = iter(range(len(bundles)))
        places = [
            PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=next(numbers)) if need else "DEFAULT"
            for need in needs
        ]
        yield Reservation(tuple(places[:ranks]), tuple(places[ranks:]), await_room)
    finally:
        remove_placement_group(group)


def _await(group: Any, needs: list[dict[str, float]], who: str, limit_s: float, say: Callable[[str], None]) -> None:
    from ray.util.placement_group import placement_group_table

    clock, said_at = SeenTime(), SAY_AFTER_S - SAY_EVERY_S
    # its state, and not `group.wait`: for a group that fits nowhere that returns at once, and each call stays in GCS
    while placement_group_table(group)["state"] != "CREATED":
        time.sleep(POLL_S)
        ensure_own_node()
        waited = clock.look(POLL_S)
        if waited > limit_s:
            raise ConfigError(
                f"the cluster had no room within {waited:.0f} s (deadlines.place_s = {limit_s:g}): {who} need "
                f"{_missing(needs)}. Add nodes, wait for other jobs to end, or lower learner.ranks, "
                "rollout.min_workers or the resources of one of them"
            )
        if waited - said_at >= SAY_EVERY_S:
            said_at = waited
            say(
                f"[yellow]waiting for room in the cluster: {who} need {_missing(needs)}; {waited:.0f} s so far, at "
                f"most {limit_s:g} s (deadlines.place_s)[/]"
            )
        check_interrupt()


def _missing(needs: list[dict[str, float]]) -> str:
    import ray

    free, there = ray.available_resources(), ray.cluster_resources()
    names = {name: sum(need.get(name, 0.0) for need in needs) for need in needs for name in need}
    return " and ".join(
        f"{amount:g} {name} ({free.get(name, 0):g} free of {there.get(name, 0):g})" for name, amount in names.items()
    )
