"""A discrete-event simulation of a run: the product's controller and buffer, with workers and a learner of given times.

    Controller ──► SimulatedPool: a heap of (when, group) ──► Controller ──► SimulatedLearner: ends at a time
                         └──────────────── one Clock, which `poll` moves to the next event ───────────┘

Nothing sleeps: a simulated hour takes as long as the driver's own code needs for its groups. That is why the same
simulation also measures how many groups a second the driver handles (:attr:`Simulated.driver_groups_per_s`).
"""

from __future__ import annotations

import heapq
import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from latent_grpo.common.config import RunConfig, load_config
from latent_grpo.common.schema import encode
from latent_grpo.common.types import GroupRequest, SamplingSettings, Trajectory
from latent_grpo.deploy.controller import Controller

WARM_UP = 3  # steps that are not counted, besides one for each of staleness
SPREAD = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """What the parts of a run take, in seconds, and how much runs at once.

    `group_s`: a group in a worker that is full; `side_by_side`: groups that a worker decodes at once; `learner_s`: a
    step of the learner; `publish_s`: until the workers may take new weights; `driver_group_s`: what the driver itself
    spends on a group, in which it does nothing else; `spread`: of the logarithm of a group's seconds.
    """

    group_s: float
    side_by_side: int
    learner_s: float
    publish_s: float = 0.0
    driver_group_s: float = 0.0
    spread: float = SPREAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """The counted steps of a simulation: simulated seconds of a step, the shares of them in which the learner waits and
    workers work, groups a simulated second, and groups that the driver's code handled in a second of one core."""

    workers: int
    step_s: float
    learner_waits: float
    workers_busy: float
    groups_per_s: float
    driver_groups_per_s: float


@dataclass(slots=True)
class Clock:
    """The simulated time, in seconds."""

    now: float = 0.0


class SimulatedPool:
    """Implements `deploy.controller.Pool`: each group goes to the worker that is free first, and lasts by its uid."""

    def __init__(self, workers: int, times: Times, clock: Clock, template: pa.RecordBatch) -> None:
        self._clock, self._times, self._template = clock, times, template
        self._free = [(0.0, number) for number in range(workers * times.side_by_side)]  # when, of which place
        self._coming: list[tuple[float, str]] = []  # when a group arrives, and its uid
        self._waiting: deque[GroupRequest] = deque()
        self._column = template.schema.get_field_index("group_uid")
        self.busy_s = 0.0  # of all places together

    def submit(self, requests: list[GroupRequest]) -> None:
        for request in requests:
            free, place = heapq.heappop(self._free)
            begins, lasts = max(free, self._clock.now), self._seconds(request.group_uid)
            self.busy_s += lasts
            heapq.heappush(self._free, (begins + lasts, place))
            heapq.heappush(self._coming, (begins + lasts, request.group_uid))

    def poll(self, timeout_s: float) -> list[pa.RecordBatch]:
        """Moves the clock to the next arrival, at most `timeout_s` ahead, and returns what has arrived by then."""
        clock, limit = self._clock, self._clock.now + timeout_s
        if not self._coming or self._coming[0][0] > limit:
            clock.now = limit
            return []
        clock.now = max(clock.now, self._coming[0][0])
        arrived = []
        while self._coming and self._coming[0][0] <= clock.now:
            arrived.append(self._group(heapq.heappop(self._coming)[1]))
            clock.now += self._times.driver_group_s
        return arrived

    def publish(self, publication: Any) -> None:
        """Workers take weights between two groups, so places only begin later: publication holds the driver up."""
        self._clock.now += self._times.publish_s

    def discard(self) -> None:
        self._coming.clear()

    def _seconds(self, uid: str) -> float:
        spread = self._times.spread
        return self._times.group_s * random.Random(uid).lognormvariate(-spread * spread / 2, spread)  # its mean is 1

    def _group(self, uid: str) -> pa.RecordBatch:
        rows = self._template.num_rows
        return self._template.set_column(
            self._column, self._template.schema.field(self._column), pa.array([uid] * rows, pa.string())
        )


class SimulatedLearner:
    """Implements `deploy.controller.Learner`: a step ends at a time of the clock."""

    def __init__(self, seconds: float, clock: Clock) -> None:
        self._seconds, self._clock, self._ends = seconds, clock, 0.0
        self.busy_s = 0.0

    def start_step(self, batch: pa.RecordBatch, step: int) -> None:
        self._ends = self._clock.now + self._seconds
        self.busy_s += self._seconds

    def finished(self) -> bool:
        return self._clock.now >= self._ends

    def finish_step(self) -> dict[str, float]:
        self._clock.now = min(self._clock.now, self._ends)  # the loop looks every 20 ms, which is none of the run's
        return {}

    def publish(self, version: int) -> None:
        return None


