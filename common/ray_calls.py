"""Calls of Ray that have no deadline of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from latent_grpo.common.errors import RayLost, RunError
from latent_grpo.common.seen_time import SeenTime

T = TypeVar("T")
ANSWER_S = 60.0  # longer than a local Ray waits for its head before it ends the process
LOOKED_AT_EVERY_S = 0.5  # so that time in which this process is stopped does not count


def ensure_own_node() -> None:
    """Raises RayLost where the node of Ray that this process belongs to is dead: then nothing can be started by it."""
    own = ray.get_runtime_context().get_node_id()
    nodes = _within(ANSWER_S, ray.nodes, f"Ray's head (the GCS) did not answer within {ANSWER_S:g} s")
    if not any(node["Alive"] for node in nodes if node["NodeID"] == own):
        raise RayLost("Ray's node of this process is dead: its raylet was killed or has crashed")


def alive_nodes() -> int:
    """Returns how many nodes the Ray has that this process is connected to."""
    return sum(1 for node in ray.nodes() if node["Alive"])


def put_within(value: object, seconds: float, key: str) -> ray.ObjectRef[Any]:
    """`ray.put` with a deadline: on a node whose raylet is stopped it would wait forever.

    Raises RayLost, which names `key` as the setting of the deadline, and RunError where store and disk are full.
    """
    why = f"Ray on this node did not take an object within {seconds:g} s ({key}): its raylet is stopped or stuck"
    try:
        return _within(seconds, partial(ray.put, value), why)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise RunError(
            "Ray's object store on this node is full, and so is the disk that it spills to; make room below TMPDIR (on "
            "a cluster: the node's --temp-dir), or raise ray.object_store_bytes (ray start --object-store-memory)"
        ) from error


def _within(seconds: float, call: Callable[[], T], why: str) -> T:
    """Returns what a call returns, and raises what it raises; RayLost with the text `why` if it takes longer."""
    outcome: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:  # raised again below, in the thread that asked
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    clock = SeenTime()
    while thread.is_alive() and clock.seconds < seconds:
        thread.join(min(LOOKED_AT_EVERY_S, seconds))
        clock.look(LOOKED_AT_EVERY_S)
    if errors:
        raise errors[0]
    if not outcome:
        raise RayLost(why)
    return outcome[0]
