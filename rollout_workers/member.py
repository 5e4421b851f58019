"""A worker as the pool sees it: its actor, and what is known of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle

from latent_grpo.common.stacks import ProcessAddress, serve_stacks
from latent_grpo.common.transport import WeightReceiver
from latent_grpo.common.types import GroupRequest
from latent_grpo.common.weights import Publication, WeightManifest
from latent_grpo.rollout_workers.worker import RolloutWorker, WorkerStatus

STREAM_BACKPRESSURE = 16  # batches a worker may be ahead of the driver: bounds what waits in the object store


class WorkerActor:
    """A thin Ray actor around :class:`RolloutWorker`; `results` occupies one thread, no other method waits."""

    def __init__(self, factory: Callable[[str], RolloutWorker], name: str):
        self._factory, self._name = factory, name
        self._receiver = WeightReceiver()

    def whereabouts(self) -> ProcessAddress:
        """Returns this process's address and makes it answer with its stacks on request."""
        return serve_stacks()

    def start(self) -> None:
        """Makes the worker."""
        try:
            self._worker = self._factory(self._name)
        except SystemExit as error:  # of a package that ends its process; Ray would take it for a crash
            raise RuntimeError(f"something that it uses ended the process: exit code {error.code!r}") from error

    def submit(self, ticket: int, requests: list[GroupRequest]) -> None:
        """Queues groups, behind everything with a lower ticket."""
        self._worker.submit(ticket, requests)

    def update_weights(self, ticket: int, manifest: WeightManifest, handles: tuple[Any, ...]) -> None:
        """Fetches weights, which may take its time, and queues them."""
        self._worker.update_weights(ticket, manifest, self._receiver.receive(manifest, handles))

    def discard(self, ticket: int) -> None:
        """Forgets the groups that came before; an empty batch in the stream answers."""
        self._worker.discard(ticket)

    def status(self) -> WorkerStatus:
        """Returns the heartbeat."""
        return self._worker.status()

    def results(self) -> Iterator[pa.RecordBatch]:
        """Yields record batches of complete groups, until it is stopped."""
        yield from self._worker.results()

    def stop(self) -> None:
        """Ends the stream of results."""
        self._worker.stop()


@dataclass(slots=True)
class Starting:
    """A worker that has no place yet, or has one and is making its engine.

    It makes its engine as soon as it has a place, also while nobody looks. `place` is its number among the reserved
    places, None if it has none of them.
    """

    name: str
    actor: ActorHandle[Any]
    place: int | None
    answer: ray.ObjectRef[Any] = field(init=False)  # of the call that it has to answer next
    made: ray.ObjectRef[Any] = field(init=False)  # of the call that makes its engine
    process: ProcessAddress | None = None  # once it has a place
    placed_at: float = 0.0  # by the pool's clock

    def __post_init__(self) -> None:
        self.answer = self.actor.whereabouts.remote()
        self.made = self.actor.start.remote()


@dataclass(frozen=True, slots=True)
class Fetch:
    """A call that gives a worker new weights: it is over once they have reached it."""

    ref: ray.ObjectRef[Any]
    ticket: int
    sent_at: float  # by the pool's clock
    publication: Publication  # which lives until the worker has it


@dataclass(slots=True)
class Member:
    """A worker that serves. Times are those of the pool's clock."""

    name: str
    actor: ActorHandle[Any]
    process: ProcessAddress
    place: int | None
    progressed_at: float
    stream: ray.ObjectRefGenerator = field(init=False)
    groups: dict[str, GroupRequest] = field(default_factory=dict)  # dispatched, not delivered
    fetching: list[Fetch] = field(default_factory=list)  # weights on their way
    discards: int = 0  # answers to `discard` that have not come: what comes before them is not wanted
    heartbeat: ray.ObjectRef[Any] | None = None
    heartbeat_sent_at: float = 0.0
    status: WorkerStatus | None = None  # the last one
    version: int | None = None  # that it will have once it has done all that was sent to it
    leaving: bool = False
    _tickets: Iterator[int] = field(default_factory=itertools.count)  # order of the calls to it

    def __post_init__(self) -> None:
        self.stream = self.actor.results.options(
            num_returns="streaming", _generator_backpressure_num_objects=STREAM_BACKPRESSURE
        ).remote()

    @property
    def load(self) -> int:
        """The number of samples that it has to make."""
        return sum(len(request.sample_indices) for request in self.groups.values())

    @property
    def busy(self) -> bool:
        """Whether it has work, so that it must make progress."""
        held = self.status.version if self.status is not None else None
        updated = self.version is None or (held is not None and held.version == self.version)
        return bool(self.groups or self.discards) or not updated

    @property
    def last_event(self) -> str:
        """What the worker did last, as its heartbeat says."""
        return self.status.last_event if self.status is not None else "started"

    def submit(self, requests: list[GroupRequest], now: float) -> None:
        """Sends groups to the worker; `now` is the pool's clock, in seconds."""
        if not self.busy:
            self.progressed_at = now  # its time to show progress begins now
        self.groups |= {request.group_uid: request for request in requests}
        self.actor.submit.remote(next(self._tickets), requests)

    def send(self, publication: Publication, now: float) -> None:
        """Sends weights, behind the groups that it already has."""
        if not self.busy:
            self.progressed_at = now
        manifest, ticket = publication.manifest, next(self._tickets)
        ref: ray.ObjectRef[Any] = self.actor.update_weights.remote(ticket, manifest, publication.buckets)
        self.fetching.append(Fetch(ref, ticket, now, publication))
        self.version = manifest.version.version

    def skip(self, ticket: int) -> None:
        """Takes the place of a call that never reached it, so that later ones do not wait for that."""
        self.actor.submit.remote(ticket, [])

    def discard(self, now: float) -> None:
        """Makes it forget its groups."""
        if not self.busy:
            self.progressed_at = now
        self.groups.clear()
        self.discards += 1
        self.actor.discard.remote(next(self._tickets))

    def heard(self, status: WorkerStatus, now: float) -> None:
        """Takes the answer to a heartbeat."""
        moved = self.status is None or status.progress != self.status.progress
        self.heartbeat, self.status = None, status
        if moved or not self.busy:
            self.progressed_at = now

    def overdue(self, now: float, rollout_s: float, weights_s: float) -> str | None:
        """Returns why it is to be given up, or None."""
        if self.heartbeat is not None and (silent := now - self.heartbeat_sent_at) > rollout_s:
            return f"no answer for {silent:.0f} s (deadlines.rollout_s = {rollout_s:g})"
        if self.fetching and (late := now - self.fetching[0].sent_at) > weights_s:
            return f"new weights did not reach it within {late:.0f} s (deadlines.weights_s = {weights_s:g})"
        loading = self.status is not None and self.status.loading
        limit, key = (weights_s, "weights_s") if loading else (rollout_s, "rollout_s")
        if self.busy and (stuck := now - self.progressed_at) > limit:
            return f"no progress for {stuck:.0f} s (deadlines.{key} = {limit:g})"
        return None
