"""The learner of the run: its ranks as one thing, and their reports as one report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

from common.config import RunConfig
from learner.group import LearnerError, RankGroup
from learner.rank import LearnerRank, RankGaps, RankReport

__all__ = ["Gap", "LearnerError", "LearnerGroup", "LearnerReport", "ReplayReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerReport:
    """A step of the learner, over all ranks. Rows in the batch's order."""

    metrics: dict[str, float]
    advantages: np.ndarray  # [B] float32, without first-token selection
    mean_old_log_probs: np.ndarray  # [B] float64
    first_token: np.ndarray  # [B] bool: keeps its advantage at the first response step (METHOD §4.2)
    bad_rows: tuple[int, ...]  # rows with a log-prob that is not a number


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


class LearnerGroup(RankGroup):
    """One step at a time: :meth:`start_step`, :meth:`finished`, :meth:`finish_step`."""

    def __init__(self, config: RunConfig, model_folder: str | Path):
        self.last_report: LearnerReport | None = None
        super().__init__(LearnerRank, config, model_folder)

    def start_step(self, batch: pa.RecordBatch, step: int) -> None:
        """Starts a step of the run on `batch` (rows in prompt order, then sample index) and returns at once."""
        self._begin("train_step", ray.put(batch), step)

    def finish_step(self) -> dict[str, float]:
        """Waits for the step and gives its metrics; the whole report is in `last_report`."""
        self.last_report = summarize(self._finish())
        return self.last_report.metrics

    def train(self, batch: pa.RecordBatch, step: int) -> LearnerReport:
        """A whole step: started, waited for, reported."""
        self.start_step(batch, step)
        self.finish_step()
        return self.last_report

    def replay(self, batch: pa.RecordBatch) -> ReplayReport:
        """Component log-probs of recorded trajectories against the learner's own; updates nothing."""
        gaps: list[RankGaps] = self._all("replay", ray.put(batch))
        return ReplayReport(
            latent=_gap(np.concatenate([g.latent for g in gaps])), hard=_gap(np.concatenate([g.hard for g in gaps]))
        )


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
        bad_rows=tuple(sorted({row for r in ranks for u in r.updates for row in u.bad_rows})),
    )


def _gap(values: np.ndarray) -> Gap:
    return Gap(mean=_mean(values), p99=_quantile(values), max=float(values.max(initial=0.0)), count=int(values.size))


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _quantile(values: np.ndarray) -> float:
    return float(np.quantile(values, 0.99)) if values.size else 0.0
