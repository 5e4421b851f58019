"""The self-test at the start of a run: the learner computes the log-probs of a few rollouts again (METHOD §6)."""

from __future__ import annotations

from typing import Protocol

import pyarrow as pa

from latent_grpo.common.agreement import TOLERANCES, Gap, Tolerance, looks_like_rounding, spacing, tolerance_of
from latent_grpo.common.schema import concat
from latent_grpo.deploy.controller import TrainingStopped, gather
from latent_grpo.deploy.run.session import Run
from latent_grpo.learner.gaps import ReplayReport


class SelfTestFailed(TrainingStopped):
    """The learner does not compute the policy that the engine sampled from, so training would be wrong silently."""


class Replaying(Protocol):
    """A learner that computes recorded trajectories again (`learner.learner.LearnerGroup`)."""

    def replay(self, batch: pa.RecordBatch) -> ReplayReport:
        """Replays trajectories without training and returns how far the log-probs are apart."""


def self_test(run: Run, learner: Replaying) -> None:
    """Replays a few rollouts in the learner. Raises :class:`SelfTestFailed` if log-probs differ (METHOD §6)."""
    if not run.config.self_test_groups:
        return
    requests = run.problems.requests(range(run.config.self_test_groups), "self_test")
    report = learner.replay(concat(gather(run.pool, requests)))
    run.metrics.write(0, _metrics(report), kind="self_test", lineage=run.lineage)
    dtype = run.config.model.dtype
    tolerance = tolerance_of(dtype, run.config.health.max_log_prob_gap)
    for name, gap in (("latent", report.latent), ("hard", report.hard)):
        if (statistic := tolerance.exceeded(gap)) is not None:
            raise SelfTestFailed(_sentence(name, gap, statistic, tolerance, dtype, report.largest_logit))
    usual = TOLERANCES[dtype].mean
    if tolerance.mean > usual:
        run.reporter.say(
            f"[yellow]self-test: health.max_log_prob_gap ({tolerance.mean:g}) allows {tolerance.mean / usual:,.3g} "
            f"times the usual gaps in {dtype} ({usual:g} on average); auto holds those[/]"
        )
    run.reporter.say(
        f"self-test: learner and engine agree (gap of log-probs, mean and largest: latent {report.latent.mean:.1e}, "
        f"{report.latent.max:.1e}; hard {report.hard.mean:.1e}, {report.hard.max:.1e})"
    )


def _sentence(name: str, gap: Gap, statistic: str, tolerance: Tolerance, dtype: str, largest_logit: float) -> str:
    limit = getattr(tolerance, statistic)
    found = (
        f"self-test: the learner's log-probs of {gap.count} {name} components differ from the engine's by "
        f"{getattr(gap, statistic):.3g} ({statistic}; mean {gap.mean:.3g}, p99 {gap.p99:.3g}), allowed in {dtype}: "
        f"{limit:g} ({statistic}). "
    )
    if looks_like_rounding(gap, dtype, largest_logit):
        return found + (
            f"That looks like rounding and not like another model: 99 % of the gaps are below {gap.p99:.3g}, and "
            f"{dtype} numbers are {spacing(dtype, largest_logit):.3g} apart at the size of these logits "
            f"({largest_logit:.0f}). Set model.dtype to float32, give a model without a latent start one (warm_start), "
            "or raise health.max_log_prob_gap, the bound of the mean, knowing that; docs/numerics.md says what is usual"
        )
    return found + (
        "Training would optimise another policy than the one that samples; check that both load the same model, and "
        "run `latent-grpo doctor`"
    )


def _metrics(report: ReplayReport) -> dict[str, float]:
    pairs = (("latent", report.latent), ("hard", report.hard))
    gaps = {f"{kind}_{s}": getattr(gap, s) for kind, gap in pairs for s in ("mean", "p99", "max", "count")}
    return gaps | {"largest_logit": report.largest_logit}
