"""The training loop, the only one: synchronous and asynchronous training differ in one setting.

    dispatch ──► rollout pool ──► arrived groups ──► buffer ──► batch ──► learner ──► publish ──► dispatch ...
       ▲              waits for      (graded)      (prompt order,           │ waits for one step, while the
       └── free slots: a group was trained on,      filtered)               │ pool's results keep arriving
           filtered or dropped                                              ▼
                                                              new weights queue behind each worker's groups

What each part waits for, and what unblocks it:

* dispatch waits for free slots of the buffer; a finished learner step or a filtered group frees them;
* the learner waits for a batch: the first `prompts_per_step` groups with signal, in prompt order;
* workers wait for work; a weight update is an item of their queue, so no trajectory mixes versions;
* the controller itself waits in exactly one place, `RolloutPool.poll`, which has a deadline for every worker. An
  interrupt is taken only there and before a step begins (`common.interrupts`), so it never splits the start of a step.

Synchronous training is `max_staleness: 0`: the batch at the learner holds all slots, so nothing is generated
meanwhile. Nothing else distinguishes it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from latent_grpo.common.config import RunConfig
from latent_grpo.common.errors import RunError
from latent_grpo.common.interrupts import check_interrupt, finish_within
from latent_grpo.common.schema import SchemaError, TrajectoryBatch, concat
from latent_grpo.common.types import GroupRequest
from latent_grpo.deploy.buffer import GroupBuffer, ReadyBatch
from latent_grpo.learner.advantages import keep_groups
from latent_grpo.rollout_workers.metrics import rollout_metrics

log = logging.getLogger(__name__)
POLL_S = 0.2
OnWait = Callable[[str, float | None], None]
"""Called with a part of a step (`rollout`, `learner`, `publish`) and the share of it that is done, if that is known."""
MALFORMED = "malformed"  # why a group was dropped
LEARNING_POLL_S = 0.02  # nothing wakes the loop when the learner is done, so it polls often


class TrainingStopped(RunError):
    """The run cannot continue; the message says why and what to do. The last checkpoint stays valid."""


class Learner(Protocol):
    """What the controller needs from the learner ranks (`learner.learner.LearnerGroup`)."""

    def start_step(self, batch: pa.RecordBatch, step: int) -> None:
        """Gives the ranks a batch, whole groups in prompt order, and returns at once; steps count from 1."""

    def finished(self) -> bool:
        """Whether the started step is done (or failed); never waits."""

    def finish_step(self) -> dict[str, float]:
        """Returns the step's metrics; raises the error of a rank that failed."""

    def publish(self, version: int) -> Any:
        """Returns the current weights as this policy version, in a form that the pool's `publish` takes."""


class Pool(Protocol):
    """What the controller needs from the workers (`rollout_workers.pool.RolloutPool`)."""

    def submit(self, requests: list[GroupRequest]) -> None:
        """Queues groups; each is generated with the weights that were published last, and returned once."""

    def poll(self, timeout_s: float) -> list[pa.RecordBatch]:
        """Returns complete groups that have arrived, one batch each; waits at most `timeout_s` for the first."""

    def publish(self, publication: Any) -> None:
        """Gives the workers new weights, which groups that are submitted later are generated with."""

    def discard(self) -> None:
        """Forgets every group that was submitted."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step of the run, for metrics, dumps and checkpoints. `batch` is None for a step without signal."""

    step: int
    batch: pa.RecordBatch | None
    generated: tuple[pa.RecordBatch, ...]  # all groups of the step in prompt order, filtered ones included
    reasons: tuple[str | None, ...]  # of `generated`: why it was filtered; None: its rows are in `batch`
    metrics: dict[str, float]


