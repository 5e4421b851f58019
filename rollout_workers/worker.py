"""The rollout worker: an engine, a verifier pool and a queue, as one Ray actor.

Two loops meet in it. The controller calls `submit` and `update_weights`, which only append to the queue; the actor's
one long-lived `results` generator processes the queue in order: generate -> grade -> yield a record batch.

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
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from latent_grpo.common.schema import encode
from latent_grpo.common.types import FinishReason, GroupRequest, PolicyVersion, Trajectory
from latent_grpo.common.weights import WeightManifest, unpack
from latent_grpo.reward.pool import VerifierPool
from latent_grpo.reward.verifier import Grade
from latent_grpo.rollout_workers.engine import LatentEngine
from latent_grpo.rollout_workers.verifiers import reward_errors

IDLE_WAIT_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """A worker's heartbeat. `progress` rises with every decode step, grade and update; a watchdog compares it."""

    name: str
    version: PolicyVersion | None
    progress: int
    pending_samples: int
    queued: int
    last_event: str


@dataclass(slots=True)
class _WeightUpdate:
    manifest: WeightManifest
    buckets: list[np.ndarray]
    applied: Future[PolicyVersion] = field(default_factory=Future)


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
        self._queue: deque[GroupRequest | _WeightUpdate] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._early: dict[
            int, Sequence[GroupRequest | _WeightUpdate]
        ] = {}  # calls that came before an earlier one, by ticket
        self._next_ticket = 0
        self._verifier_of: dict[str, str] = {}  # by group uid, while a group is being made
        self._progress, self._last_event = 0, "started"

    # --- called by the controller, from other threads ------------------------------------------------------------

    def submit(self, ticket: int, requests: list[GroupRequest]) -> None:
        """Queues groups. They are generated with the weights that are current at their place in the queue."""
        self._enqueue(ticket, requests)

    def update_weights(
        self, ticket: int, manifest: WeightManifest, buckets: list[np.ndarray], timeout_s: float
    ) -> PolicyVersion:
        """Verifies and applies published weights when the groups before them are done; returns the version now held.

        `buckets` are uint8 arrays. Raises :class:`common.weights.WeightsCorrupt` before anything is applied,
        EngineError if the engine's own checksum differs (either also ends `results`, since a worker without verified
        weights must not continue), and TimeoutError after `timeout_s`.
        """
        update = _WeightUpdate(manifest, buckets)
        self._enqueue(ticket, [update])
        return update.applied.result(timeout=timeout_s)

    def _enqueue(self, ticket: int, items: Sequence[GroupRequest | _WeightUpdate]) -> None:
        with self._changed:
            self._early[ticket] = items
            while self._next_ticket in self._early:
                self._queue.extend(self._early.pop(self._next_ticket))
                self._next_ticket += 1
            self._changed.notify_all()

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            name=self.name,
            version=self._engine.version,
            progress=self._progress,
            pending_samples=self._engine.pending,
            queued=len(self._queue),
            last_event=self._last_event,
        )

    def stop(self) -> None:
        """Ends `results` after the running decode step; unfinished groups are not delivered."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    # --- the working loop ----------------------------------------------------------------------------------------

    def results(self) -> Iterator[pa.RecordBatch]:
        """Yields one graded record batch per group, until `stop`. It is called once."""
        graded: deque[Future[pa.RecordBatch]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="grading") as grader:
            try:
                while not self._closing:
                    self._admit()
                    if self._engine.pending:
                        graded.extend(grader.submit(self._finish, group) for group in self._engine.step())
                        self._event("decoded a step")
                    elif graded:
                        graded[0].exception(timeout=None)  # nothing to decode: wait for the oldest grade
                    else:
                        self._wait_for_work()
                    while graded and graded[0].done():
                        yield graded.popleft().result()
                        self._event("delivered a group")
            finally:
                self._engine.close()
                self._verifiers.close()

    def _admit(self) -> None:
        """Gives queued groups to the engine up to the next weight update, which it applies once the engine is empty."""
        while self._queue:
            item = self._queue[0]
            if isinstance(item, _WeightUpdate) and self._engine.pending and not self._in_flight:
                return
            self._queue.popleft()
            if isinstance(item, _WeightUpdate):
                self._apply(item)
            else:
                self._verifier_of[item.group_uid] = item.verifier
                self._engine.add(item)

    def _apply(self, update: _WeightUpdate) -> None:
        pairs = zip(update.manifest.buckets, update.buckets, strict=True)
        try:
            tensors = [tensor for bucket, data in pairs for tensor in unpack(bucket, data)]
            self._engine.load_weights(update.manifest.version, tensors)
        except Exception as error:  # also for the caller of update_weights, which waits in another thread
            update.applied.set_exception(error)
            raise
        self._event(f"loaded weights of version {update.manifest.version.version}")
        update.applied.set_result(update.manifest.version)

    def _wait_for_work(self) -> None:
        with self._changed:
            if not self._queue and not self._closing:
                self._changed.wait(IDLE_WAIT_S)

    def _finish(self, group: tuple[Trajectory, ...]) -> pa.RecordBatch:
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
        complete = [
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
        return encode(complete, self.k)

    def _event(self, text: str) -> None:
        self._progress += 1
        self._last_event = text
