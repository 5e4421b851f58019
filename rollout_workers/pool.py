"""The rollout pool, the driver's side of the workers: dispatch, weights, health, replacement and scaling.

`poll` is the only place that waits. It returns complete groups and handles everything that can happen to a worker: a
finished weight update, a death, a missed heartbeat. Groups that a lost worker had not delivered are dispatched again to
the others, so losing a worker costs only throughput; the buffer recognises a group that arrives twice.

A replacement (or a joiner) gets the current publication before its first group, so it never samples on old weights.
Every wait has a deadline; a worker that misses one is killed and replaced, and `max_restarts` bounds how often.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from latent_grpo.common.config import ConfigError, DeadlineConfig, RolloutConfig
from latent_grpo.common.errors import RunError
from latent_grpo.common.interrupts import check_interrupt
from latent_grpo.common.stacks import ProcessAddress, ask_for_stacks, serve_stacks
from latent_grpo.common.types import GroupRequest, PolicyVersion
from latent_grpo.common.weights import Publication, WeightManifest
from latent_grpo.rollout_workers.engine import RequestRefused
from latent_grpo.rollout_workers.worker import RolloutWorker, WorkerStatus

logger = logging.getLogger(__name__)

SHOWN = 4  # workers whose stacks are shown at once
INTERRUPT_POLL_S = 0.5  # seconds between checks for an interrupt
STREAM_BACKPRESSURE = 16  # groups a worker may be ahead of the driver: bounds what waits in the object store


class RolloutPoolError(RunError):
    """The pool cannot continue; the message names the stage, the worker and its last event."""


class WorkerActor:
    """A thin Ray actor around :class:`RolloutWorker`; `results` occupies one thread, other methods use another."""

    def __init__(self, factory: Callable[[str], RolloutWorker], name: str):
        self._factory, self._name = factory, name

    def whereabouts(self) -> ProcessAddress:
        """Returns this process's address and makes it answer with its stacks on request."""
        return serve_stacks()

    def start(self) -> None:
        """Makes the worker."""
        self._worker = self._factory(self._name)

    def submit(self, ticket: int, requests: list[GroupRequest]) -> None:
        self._worker.submit(ticket, requests)

    def update_weights(
        self, ticket: int, manifest: WeightManifest, timeout_s: float, *buckets: np.ndarray
    ) -> PolicyVersion:
        return self._worker.update_weights(ticket, manifest, list(buckets), timeout_s)

    def status(self) -> WorkerStatus:
        return self._worker.status()

    def results(self) -> Iterator[pa.RecordBatch]:
        yield from self._worker.results()

    def stop(self) -> None:
        self._worker.stop()


@dataclass(slots=True)
class _Member:
    name: str
    actor: ActorHandle[Any]
    stream: ray.ObjectRefGenerator
    process: ProcessAddress
    tickets: itertools.count[int] = field(default_factory=itertools.count)  # order of the calls to it
    groups: dict[str, GroupRequest] = field(default_factory=dict)  # dispatched, not delivered
    updates: list[ray.ObjectRef[Any]] = field(default_factory=list)
    heartbeat: ray.ObjectRef[Any] | None = None
    heartbeat_sent_at: float = 0.0  # when the pending heartbeat was sent
    progress: int = -1
    progressed_at: float = field(default_factory=time.monotonic)
    last_event: str = "started"
    leaving: bool = False

    @property
    def load(self) -> int:
        return sum(len(r.sample_indices) for r in self.groups.values())