class Controller:
    """Runs the steps of a run, without depending on Ray or DeepSpeed.

    `requests_of(ordinals)` returns the prompts at places in the run's prompt order. The state is `step`,
    `next_ordinal`, the first prompt that no batch has consumed, and `ahead`, later ones that batches have consumed
    (`batch_window`); they decide the rest of the run (METHOD §2.5).
    """

    def __init__(
        self,
        config: RunConfig,
        pool: Pool,
        learner: Learner,
        requests_of: Callable[[Sequence[int]], list[GroupRequest]],
        *,
        step: int = 0,
        next_ordinal: int = 0,
        ahead: Collection[int] = (),
    ):
        self.config, self.pool, self.learner, self.requests_of = config, pool, learner, requests_of
        self.step, self.next_ordinal, self.ahead = step, next_ordinal, tuple(ahead)
        self.buffer = GroupBuffer(
            prompts_per_step=config.prompts_per_step,
            max_staleness=config.max_staleness,
            refill=config.dynamic_sampling == "refill",
            max_dispatch_factor=config.max_dispatch_factor,
            window=config.batch_window,
            next_ordinal=next_ordinal,
            ahead=ahead,
        )
        self.beside: Callable[[str, pa.RecordBatch], bool] | None = None
        """Takes groups by their uid that are not for training but arrive beside it; False for any other."""
        self._learning: ReadyBatch | None = None  # at the learner now

    @property
    def version(self) -> int:
        """The policy version at which work is dispatched. It rises with every step, even one without an update."""
        return self.step

    @property
    def learning(self) -> bool:
        """Whether the learner is in the middle of a step."""
        return self._learning is not None

    def begin(self) -> None:
        """Publishes the learner's weights before any work, so a resumed run samples with its checkpoint's weights."""
        self.pool.publish(self.learner.publish(self.version))

    def run_step(self, on_wait: OnWait = lambda part, share: None) -> StepResult:
        """Runs one step: a batch, the learner's update on it, and the publication of the result.

        `on_wait` is called again and again while the step waits.
        """
        started = time.perf_counter()
        batch = self._next_batch(on_wait)
        check_interrupt()  # the batch may have been there without a wait
        waited = time.perf_counter() - started
        rows = concat(batch.groups) if batch.groups else None
        if rows is not None:
            self._learning = batch
            self.learner.start_step(rows, self.step)
        metrics = self._batch_metrics(batch, rows)  # while the learner is at work
        if rows is not None:
            metrics |= self._learned(on_wait)
        learned = time.perf_counter() - started - waited
        result = self._advance(batch, rows, metrics)
        publishing = time.perf_counter()
        on_wait("publish", None)
        self.begin()
        metrics |= {
            "time/rollout_wait_s": waited,
            "time/learner_s": learned,
            "time/publish_s": time.perf_counter() - publishing,
            "time/step_s": time.perf_counter() - started,
        }
        return result

    def gather(
        self, requests: Iterable[GroupRequest], on_arrival: Callable[[int], None] = lambda done: None
    ) -> list[pa.RecordBatch]:
        """Generates groups that are not for training (evaluation, self-test), in the order of `requests`.

        Training's own results keep arriving meanwhile. `on_arrival` is called with the number of groups so far.
        """
        return gather(self.pool, requests, on_arrival, self._take)

    def attend(self, done: Callable[[], bool]) -> None:
        """Takes what arrives until `done`, and dispatches nothing for training."""
        while not done():
            self._take(self.pool.poll(POLL_S))
            check_interrupt()

    def settle(self, timeout_s: float) -> StepResult | None:
        """After an interrupt, finishes the step that the learner has begun and returns it.

        Returns None without such a step, or if it does not end within `timeout_s`: then :attr:`learning` stays true.
        """
        if self._learning is None:
            return None
        learned = finish_within(self.learner, timeout_s)
        if learned is None:
            return None
        batch, rows = self._learning, concat(self._learning.groups)
        return self._advance(batch, rows, learned | self._batch_metrics(batch, rows))

    def _learned(self, on_wait: OnWait) -> dict[str, float]:
        while not self.learner.finished():
            on_wait("learner", None)
            self._exchange(LEARNING_POLL_S)  # with staleness, rollouts continue while the learner trains
        return self.learner.finish_step()

    def _advance(self, batch: ReadyBatch, rows: pa.RecordBatch | None, metrics: dict[str, float]) -> StepResult:
        self._learning = None
        self.step += 1
        self.next_ordinal, self.ahead = batch.next_ordinal, batch.ahead
        self.buffer.trained(batch)
        return StepResult(self.step, rows, batch.generated, batch.reasons, metrics)

    def _next_batch(self, on_wait: OnWait) -> ReadyBatch:
        while (batch := self.buffer.take_batch()) is None:
            on_wait("rollout", self.buffer.ready_share)
            self._exchange()
        return batch

    def _exchange(self, timeout_s: float = POLL_S) -> None:
        """Fills the free slots with work and takes the groups that have arrived."""
        requests = self.requests_of(self.buffer.next_ordinals) if self.buffer.free_slots > 0 else []
        for request in requests:
            self.buffer.dispatched(request)
        if requests:
            self.pool.submit(requests)
        self._take(self.pool.poll(timeout_s))
        check_interrupt()

    def _take(self, groups: Sequence[pa.RecordBatch]) -> None:
        own = [group for group in groups if self.beside is None or not self.beside(_group_uid(group), group)]
        for group, reason in zip(own, self._drop_reasons(own), strict=True):
            self.buffer.arrived(_group_uid(group), None if reason == MALFORMED else group, reason)

    def _drop_reasons(self, groups: Sequence[pa.RecordBatch]) -> list[str | None]:
        """Returns why each group is dropped, or None; the check of many takes hardly longer than that of one."""
        if not groups:
            return []
        try:
            view = TrajectoryBatch(concat(groups) if len(groups) > 1 else groups[0])
        except (SchemaError, pa.ArrowException) as error:  # from a worker with other code; records are never repaired
            if len(groups) > 1:
                return [reason for group in groups for reason in self._drop_reasons([group])]
            log.warning("group %s dropped: malformed records: %s", _group_uid(groups[0]), error)
            return [MALFORMED]
        numbers = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        kept = keep_groups(view.rewards, numbers, view.valid, masking=self.config.objective.masking)
        return [reason or None for reason in kept.reasons]

    def _batch_metrics(self, batch: ReadyBatch, rows: pa.RecordBatch | None) -> dict[str, float]:
        """Returns metrics of the generated groups and of those trained on (`rows`). Raises :class:`TrainingStopped`."""
        if not batch.generated:
            raise TrainingStopped(
                f"none of the step's {sum(batch.dropped.values())} groups had readable records (see the log); check "
                "that the workers run the same version of this program as the driver"
            )
        metrics = rollout_metrics(concat(batch.generated))
        limit = self.config.rollout.verifier.max_ungraded_share
        if metrics["rollout/ungraded_share"] > limit:
            raise TrainingStopped(
                f"{metrics['rollout/ungraded_share']:.0%} of the step's samples could not be graded; limit {limit:.0%} "
                "(rollout.verifier.max_ungraded_share): the verifier's processes fail; read the workers' logs"
            )
        metrics["batch/groups"] = len(batch.groups)
        metrics["batch/zero_variance_share"] = batch.reasons.count("all_equal") / len(batch.reasons)
        metrics |= {f"batch/dropped_{reason}": count for reason, count in batch.dropped.items()}
        metrics["batch/duplicates"] = self.buffer.duplicates
        if rows is not None:
            ages = self.step - TrajectoryBatch(rows).numbers("policy_version_min")
            metrics |= {"batch/staleness_mean": float(ages.mean()), "batch/staleness_max": float(ages.max())}
        if self.config.batch_window and batch.groups:
            metrics |= _order_metrics(batch)
        return metrics