def simulate(config: RunConfig, times: Times, workers: int, steps: int = 20) -> Simulated:
    """Simulates a run of `workers` with the settings' batch, staleness and window; all groups have signal."""
    clock, template = Clock(), _template(config.group_size)
    pool, learner = SimulatedPool(workers, times, clock, template), SimulatedLearner(times.learner_s, clock)
    controller = Controller(config, pool, learner, lambda ordinals: [_request(config, o) for o in ordinals])
    controller.begin()
    for _ in range(WARM_UP + config.max_staleness):
        controller.run_step()
    begun, learned, worked, real = clock.now, learner.busy_s, pool.busy_s, time.process_time()
    groups = 0
    for _ in range(steps):
        groups += len(controller.run_step().generated)
    took, real = clock.now - begun, time.process_time() - real
    places = workers * times.side_by_side
    return Simulated(
        workers=workers,
        step_s=took / steps,
        learner_waits=max(1 - (learner.busy_s - learned) / took, 0.0),
        workers_busy=min((pool.busy_s - worked) / (took * places), 1.0),
        groups_per_s=groups / took,
        driver_groups_per_s=groups / real,
    )


def growth(config: RunConfig, times: Times, most: int = 1024) -> Iterator[Simulated]:
    """Simulates 1, 2, 4, ... `most` workers, each with a learner that is as fast as the rollouts allow.

    The batch grows with the workers, so that all find work: what is left is the loop and the driver.
    """
    workers = 1
    while workers <= most:
        prompts = max(config.prompts_per_step, 2 * workers * times.side_by_side)
        grown = config.model_copy(update={"prompts_per_step": prompts, "max_staleness": max(config.max_staleness, 1)})
        yield simulate(grown, times, workers, steps=max(2, min(20, 8_000 // prompts)))
        workers *= 2


def driver_speed(workers: int = 64, *, group_size: int = 8, steps: int = 20) -> float:
    """Groups a second that the driver's own code handles: dispatch, buffer, filter, batch and metrics, without Ray."""
    budget = {"max_prompt_tokens": 9, "max_response_tokens": 9}
    task = {"name": "simulated", "path": "builtin:chain_arithmetic", **budget}
    prompts = 4 * workers
    settings = {
        "model": {"new": {}}, "tasks": [task], "group_size": group_size, "prompts_per_step": prompts,
        "minibatch_prompts": prompts, "max_staleness": 1, "checkpoint": {"keep_best": None},
    }  # fmt: skip
    times = Times(group_s=1.0, side_by_side=2, learner_s=0.1)
    return simulate(load_config(settings), times, workers, steps).driver_groups_per_s


# --- what travels --------------------------------------------------------------------------------------------------


def _request(config: RunConfig, ordinal: int) -> GroupRequest:
    return GroupRequest(
        group_uid=f"simulated/{ordinal}", problem_uid=f"simulated/{ordinal}", task="simulated",
        prompt_ids=np.zeros(1, np.int32), sample_indices=tuple(range(config.group_size)),
        sampling=SamplingSettings(mode="visible", max_tokens=8), purpose="training", epoch=0, run_seed=0,
        verifier="number", gold_answer="1",
    )  # fmt: skip


def _template(samples: int) -> pa.RecordBatch:
    """The Arrow rows of one group, of which half are right."""
    none = np.zeros((0, 1), np.float32)
    rows = [
        Trajectory(
            purpose="training", task="simulated", problem_uid="simulated", group_uid="", sample_index=index,
            epoch=0, run_seed=0, policy_version_min=0, policy_version_max=0, engine="simulated",
            sampling=SamplingSettings(mode="visible", max_tokens=8), prompt_ids=np.zeros(1, np.int32),
            gold_answer="1", latent_ids=none.astype(np.int32), latent_scores=none, latent_log_probs=none,
            hard_ids=np.zeros(8, np.int32), hard_log_probs=np.zeros(8, np.float32), finish_reason="stop",
            reward=float(index % 2), grade_reason="correct" if index % 2 else "wrong",
        )
        for index in range(samples)
    ]  # fmt: skip
    return encode(rows, 1)
