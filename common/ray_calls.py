"""Calls of Ray that have no deadline of their own."""

from __future__ import annotations

import threading
from typing import Any

import ray

from latent_grpo.common.errors import RayLost
from latent_grpo.common.seen_time import SeenTime

LOOKED_AT_EVERY_S = 0.5  # so that time in which this process is stopped does not count


def ensure_own_node() -> None:
    """Raises RayLost where the node of Ray that this process belongs to is dead: then nothing can be started by it."""
    own = ray.get_runtime_context().get_node_id()
    if not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == own):
        raise RayLost("Ray's node of this process is dead: its raylet was killed or has crashed")


def alive_nodes() -> int:
    """Returns how many nodes the Ray has that this process is connected to."""
    return sum(1 for node in ray.nodes() if node["Alive"])


def put_within(value: object, seconds: float, key: str) -> ray.ObjectRef[Any]:
    """`ray.put` with a deadline: on a node whose raylet is stopped it would wait forever.

    Raises RayLost, which names `key` as the setting of the deadline.
    """
    outcome: list[ray.ObjectRef[Any] | BaseException] = []

    def put() -> None:
        try:
            outcome.append(ray.put(value))
        except BaseException as error:  # raised again below, in the thread that asked
            outcome.append(error)

    thread = threading.Thread(target=put, daemon=True)
    thread.start()
    clock = SeenTime()
    while thread.is_alive() and clock.seconds < seconds:
        thread.join(min(LOOKED_AT_EVERY_S, seconds))
        clock.look(LOOKED_AT_EVERY_S)
    if not outcome:
        raise RayLost(
            f"Ray on this node did not take an object within {seconds:g} s ({key}): its raylet is stopped or stuck"
        )
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
