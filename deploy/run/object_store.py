"""Ray's object store: how large a run needs it, and whether Ray spills from it to the disk.

Published weights and trajectories pass through it. What does not fit is spilled: Ray writes it to the disk and reads it
again at every publication, without a word.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from latent_grpo.common.config import RunConfig
from latent_grpo.deploy.run.background import watching

SHARED_MEMORY = Path("/dev/shm")
LEAST_BYTES = 512 * 2**20  # of a local store, besides the weights
MIB = 2**20
LOOK_EVERY_S = 5.0
ON_A_CLUSTER = "start Ray on each node with a larger --object-store-memory"
ROW_BYTES = 4096  # of a trajectory besides its prompt and its steps: text, answers, names

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Store:
    """The size of an object store, in bytes, and the sentences about it: what it is for, what is wrong with it."""

    size: int
    sentence: str
    warning: str | None = None


def needed_bytes(config: RunConfig, published_bytes: int) -> int:
    """Returns the bytes that the run's weights and trajectories take in the store at most.

    `published_bytes` is the size of one publication, 0 where none is made. The version before is held until the new one
    is complete, and with staleness each worker's queue may hold as many more.
    """
    steps = max(task.max_response_tokens for task in config.tasks) * (12 * config.schema_k + 8)
    row = steps + 4 * max(task.max_prompt_tokens for task in config.tasks) + ROW_BYTES
    rows = 2 * config.samples_per_step * (config.max_staleness + 1)  # as many again are filtered, or late
    return held_versions(config) * published_bytes + row * rows


def held_versions(config: RunConfig) -> int:
    """Returns the number of published versions that may be in the store at once."""
    evaluated = config.evaluation.every > 0 and not config.evaluation.blocking  # kept while the steps go on
    return 2 + config.max_staleness + evaluated


def local_store(config: RunConfig, published_bytes: int, free_bytes: int | None = None) -> Store:
    """Returns the store that a local Ray gets: `ray.object_store_bytes`, or what the run needs.

    `free_bytes` is what this machine's shared memory has (default: measured); the store is never larger, since Ray
    would put it on the disk.
    """
    if free_bytes is None:
        free_bytes = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else LEAST_BYTES
    needed, given = needed_bytes(config, published_bytes), config.ray.object_store_bytes
    wanted = max(needed, held_versions(config) * published_bytes + LEAST_BYTES)
    parts = "trajectories"
    if published_bytes:  # none where no rollout worker listens
        parts = f"{held_versions(config)} versions of the weights of {_mib(published_bytes)} each, and trajectories"
    if given is not None:
        sentence = f"object store: {_mib(given)} (ray.object_store_bytes)"
        if given >= needed:
            return Store(given, sentence)
        return Store(given, sentence, f"{parts} may need {_mib(needed)}: Ray will spill to the disk; raise the key")
    if wanted <= free_bytes:
        return Store(wanted, f"object store: {_mib(wanted)} ({parts})")
    size = max(free_bytes, LEAST_BYTES)
    return Store(
        size,
        f"object store: {_mib(size)} ({parts}, for which it would get {_mib(wanted)})",
        f"{SHARED_MEMORY} has {_mib(free_bytes)}, so Ray will put objects on the disk: give it more, in a container "
        "with --shm-size",
    )


def running_store(config: RunConfig, published_bytes: int, node_bytes: Sequence[int]) -> Store:
    """Returns the largest store of a Ray that runs already; `node_bytes` are those of its nodes.

    The weights lie on the learner's node and on those of the workers, which are usually the larger ones.
    """
    needed, size = needed_bytes(config, published_bytes), max(node_bytes, default=0)
    sentence = f"object store: {_mib(size)} on the largest node; the run needs up to {_mib(needed)}"
    warnings = []
    if size < needed:
        warnings.append(f"Ray will spill objects to the disk; {ON_A_CLUSTER}")
    if config.ray.object_store_bytes is not None:
        warnings.append("ray.object_store_bytes has no effect on a Ray that runs already")
    return Store(size, sentence, "; ".join(warnings) or None)


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"


# --- spilling ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def spill_watch(say: Callable[[str], None], advice: str, every_s: float = LOOK_EVERY_S) -> Iterator[None]:
    """Says once if Ray spills objects while the block runs. Ray must be initialized. `advice` says what to set."""

    def look(ended: threading.Event) -> None:
        before = spilled_bytes()
        while not ended.wait(every_s):
            if (found := spilled_bytes()) > before:
                say(
                    f"[yellow]Ray spills objects to the disk ({_mib(found - before)} so far), since the object store "
                    f"is full: publishing weights waits for the disk; {advice}[/]"
                )
                return

    with watching("the watch over the object store", look):
        yield


def spilled_bytes() -> int:
    """Returns the bytes that all nodes have spilled since they started; a node that does not answer counts as none."""
    import grpc  # type: ignore[import-untyped]  # it has no types
    import ray
    from ray._private.internal_api import node_stats  # Ray says it nowhere else without its dashboard

    total = 0
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        try:
            found = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
        except grpc.RpcError as error:
            log.debug("node %s does not answer: %s", node["NodeManagerAddress"], error)
            continue
        total += found.store_stats.spilled_bytes_total
    return total
