"""The driver's side of the learner: its ranks as Ray actors, one call for all of them, a deadline on every wait.

A rank that dies breaks the process group of all: nothing is retried here. The error names the rank, and the caller
closes this group, starts a new one and loads the last checkpoint.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayActorError, RayTaskError

from common.config import RunConfig, config_as_json
from learner.rank import LearnerRank, RankGaps, RankReport
from common.weights import Publication

PEER_DEATH_S = 3.0  # a survivor's broken collective is often reported before the death that caused it


class LearnerError(RuntimeError):
    """The learner cannot go on: a rank died, raised or missed its deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerReport:
    """A step of the learner, over all ranks. Rows in the batch's order."""

    metrics: dict[str, float]
    advantages: np.ndarray  # [B] float32, without first-token selection
    mean_old_log_probs: np.ndarray  # [B] float64
    first_token: np.ndarray  # [B] bool: keeps its advantage at the first response step (METHOD §4.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """|learner - engine| of log-probs."""

    mean: float
    p99: float
    max: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """METHOD §6: tolerance on component log-probs."""

    latent: Gap
    hard: Gap


class LearnerGroup:
    """All ranks of the learner. One step at a time: :meth:`start_step`, :meth:`finished`, :meth:`finish_step`."""

    def __init__(self, config: RunConfig, model_folder: str | Path):
        self.config = config
        self.last_report: LearnerReport | None = None
        self._step: tuple[list[ray.ObjectRef], float] | None = None
        learner, resources = config.learner, config.learner.resources
        device = {"OMP_NUM_THREADS": str(resources.threads)}
        if learner.device == "cpu" or not resources.num_gpus:
            device["DS_ACCELERATOR"] = "cpu"
        actor = ray.remote(LearnerRank).options(
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            resources=resources.custom or None,
            runtime_env={"env_vars": device},
            max_restarts=0,
        )
        self._ranks = [actor.remote() for _ in range(learner.ranks)]
        try:
            (address, port), *_ = self._wait(
                [r.address.remote() for r in self._ranks], config.deadlines.start_s, "start", "deadlines.start_s"
            )
            text, world = config_as_json(config), learner.ranks
            setups = [
                rank.setup.remote(index, world, address, port, text, str(model_folder))
                for index, rank in enumerate(self._ranks)
            ]
            self._wait(setups, config.deadlines.start_s, "load the model", "deadlines.start_s")
        except BaseException:  # an interrupt too: no half-started group stays behind
            self.close()
            raise

    # -- the step

    def start_step(self, batch: pa.RecordBatch, step: int) -> None:
        """Starts a step of the run on `batch` (rows in prompt order, then sample index) and returns at once."""
        if self._step is not None:
            raise LearnerError(f"step {step} started before the last one was finished; call finish_step first")
        rows = ray.put(batch)
        refs = [rank.train_step.remote(rows, step) for rank in self._ranks]
        self._step = refs, time.monotonic() + self.config.deadlines.learner_s

    def finished(self) -> bool:
        """Whether the step is done or has failed; never waits. A missed deadline counts as failed."""
        refs, deadline = self._running()
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return len(ready) == len(refs) or time.monotonic() > deadline or any(map(_failed, ready))

    def finish_step(self) -> dict[str, float]:
        """Waits for the step and gives its metrics; the whole report is in `last_report`."""
        refs, deadline = self._running()
        self._step = None
        left = max(deadline - time.monotonic(), 0.0)
        self.last_report = summarize(self._wait(refs, left, "train", "deadlines.learner_s"))
        return self.last_report.metrics

    def train(self, batch: pa.RecordBatch, step: int) -> LearnerReport:
        """A whole step: started, waited for, reported."""
        self.start_step(batch, step)
        self.finish_step()
        return self.last_report

    def _running(self) -> tuple[list[ray.ObjectRef], float]:
        if self._step is None:
            raise LearnerError("no step was started; call start_step first")
        return self._step

    # -- self-test, weights, state

    def replay(self, batch: pa.RecordBatch) -> ReplayReport:
        """Component log-probs of recorded trajectories against the learner's own; updates nothing."""
        rows = ray.put(batch)
        gaps: list[RankGaps] = self._all("replay", rows)
        return ReplayReport(
            latent=_gap(np.concatenate([g.latent for g in gaps])), hard=_gap(np.concatenate([g.hard for g in gaps]))
        )

    def publish(self, version: int) -> Publication:
        """The current weights in the object store, checksummed. They live as long as rank 0 and the references."""
        refs = [rank.publish.remote(version) for rank in self._ranks]
        return self._wait(refs, self.config.deadlines.weights_s, "publish", "deadlines.weights_s")[0]

    def save(self, folder: str | Path) -> None:
        """Every rank's state below `folder`, which all ranks must see."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._all("save", str(folder))

    def load(self, folder: str | Path) -> None:
        self._all("load", str(folder))

    def export(self, folder: str | Path) -> None:
        """The policy as a Hugging Face model folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._all("export", str(folder))

    def close(self) -> None:
        """Ends the ranks; may be called twice."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []

    def _all(self, method: str, *arguments) -> list:
        refs = [getattr(rank, method).remote(*arguments) for rank in self._ranks]
        return self._wait(refs, self.config.deadlines.learner_s, method, "deadlines.learner_s")

    def _wait(self, refs: list[ray.ObjectRef], seconds: float, doing: str, key: str) -> list:
        """Results of all ranks. The first failure ends the wait: the others may hang in a collective."""
        deadline, pending = time.monotonic() + seconds, list(refs)
        while pending:
            ready, pending = ray.wait(pending, timeout=max(deadline - time.monotonic(), 0.0))
            if not ready:
                late = [index for index, ref in enumerate(refs) if ref in pending]
                needs = self.config.learner.resources
                raise LearnerError(
                    f"learner rank(s) {late} did not {doing} within {seconds:g} s ({key}); each needs "
                    f"{needs.num_cpus:g} CPU and {needs.num_gpus:g} GPU, the cluster has free: {_free()}"
                )
            if error := _failed(ready[0]):
                raise self._explained(refs, doing, refs.index(ready[0]), error) from error
        return ray.get(refs, timeout=60)

    def _explained(self, refs: list[ray.ObjectRef], doing: str, rank: int, error: Exception) -> LearnerError:
        """Names the death behind a survivor's error, if there was one."""
        if not isinstance(error, RayActorError):
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=PEER_DEATH_S)
            for ref in ready:
                if isinstance(other := _failed(ref), RayActorError):
                    rank, error = refs.index(ref), other
        if isinstance(error, RayActorError):
            return LearnerError(
                f"learner rank {rank} died while it was to {doing} ({error}); its memory or its node may be exhausted. "
                "Its peers cannot go on without it: start the learner again and load the last checkpoint"
            )
        cause = error.cause if isinstance(error, RayTaskError) else error
        return LearnerError(f"learner rank {rank} failed to {doing}: {type(cause).__name__}: {cause}")


