"""How long the learner waits for rollouts, by `max_staleness`: the product's loop, with engine and learner that sleep.

The buffer, the controller, the pool and its workers on Ray are those of a run. The engine draws nothing: a sample lasts
a number of decode steps that its uid decides, with a long tail, and a decode step sleeps. The learner sleeps too. So no
model's speed and no core's is measured, but what the loop makes of given times.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from latent_grpo.common.config import RunConfig, load_config
from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.common.types import GroupRequest, PolicyVersion, SamplingSettings, Trajectory
from latent_grpo.common.weights import Publication, WeightManifest
from latent_grpo.deploy.controller import Controller, Pool
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.ray_session import ray_session
from latent_grpo.reward.pool import VerifierPool
from latent_grpo.rollout_workers.pool import RolloutPool
from latent_grpo.rollout_workers.requests import SampleRecord
from latent_grpo.rollout_workers.worker import RolloutWorker

STALENESS = (0, 1, 2, 4)
PROMPTS, SAMPLES, ROWS = 16, 4, 16  # prompts a step, samples a prompt, samples side by side in a worker
DECODE_S, LEARNER_S = 0.02, 1.6  # of a decode step, and of a step of the learner
SPREAD = 0.6  # of the logarithm of a sample's length; its median is a quarter of the longest
WARM_UP = 4  # steps that are not counted, besides one for each of staleness
SETTINGS: dict[str, Any] = {
    "k": 1, "group_size": SAMPLES, "prompts_per_step": PROMPTS, "minibatch_prompts": PROMPTS, "model": {"new": {}},
    "tasks": [{"name": "simulated", "path": "builtin:chain_arithmetic", "max_prompt_tokens": 9,
               "max_response_tokens": 9}], "checkpoint": {"keep_best": None},
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`longest` sample in decode steps; how fast rollouts are beside the learner follows from it."""

    name: str
    longest: int
    max_staleness: int
    batch_window: int = 0
    in_flight: bool = False  # `rollout.in_flight_updates`; without, a worker ends what it has before it takes weights

    def config(self) -> RunConfig:
        keys = {"max_staleness": self.max_staleness, "batch_window": self.batch_window}
        return load_config({**SETTINGS, **keys})


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the counted steps of a case took. `wait_share`: of their time, in which the learner waited for a batch."""

    case: Case
    steps: int
    step_s: float
    wait_share: float
    staleness_mean: float


def cases(staleness: Sequence[int] = STALENESS) -> list[Case]:
    """Rollouts of which the longest takes half a step of the learner, and of which it takes two and a half."""
    slow = Case(name="slow rollouts", longest=200, max_staleness=1, batch_window=PROMPTS // 2)
    kinds = Case(name="slow learner", longest=40, max_staleness=0), replace(slow, batch_window=0)
    in_flight = [replace(kinds[1], max_staleness=s, in_flight=True) for s in staleness if s]
    return [*(replace(kind, max_staleness=s) for kind in kinds for s in staleness), slow, *in_flight]


# --- the simulated parts -------------------------------------------------------------------------------------------


def lengths(request: GroupRequest) -> list[int]:
    """Returns the decode steps of each sample, by the group's uid and `max_tokens`."""
    drawn, longest = random.Random(request.group_uid), request.sampling.max_tokens
    return [
        min(max(round(drawn.lognormvariate(np.log(longest / 4), SPREAD)), 1), longest) for _ in request.sample_indices
    ]


class SleepingEngine:
    """Implements :class:`rollout_workers.engine.LatentEngine`: whole groups side by side, in at most `rows` samples."""

    name = "sleeping"

    def __init__(self, rows: int = ROWS, decode_s: float = DECODE_S) -> None:
        self.version: PolicyVersion | None = None
        self._rows, self._decode_s = rows, decode_s
        self._queue: list[GroupRequest] = []
        self._running: list[tuple[GroupRequest, list[int]]] = []  # and the steps that are left to each sample
        self._began: dict[str, int] = {}  # by uid: the version at which a running group began

    @property
    def pending(self) -> int:
        return sum(len(g.sample_indices) for g in (*self._queue, *(group for group, _ in self._running)))

    def add(self, request: GroupRequest) -> None:
        self._queue.append(request)

    def step(self) -> list[tuple[Trajectory, ...]]:
        busy = sum(sum(n > 0 for n in left) for _, left in self._running)
        while self._queue and busy + len(self._queue[0].sample_indices) <= self._rows:
            group = self._queue.pop(0)
            self._running.append((group, lengths(group)))
            self._began[group.group_uid] = 0 if self.version is None else self.version.version
            busy += len(group.sample_indices)
        time.sleep(self._decode_s)
        self._running = [(group, [max(n - 1, 0) for n in left]) for group, left in self._running]
        ended = [group for group, left in self._running if not any(left)]
        self._running = [(group, left) for group, left in self._running if any(left)]
        return [self._trajectories(group) for group in ended]

    def _trajectories(self, request: GroupRequest) -> tuple[Trajectory, ...]:
        version, began = 0 if self.version is None else self.version.version, self._began.pop(request.group_uid)
        none = np.zeros((0, 1), np.float32)
        return tuple(
            Trajectory(
                purpose=request.purpose, task=request.task, problem_uid=request.problem_uid,
                group_uid=request.group_uid, sample_index=index, epoch=0, run_seed=0, policy_version_min=began,
                policy_version_max=version, engine=self.name, sampling=request.sampling,
                prompt_ids=request.prompt_ids, gold_answer=request.gold_answer, latent_ids=none.astype(np.int32),
                latent_scores=none, latent_log_probs=none, hard_ids=np.full(length, index % 2, np.int32),
                hard_log_probs=np.zeros(length, np.float32), finish_reason="stop",
            )
            for index, length in zip(request.sample_indices, lengths(request), strict=True)
        )  # fmt: skip

    def partial(self, group_uid: str, position: int) -> SampleRecord | None:
        return None

    def load_weights(
        self, version: PolicyVersion, tensors: Iterable[tuple[str, torch.Tensor]], unchanged: Collection[str] = ()
    ) -> None:
        self.version = version

    def abort(self) -> None:
        self._queue, self._running, self._began = [], [], {}

    def close(self) -> None:
        self.abort()


