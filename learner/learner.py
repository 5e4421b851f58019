"""The learner of a run: it drives all ranks together and merges their reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from latent_grpo.common.agreement import Gap
from latent_grpo.common.config import RunConfig
from latent_grpo.learner.cost import PARTS
from latent_grpo.learner.gaps import ReplayReport, summarize_gaps
from latent_grpo.learner.group import LearnerError, RankGroup
from latent_grpo.learner.rank import STEP_KINDS, LearnerRank, RankReport
from latent_grpo.learner.recorder import RowFacts, UpdateOutcome, assemble

__all__ = ["LearnerError", "LearnerGroup", "LearnerReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerReport:
    """The report of a step over all ranks, with rows in the batch's order."""

    metrics: dict[str, float]
    advantages: np.ndarray  # [B] float32, without first-token selection
    mean_old_log_probs: np.ndarray  # [B] float64
    first_token: np.ndarray  # [B] bool: keeps its advantage at the first response step (METHOD §4.2)
    bad_rows: tuple[int, ...]  # rows with a log-prob that is not a number
    updates: tuple[UpdateOutcome, ...]
    records: pa.RecordBatch | None  # learner records of the batch's rows, for a step whose dump is due


class LearnerGroup(RankGroup):
    """The run's ranks, one step at a time: :meth:`start_step`, :meth:`finished`, :meth:`finish_step`."""

    def __init__(self, config: RunConfig, model_folder: str | Path, places: Sequence[Any] = ()):
        self.last_report: LearnerReport | None = None
        self._training: pa.RecordBatch | None = None
        super().__init__(LearnerRank, config, model_folder, places)

    def start_step(self, batch: pa.RecordBatch, step: int) -> None:
        """Starts a step of the run on `batch` (rows in prompt order, then sample index) and returns at once.

        `step` is the number of steps done before. Learner records are made if the dump of the step is due.
        """
        self._training = batch
        self._begin("train_step", self._put(batch), step, self.config.dump_due(step + 1))

    def finish_step(self) -> dict[str, float]:
        """Waits for the step and returns its metrics; the whole report is in `last_report`."""
        return self._report().metrics

    def _report(self) -> LearnerReport:
        ranks: list[RankReport] = self._finish()
        report = summarize(ranks)
        shares = [rank.records for rank in ranks if rank.records is not None]
        if shares and self._training is not None:
            report = replace(report, records=_records(ranks[0], shares, self._training, report.updates, self.config))
        self.last_report = report
        return report

    def train(self, batch: pa.RecordBatch, step: int) -> LearnerReport:
        """Runs a whole step and returns its report."""
        self.start_step(batch, step)
        return self._report()

    def replay(self, batch: pa.RecordBatch) -> ReplayReport:
        """Compares the component log-probs of recorded trajectories with the learner's own; updates nothing."""
        return summarize_gaps(self._all("replay", self._put(batch)))


# --- metrics -----------------------------------------------------------------------------------------------------