def _failed(ref: ray.ObjectRef) -> Exception | None:
    """The error of a finished call, or None."""
    try:
        ray.get(ref, timeout=60)
    except (RayActorError, RayTaskError) as error:
        return error
    return None


def _free() -> str:
    return ", ".join(f"{name} {ray.available_resources().get(name, 0):g}" for name in ("CPU", "GPU"))


# --- metrics -----------------------------------------------------------------------------------------------------


def summarize(ranks: list[RankReport]) -> LearnerReport:
    """The ranks' reports as one."""
    first = ranks[0]
    updates = list(zip(*(r.updates for r in ranks), strict=True))  # [updates][ranks]
    ratios = np.concatenate([u.ratios for r in ranks for u in r.updates] or [np.zeros(0, np.float32)])
    steps = max(ratios.size, 1)
    drift = _gap(np.concatenate([r.drift for r in ranks]))
    norms = [u[0].grad_norm for u in updates if u[0].applied]
    metrics = {
        "learner/loss": _mean([sum(u.loss for u in of_ranks) for of_ranks in updates]),
        "learner/kl": _mean([sum(u.kl for u in of_ranks) for of_ranks in updates]),
        "learner/grad_norm": _mean(norms),
        "learner/updates": float(len(updates)),
        "learner/skipped_updates": float(len(updates) - len(norms)),
        "learner/learning_rate": first.learning_rate,
        "learner/ratio_mean": _mean(ratios),
        "learner/ratio_p99": _quantile(ratios),
        "learner/ratio_max": float(ratios.max(initial=0.0)),
        "learner/clip_fraction_low": sum(u.clipped_low for r in ranks for u in r.updates) / steps,
        "learner/clip_fraction_high": sum(u.clipped_high for r in ranks for u in r.updates) / steps,
        "learner/clip_fraction_dual": sum(u.clipped_dual for r in ranks for u in r.updates) / steps,
        "learner/drift_mean": drift.mean,
        "learner/drift_p99": drift.p99,
        "learner/drift_max": drift.max,
        "learner/latent_mass": _mean(np.concatenate([r.latent_mass for r in ranks])),
        "learner/hard_log_prob": _mean(np.concatenate([r.hard_log_probs for r in ranks])),
        "learner/first_token_share": float(first.first_token.mean()),
        "learner/advantage_abs": float(np.abs(first.advantages).mean()),
        "learner/steps": float(drift.count),
        "learner/seconds": max(r.seconds for r in ranks),
    }
    return LearnerReport(
        metrics=metrics,
        advantages=first.advantages,
        mean_old_log_probs=first.mean_old_log_probs,
        first_token=first.first_token,
    )


def _gap(values: np.ndarray) -> Gap:
    return Gap(mean=_mean(values), p99=_quantile(values), max=float(values.max(initial=0.0)), count=int(values.size))


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _quantile(values: np.ndarray) -> float:
    return float(np.quantile(values, 0.99)) if values.size else 0.0
