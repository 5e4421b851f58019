"""The rollout worker: an engine, a verifier pool and a queue, as one Ray actor.

Two loops meet in it. The controller calls `submit` and `update_weights`, which only append to the queue; the actor's
one long-lived `results` generator processes the queue in order: generate -> grade -> yield a record batch of what is
graded by then. Groups that end together travel together: a batch costs the worker and the driver milliseconds, whatever
it holds (docs/measured.md).

A weight update is an item of the queue. Groups submitted before it finish with the old weights, groups after it start
with the new ones: no trajectory ever mixes versions, and the order of the controller's calls, never timing, decides
the version of a group. (With `in_flight` the engine takes new weights at once and records in each trajectory which
versions sampled it.) Calls to a threaded actor may overtake each other, so each carries a ticket (0, 1, 2, ...) and the
queue takes them in ticket order.

Results are yielded, not put: what an actor yields is owned by the caller and survives the actor's death.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from latent_grpo.common.schema import encode
from latent_grpo.common.types import FinishReason, GroupRequest, PolicyVersion, Trajectory
from latent_grpo.common.weights import TensorBytes, WeightManifest, unpack
from latent_grpo.reward.pool import VerifierPool
from latent_grpo.reward.verifier import Grade
from latent_grpo.rollout_workers.engine import LatentEngine
from latent_grpo.rollout_workers.verifiers import reward_errors

IDLE_WAIT_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """A worker's heartbeat. `progress` rises with every decode step, grade and update; a watchdog compares it.

    `loading` says that it is verifying and loading weights now, `busy_s` how many seconds it has worked so far.
    """

    name: str
    version: PolicyVersion | None
    progress: int
    pending_samples: int
    queued: int
    loading: bool
    busy_s: float
    last_event: str


@dataclass(frozen=True, slots=True)
class _WeightUpdate:
    manifest: WeightManifest
    buckets: Sequence[Sequence[TensorBytes]]


class _Discard:
    """In the queue: what was submitted before is not wanted any more."""


Item = GroupRequest | _WeightUpdate | _Discard


class RolloutWorker:
    """The actor's body in plain Python, so that it also runs without Ray. `decode` turns token ids into text."""

    def __init__(
        self,
        name: str,
        engine: LatentEngine,
        verifiers: VerifierPool,
        decode: Callable[[np.ndarray, FinishReason], str],
        *,
        k: int,
        run_id: str,
        in_flight: bool = False,
    ):
        self.name, self.k, self.run_id, self._in_flight = name, k, run_id, in_flight
        self._engine, self._verifiers, self._decode = engine, verifiers, decode
        self._queue: deque[Item] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._early: dict[int, Sequence[Item]] = {}  # calls that came before an earlier one, by ticket
        self._next_ticket = 0
        self._verifier_of: dict[str, str] = {}  # by group uid, while a group is being made
        self._progress, self._last_event = 0, "started"
        self._loading, self._busy_s = False, 0.0
        self._fingerprints: dict[str, str] = {}  # of the weights that were loaded last, by the tensors' names
        self._discards = 0  # in the queue: while there is one, results are not wanted

    # --- called by the controller, from other threads ------------------------------------------------------------

    def submit(self, ticket: int, requests: list[GroupRequest]) -> None:
        """Queues groups. They are generated with the weights that are current at their place in the queue."""
        self._enqueue(ticket, requests)

    def update_weights(self, ticket: int, manifest: WeightManifest, buckets: Sequence[Sequence[TensorBytes]]) -> None:
        """Queues published weights behind the groups that were submitted before; returns at once.

        `buckets` have the bytes of each tensor. They take the place of weights that wait there with no group behind
        them. Weights that cannot be verified end `results`, since a worker without verified weights must not continue:
        with :class:`common.weights.WeightsCorrupt` where bytes are missing, with EngineError if the checksum of what
        the engine holds differs.
        """
        self._enqueue(ticket, [_WeightUpdate(manifest, buckets)])

    def discard(self, ticket: int) -> None:
        """Forgets every group that was submitted before; returns at once.

        `results` yields nothing of them any more, and a batch without rows once it is done with the running ones.
        """
        self._enqueue(ticket, [_Discard()])

    def _enqueue(self, ticket: int, items: Sequence[Item]) -> None:
        with self._changed:
            self._early[ticket] = items
            while self._next_ticket in self._early:
                later = self._early.pop(self._next_ticket)
                if any(isinstance(item, _Discard) for item in later):
                    self._queue = deque(item for item in self._queue if not isinstance(item, GroupRequest))
                    self._discards += 1
                for item in later:
                    if isinstance(item, _WeightUpdate) and self._queue and isinstance(self._queue[-1], _WeightUpdate):
                        self._queue.pop()  # nothing is made with those weights, and each holds memory
                    self._queue.append(item)
                self._next_ticket += 1
            self._changed.notify_all()

    def status(self) -> WorkerStatus:
        """Returns what the pool asks for in a heartbeat; any thread may call it."""
        return WorkerStatus(
            name=self.name,
            version=self._engine.version,
            progress=self._progress,
            pending_samples=self._engine.pending,
            queued=len(self._queue),
            loading=self._loading,
            busy_s=self._busy_s,
            last_event=self._last_event,
        )

    def stop(self) -> None:
        """Ends `results` after the running decode step; unfinished groups are not delivered."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    # --- the working loop ----------------------------------------------------------------------------------------

    def results(self) -> Iterator[pa.RecordBatch]:
        """Yields record batches of whole graded groups, one after another in each, until `stop`. It is called once."""
        graded: deque[Future[list[Trajectory]]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="grading") as grader:
            try:
                while not self._closing:
                    self._admit()
                    if self._engine.pending:
                        began = time.perf_counter()
                        graded.extend(grader.submit(self._graded, group) for group in self._engine.step())
                        self._busy_s += time.perf_counter() - began
                        self._event("decoded a step")
                    elif graded:
                        graded[0].exception(timeout=None)  # nothing to decode: wait for the oldest grade
                    elif self._discarded():
                        yield encode([], self.k)
                    else:
                        self._wait_for_work()
                    rows: list[Trajectory] = []
                    while graded and graded[0].done():
                        rows += graded.popleft().result()
                    if rows and not self._discards:
                        yield encode(rows, self.k)
                        self._event("delivered what was graded")
            finally:
                self._engine.close()
                self._verifiers.close()

    def _admit(self) -> None:
        """Gives queued groups to the engine up to the next weight update, which it applies once the engine is empty."""
        while item := self._next():
            if isinstance(item, _WeightUpdate):
                self._apply(item)
            else:
                self._verifier_of[item.group_uid] = item.verifier
                self._engine.add(item)

    def _next(self) -> GroupRequest | _WeightUpdate | None:
        """Takes what can begin now from the queue."""
        with self._changed:
            item = self._queue[0] if self._queue else None
            if item is None or isinstance(item, _Discard):
                return None
            if isinstance(item, _WeightUpdate) and self._engine.pending and not self._in_flight:
                return None
            self._queue.popleft()
            return item

    def _discarded(self) -> bool:
        """Whether the queue is at a discard, which is done now: engine and grader have nothing left from before."""
        with self._changed:
            if not self._queue or not isinstance(self._queue[0], _Discard):
                return False
            self._queue.popleft()
            self._discards -= 1
        self._event("forgot its groups")
        return True

    def _apply(self, update: _WeightUpdate) -> None:
        version = update.manifest.version
        self._loading = True
        self._event(f"loads weights of version {version.version}")
        pairs = zip(update.manifest.buckets, update.buckets, strict=True)
        tensors = [tensor for bucket, data in pairs for tensor in unpack(bucket, data)]
        found, before = update.manifest.fingerprints, self._fingerprints
        self._engine.load_weights(version, tensors, [name for name in found if found[name] == before.get(name)])
        self._fingerprints = found
        self._loading = False
        self._event(f"loaded weights of version {version.version}")

    def _wait_for_work(self) -> None:
        with self._changed:
            if not self._queue and not self._closing:
                self._changed.wait(IDLE_WAIT_S)

    def _graded(self, group: tuple[Trajectory, ...]) -> list[Trajectory]:
        """Decodes and grades a group's samples beside the decode loop. An aborted sample is never graded."""
        started = time.perf_counter()
        texts = [self._decode(t.hard_ids, t.finish_reason) for t in group]
        verifier = self._verifier_of.pop(group[0].group_uid)
        whole = [i for i, trajectory in enumerate(group) if trajectory.finish_reason != "aborted"]
        with reward_errors():
            graded = self._verifiers.grade_many([(verifier, texts[i], group[i].gold_answer) for i in whole])
        grades = [Grade(None, "ungraded")] * len(group)
        for i, grade in zip(whole, graded, strict=True):
            grades[i] = grade
        seconds = (time.perf_counter() - started) / len(group)
        self._progress += 1  # another thread's event would hide what the loop does
        return [
            dataclasses.replace(
                trajectory,
                run_id=self.run_id,
                worker=self.name,
                response_text=text,
                parsed_answer=grade.parsed,
                reward=grade.reward,
                grade_reason=grade.reason,
                grading_seconds=seconds,
            )
            for trajectory, text, grade in zip(group, texts, grades, strict=True)
        ]

    def _event(self, text: str) -> None:
        self._progress += 1
        self._last_event = text