def summarize(ranks: list[RankReport]) -> LearnerReport:
    """Merges the ranks' reports into one, without learner records."""
    first = ranks[0]
    updates = list(zip(*(r.updates for r in ranks), strict=True))  # [updates][ranks]
    outcomes = tuple(
        UpdateOutcome(loss=sum(u.loss for u in of), grad_norm=of[0].grad_norm, applied=of[0].applied) for of in updates
    )
    ratios = np.concatenate([u.ratios for r in ranks for u in r.updates] or [np.zeros(0, np.float32)])
    steps = max(ratios.size, 1)
    drift = Gap.of(np.concatenate([r.drift for r in ranks]))
    latent_gap = Gap.of(np.concatenate([r.latent_gap for r in ranks]))
    hard_gap = Gap.of(np.concatenate([r.hard_gap for r in ranks]))
    norms = [u.grad_norm for u in outcomes if u.applied]
    metrics = {
        "learner/loss": _mean([u.loss for u in outcomes]),
        "learner/kl": _mean([sum(u.kl for u in of_ranks) for of_ranks in updates]),
        "learner/grad_norm": _mean(norms),
        "learner/updates": float(len(updates)),
        "learner/skipped_updates": float(len(updates) - len(norms)),
        "learner/bad_updates_in_a_row": float(max((u.bad_in_a_row for u in first.updates), default=0)),
        "learner/learning_rate": first.learning_rate,
        "learner/ratio_mean": _mean(ratios),
        "learner/ratio_p01": _quantile(ratios, 0.01),
        "learner/ratio_p50": _quantile(ratios, 0.5),
        "learner/ratio_p99": _quantile(ratios),
        "learner/ratio_max": float(ratios.max(initial=0.0)),
        "learner/flip_share": _mean([share for r in ranks for u in r.updates for share in u.flip_shares]),
        "learner/clip_fraction_low": sum(u.clipped_low for r in ranks for u in r.updates) / steps,
        "learner/clip_fraction_high": sum(u.clipped_high for r in ranks for u in r.updates) / steps,
        "learner/clip_fraction_dual": sum(u.clipped_dual for r in ranks for u in r.updates) / steps,
        "learner/drift_mean": drift.mean,
        "learner/drift_p99": drift.p99,
        "learner/drift_max": drift.max,
        "learner/latent_gap_mean": latent_gap.mean,
        "learner/latent_gap_p99": latent_gap.p99,
        "learner/hard_gap_mean": hard_gap.mean,
        "learner/hard_gap_p99": hard_gap.p99,
        "learner/latent_mass": _mean(np.concatenate([r.latent_mass for r in ranks])),
        "learner/hard_log_prob": _mean(np.concatenate([r.hard_log_probs for r in ranks])),
        "learner/first_token_share": float(first.first_token.mean()),
        "learner/advantage_abs": float(np.abs(first.advantages).mean()),
        "learner/steps": float(sum(r.latent_mass.size + r.hard_log_probs.size for r in ranks)),
        "learner/seconds": max(r.seconds for r in ranks),
        **{f"learner/{part}_s": max(r.cost.seconds[part] for r in ranks) for part in PARTS},
        "learner/tokens_per_s": first.tokens / max(max(r.seconds for r in ranks), 1e-9),
        "learner/real_token_share": sum(r.cost.real for r in ranks) / max(sum(r.cost.computed for r in ranks), 1),
    }
    if first.peak is not None:
        spent = sum(r.seconds for r in ranks)
        metrics["learner/mfu"] = sum(r.cost.flops for r in ranks) / max(spent, 1e-9) / first.peak
    metrics |= _by_kind(ranks)
    weights = np.concatenate([r.importance for r in ranks])
    if weights.size:
        metrics["learner/importance_mean"] = float(weights.mean())
        metrics["learner/importance_masked_share"] = float((weights == 0).mean())
    uncentered = np.concatenate([r.uncentered for r in ranks])
    if uncentered.size:
        metrics["learner/uncentered_share"] = _mean(uncentered)
    return LearnerReport(
        metrics=metrics,
        advantages=first.advantages,
        mean_old_log_probs=first.mean_old_log_probs,
        first_token=first.first_token,
        bad_rows=tuple(sorted({row for r in ranks for u in r.updates for row in u.bad_rows})),
        updates=outcomes,
        records=None,
    )


def _by_kind(ranks: list[RankReport]) -> dict[str, float]:
    """Returns the log-prob gaps of the kinds of steps that there are (`learner.rank.STEP_KINDS`)."""
    drift, kinds = np.concatenate([r.drift for r in ranks]), np.concatenate([r.kinds for r in ranks])
    found: dict[str, float] = {}
    for index, kind in enumerate(STEP_KINDS):
        if (kinds == index).any():
            gap = Gap.of(drift[kinds == index])
            found |= {f"learner/drift_{kind}_mean": gap.mean, f"learner/drift_{kind}_p99": gap.p99}
    return found


def _records(
    first: RankReport,
    shares: list[pa.RecordBatch],
    batch: pa.RecordBatch,
    updates: tuple[UpdateOutcome, ...],
    config: RunConfig,
) -> pa.RecordBatch:
    return assemble(
        batch,
        shares,
        RowFacts(
            advantages=first.advantages,
            mean_old_log_probs=first.mean_old_log_probs,
            keeps_first=first.first_token,
        ),
        list(updates),
        minibatch_prompts=config.minibatch_prompts,
        masking=config.objective.masking,
        first_token=config.objective.first_token,
    )


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _quantile(values: np.ndarray, share: float = 0.99) -> float:
    return float(np.quantile(values, share)) if values.size else 0.0