def make_worker(name: str, in_flight: bool = False) -> RolloutWorker:
    """Makes a worker inside its actor; half of a group's samples are right."""
    return RolloutWorker(
        name,
        SleepingEngine(),
        VerifierPool(processes=1),
        lambda ids, reason: f"\\boxed{{{ids[0]}}}",
        k=1,
        run_id="bench",
        in_flight=in_flight,
    )


class SleepingLearner:
    """Implements what the controller needs of a learner; a step takes so many seconds."""

    def __init__(self, seconds: float = LEARNER_S) -> None:
        self._seconds, self._ends = seconds, 0.0

    def start_step(self, batch: Any, step: int) -> None:
        self._ends = time.monotonic() + self._seconds

    def finished(self) -> bool:
        return time.monotonic() >= self._ends

    def finish_step(self) -> dict[str, float]:
        return {}

    def publish(self, version: int) -> Publication:
        manifest = WeightManifest(version=PolicyVersion(version=version, checksum=""), buckets=())
        return Publication(manifest=manifest, buckets=())


# --- the measurement -----------------------------------------------------------------------------------------------


def run_case(pool: Pool, case: Case, steps: int, learner: SleepingLearner | None = None) -> Measured:
    """Runs the loop on a pool of sleeping workers, which forgets what was asked of it before."""
    pool.discard()
    controller = Controller(
        case.config(), pool, learner or SleepingLearner(), lambda ordinals: [_request(case, at) for at in ordinals]
    )
    controller.begin()
    for _ in range(WARM_UP + case.max_staleness):
        controller.run_step()
    taken = [controller.run_step().metrics for _ in range(steps)]
    whole = sum(metrics["time/step_s"] for metrics in taken)
    return Measured(
        case=case,
        steps=steps,
        step_s=whole / steps,
        wait_share=sum(metrics["time/rollout_wait_s"] for metrics in taken) / whole,
        staleness_mean=sum(metrics["batch/staleness_mean"] for metrics in taken) / steps,
    )


def _request(case: Case, ordinal: int) -> GroupRequest:
    return GroupRequest(
        group_uid=f"{case}/{ordinal}", problem_uid=f"simulated/{ordinal}", task="simulated",
        prompt_ids=np.zeros(1, np.int32), sample_indices=tuple(range(SAMPLES)),
        sampling=SamplingSettings(mode="visible", max_tokens=case.longest), purpose="training", epoch=0, run_seed=0,
        verifier="number", gold_answer="1",
    )  # fmt: skip


def measure(
    workers: int, steps: int, reporter: Reporter | None = None, wanted: Sequence[Case] | None = None
) -> list[Measured]:
    """Measures the `wanted` cases (default: all), one after another, with as many workers on a local Ray."""
    reporter, found, wanted = reporter or Reporter(), [], cases() if wanted is None else wanted
    rollout = {"workers": workers, "min_workers": workers, "max_rows": ROWS, "resources": {"num_cpus": 0.01}}
    config = load_config({**SETTINGS, "rollout": rollout})
    with (
        ray_session(config, reporter, "rollout") as reservation,
        reporter.phase("bench staleness", len(wanted), "cases") as advance,
    ):
        for in_flight, of_kind in groupby(wanted, lambda case: case.in_flight):
            factory = partial(make_worker, in_flight=in_flight)
            with RolloutPool(factory, config.rollout, config.deadlines, places=reservation.workers) as pool:
                for case in of_kind:
                    found.append(run_case(pool, case, steps))
                    advance(len(found))
    return found


def show(found: Sequence[Measured], console: Console | None = None) -> None:
    """Prints the table."""
    table = Table(title=f"the learner's wait, {found[0].steps} steps each; a step of the learner takes {LEARNER_S:g} s")
    for column in (
        "rollouts",
        "longest",
        "max_staleness",
        "batch_window",
        "in flight",
        "step",
        "learner waits",
        "mean staleness",
    ):
        table.add_column(column, justify="left" if column == "rollouts" else "right")
    for one in found:
        case = one.case
        table.add_row(
            case.name, f"{case.longest * DECODE_S:.1f} s", str(case.max_staleness), str(case.batch_window),
            "yes" if case.in_flight else "no",
            f"{one.step_s:.2f} s", f"{one.wait_share:.1%}", f"{one.staleness_mean:.2f}",
        )  # fmt: skip
    (console or TextConsole()).print(table)