def _order_metrics(batch: ReadyBatch) -> dict[str, float]:
    """Returns how many groups of the batch the one before has passed over, and how long they are.

    `batch/passed_steps` are mean response steps of these groups, `batch/in_order_steps` those of the others; their
    difference is the bias of the window.
    """
    steps = [float(TrajectoryBatch(group).num_steps.mean()) for group in batch.groups]
    passed = [length for length, by in zip(steps, batch.passed, strict=True) if by]
    others = [length for length, by in zip(steps, batch.passed, strict=True) if not by]
    means = {"batch/passed_steps": passed, "batch/in_order_steps": others}
    return {
        "batch/passed_groups": float(len(passed)),
        **{name: sum(lengths) / len(lengths) for name, lengths in means.items() if lengths},
    }


def gather(
    pool: Pool,
    requests: Iterable[GroupRequest],
    on_arrival: Callable[[int], None] = lambda done: None,
    on_others: Callable[[Sequence[pa.RecordBatch]], None] = lambda groups: None,
) -> list[pa.RecordBatch]:
    """Generates groups with the pool's current weights and waits for all of them, in the order of `requests`.

    `on_arrival` is called with the number of groups so far, `on_others` with groups that are not among `requests`.
    """
    wanted = list(requests)
    pool.submit(wanted)
    order = {request.group_uid: i for i, request in enumerate(wanted)}
    groups: dict[int, pa.RecordBatch] = {}
    while len(groups) < len(wanted):
        arrived = pool.poll(POLL_S)
        groups |= {order[uid]: group for group in arrived if (uid := _group_uid(group)) in order}
        on_others([group for group in arrived if _group_uid(group) not in order])
        on_arrival(len(groups))
        check_interrupt()
    return [groups[i] for i in range(len(wanted))]


def _group_uid(group: pa.RecordBatch) -> str:
    return group.column("group_uid")[0].as_py()