class RolloutPool:
    """A pool of workers made by `factory(name)`, which runs inside the actor. Use it as a context manager."""

    def __init__(
        self,
        factory: Callable[[str], RolloutWorker],
        config: RolloutConfig,
        deadlines: DeadlineConfig,
        *,
        env_vars: dict[str, str] | None = None,
        heartbeat_s: float = 2.0,
    ):
        resources = config.resources
        self._actor_class: Any = ray.remote(WorkerActor).options(  # Ray's own types lose it here
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            resources=resources.custom or None,
            max_concurrency=4,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(resources.threads), **(env_vars or {})}},
        )
        self._factory, self._config, self._deadlines = factory, config, deadlines
        self._heartbeat_s = heartbeat_s
        self._names = (f"worker-{i}" for i in itertools.count())
        self._members: dict[str, _Member] = {}
        self._publication: Publication | None = None
        self._waiting: list[GroupRequest] = []  # groups of lost workers, until another worker can take them
        self.restarts = 0
        self._join(config.workers)

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        return sum(1 for m in self._members.values() if not m.leaving)

    def process_ids(self) -> dict[str, int]:
        """The process id of each worker on its node, by the worker's name, for monitoring."""
        return {name: member.process.pid for name, member in self._members.items()}

    @property
    def outstanding(self) -> int:
        """The number of groups dispatched and not delivered."""
        return len(self._waiting) + sum(len(m.groups) for m in self._members.values())

    # --- what the controller calls -------------------------------------------------------------------------------

    def publish(self, publication: Publication) -> None:
        """Sends weights to every worker, behind the groups that it already has; returns at once.

        `poll` handles the outcome.
        """
        self._publication = publication
        for member in self._members.values():
            self._send_weights(member)

    def submit(self, requests: list[GroupRequest]) -> None:
        """Spreads groups over the workers, each to the one with the fewest samples left."""
        shares: dict[str, list[GroupRequest]] = {}
        active = [m for m in self._members.values() if not m.leaving]
        if not active:
            self._waiting.extend(requests)
            return
        for request in requests:
            member = min(active, key=lambda m: m.load)
            if not member.groups:
                member.progressed_at = time.monotonic()  # its time to show progress begins now
            member.groups[request.group_uid] = request
            shares.setdefault(member.name, []).append(request)
        for name, share in shares.items():
            member = self._members[name]
            member.actor.submit.remote(next(member.tickets), share)

    def resize(self, workers: int) -> None:
        """Scales to `workers`. New workers start with the current weights; leaving workers finish their groups."""
        if workers < 1:
            raise RolloutPoolError(f"the pool needs at least one worker, got {workers}")
        active = [m for m in self._members.values() if not m.leaving]
        for member in sorted(active, key=lambda m: m.load)[: max(0, len(active) - workers)]:
            member.leaving = True
        self._release_leavers()
        self._join(workers - len(active))

    def poll(self, timeout_s: float) -> list[pa.RecordBatch]:
        """Returns complete groups that have arrived; waits at most `timeout_s` for the first.

        Raises :class:`RolloutPoolError` when more workers were lost than `rollout.max_restarts` allows, or when new
        weights are refused.
        """
        by_ref: dict[Any, _Member] = {}  # of references and streams
        for member in self._members.values():
            by_ref[member.stream] = member
            by_ref.update((r, member) for r in (*member.updates, member.heartbeat) if r is not None)
        ready, _ = ray.wait(list(by_ref), num_returns=1, timeout=timeout_s, fetch_local=False)
        if ready:  # also take whatever else has arrived by now
            ready, _ = ray.wait(list(by_ref), num_returns=len(by_ref), timeout=0, fetch_local=False)
        arrived: list[pa.RecordBatch] = []
        for ref in ready:
            member = by_ref[ref]
            if member.name not in self._members:
                continue  # lost while handling an earlier reference
            try:
                self._receive(member, ref, arrived)
            except RayError as error:
                if isinstance(cause := getattr(error, "cause", None), RequestRefused):
                    raise RolloutPoolError(f"rollout {member.name} refused its work: {cause}") from error
                with self._deadlines_paused():
                    self._lose(member, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
            except StopIteration:
                with self._deadlines_paused():
                    self._lose(member, "its stream of results ended")
        self._watch()
        self._release_leavers()
        if self._waiting:
            lost, self._waiting = self._waiting, []
            self.submit(lost)
        return arrived

    def close(self) -> None:
        """Stops every worker and frees its resources. Idempotent."""
        for member in self._members.values():
            member.actor.stop.remote()
        for member in self._members.values():
            ray.kill(member.actor)
        self._members.clear()

    # --- what happens to workers ---------------------------------------------------------------------------------

    def _receive(self, member: _Member, ref: Any, arrived: list[pa.RecordBatch]) -> None:
        timeout = self._deadlines.weights_s
        if ref is member.stream:
            batch = ray.get(next(member.stream), timeout=timeout)
            member.groups.pop(batch.column("group_uid")[0].as_py(), None)
            arrived.append(batch)
        elif ref in member.updates:
            member.updates.remove(ref)
            ray.get(ref, timeout=timeout)
        elif member.heartbeat is not None and ref is member.heartbeat:
            status: WorkerStatus = ray.get(ref, timeout=timeout)
            member.heartbeat, member.last_event = None, status.last_event
            idle = not member.groups and not member.updates
            if status.progress != member.progress or idle:
                member.progress, member.progressed_at = status.progress, time.monotonic()

    def _watch(self) -> None:
        """Sends heartbeats, and gives up workers that do not answer, or that have work and make no progress."""
        now, limit = time.monotonic(), self._deadlines.rollout_s
        frozen: dict[str, float] = {}
        for member in self._members.values():
            if member.heartbeat is None and now - member.heartbeat_sent_at >= self._heartbeat_s:
                member.heartbeat, member.heartbeat_sent_at = member.actor.status.remote(), now
            silent = now - member.heartbeat_sent_at if member.heartbeat is not None else 0.0
            stuck = now - member.progressed_at if member.groups or member.updates else 0.0
            if max(silent, stuck) > limit:
                frozen[member.name] = max(silent, stuck)
        if frozen:
            with self._deadlines_paused():
                self._show_stacks({name: self._members[name].process for name in frozen})
                for name, seconds in frozen.items():
                    why = f"no progress for {seconds:.0f} s (deadlines.rollout_s = {limit:g})"
                    self._lose(self._members[name], why)

    @contextlib.contextmanager
    def _deadlines_paused(self) -> Iterator[None]:
        """Excludes from the deadlines the time while a replacement starts, when no other worker is polled."""
        began, others = time.monotonic(), list(self._members.values())
        yield
        paused = time.monotonic() - began
        for member in others:
            member.heartbeat_sent_at += paused
            member.progressed_at += paused

    def _show_stacks(self, processes: dict[str, ProcessAddress]) -> None:
        shown = list(processes)[:SHOWN]
        for name, stacks in zip(shown, ask_for_stacks([processes[name] for name in shown]), strict=True):
            logger.warning("rollout %s makes no progress: %s", name, stacks)

    def _lose(self, member: _Member, why: str) -> None:
        """Gives up a worker, keeps its groups for the others and starts a replacement."""
        logger.warning(
            "rollout %s lost (%s); last event: %s; %d group(s) go to other workers",
            member.name, why, member.last_event, len(member.groups),
        )  # fmt: skip
        del self._members[member.name]
        self._waiting.extend(member.groups.values())
        ray.kill(member.actor)
        self.restarts += 1
        if self.restarts > self._config.max_restarts:
            raise RolloutPoolError(
                f"rollout {member.name} was lost ({why}; last event: {member.last_event}). The run has lost "
                f"{self.restarts} worker(s), and rollout.max_restarts allows {self._config.max_restarts}; read the "
                "worker's log"
            )
        if not member.leaving:
            self._join(1)

    def _join(self, count: int) -> None:
        """Starts workers, waits until they answer, and gives them the current weights."""
        starting = {}
        for _ in range(count):
            name = next(self._names)
            starting[name] = self._actor_class.remote(self._factory, name)
        end, processes = time.monotonic() + self._deadlines.start_s, {}
        try:
            asked = [actor.whereabouts.remote() for actor in starting.values()]
            processes = dict(zip(starting, _answers(asked, end), strict=True))
            started = [actor.start.remote() for actor in starting.values()]
            _answers(started, end)
        except RayError as error:
            if processes and isinstance(error, GetTimeoutError):
                done, _ = ray.wait(started, num_returns=len(started), timeout=0)
                pairs = zip(processes, started, strict=True)
                self._show_stacks({name: processes[name] for name, ref in pairs if ref not in done})
            for actor in starting.values():
                ray.kill(actor)
            if isinstance(cause := getattr(error, "cause", None), ConfigError):  # for example an unusable model
                raise ConfigError(f"rollout worker: {cause}") from error
            resources = self._config.resources
            raise RolloutPoolError(
                f"rollout worker(s) {', '.join(starting)} did not start within {self._deadlines.start_s:g} s "
                f"(deadlines.start_s); each needs {resources.num_cpus:g} CPU and {resources.num_gpus:g} GPU, free in "
                f"the cluster: {_free()}. {type(error).__name__}: {error}"
            ) from error
        for name, actor in starting.items():
            stream = actor.results.options(
                num_returns="streaming", _generator_backpressure_num_objects=STREAM_BACKPRESSURE
            ).remote()
            member = self._members[name] = _Member(name, actor, stream, processes[name])
            self._send_weights(member)

    def _send_weights(self, member: _Member) -> None:
        if self._publication is not None:
            manifest, buckets = self._publication.manifest, self._publication.buckets
            member.updates.append(
                member.actor.update_weights.remote(next(member.tickets), manifest, self._deadlines.weights_s, *buckets)
            )

    def _release_leavers(self) -> None:
        for member in [m for m in self._members.values() if m.leaving and not m.groups]:
            del self._members[member.name]
            ray.kill(member.actor)


def _answers(refs: list[ray.ObjectRef[Any]], end: float) -> list[Any]:
    """`ray.get` until `end`, or until an interrupt: a start may take minutes."""
    while True:
        left = max(end - time.monotonic(), 0.0)
        try:
            return ray.get(refs, timeout=min(left, INTERRUPT_POLL_S))
        except GetTimeoutError:
            if left <= INTERRUPT_POLL_S:
                raise
            check_interrupt()


def _free() -> str:
    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU"
