"""The section that ends a run on a metric, and the names of the metrics that a run can be judged by.

A name is that of the display: `rollout/reward` of every step; `evaluation/TASK/pass_at_1` of every evaluation, and
`evaluation/pass_at_1` for the mean over its tasks.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from latent_grpo.common.config.section import Section

EVALUATION = "evaluation/"  # begins the name of a metric of evaluations
RISING = ("pass_at_1", "mean_reward")  # figures of an evaluation of which more is better
FIGURES = (*RISING, "chain_length", "latent_length", "invalid_rate")
STEP_METRICS = (
    "rollout/reward", "rollout/steps", "rollout/latent_steps", "rollout/latent_share", "rollout/invalid_share",
    "rollout/truncated_share", "latent/thinking_end_rate", "latent/effective_width", "latent/entropy",
    "batch/zero_variance_share", "learner/kl", "learner/grad_norm", "learner/drift_mean", "learner/ratio_p99",
)  # fmt: skip
"""Metrics of a step that say where a run stands; `latent/` and `latent_share` are of latent algorithms only."""


class StopConfig(Section):
    """Once the metric is `above` (or `below`) a value, `for` so many of its measurements in a row, the run ends as
    after its last step: with evaluation, export and report."""

    metric: str
    """Metric: `evaluation/pass_at_1` (the mean over the evaluation tasks), `evaluation/TASK/pass_at_1`, another figure
    of an evaluation, or a metric of every step such as `rollout/reward`."""
    above: float | None = None
    """Value that the metric must exceed; exactly one of `above` and `below` is given."""
    below: float | None = None
    """Value that the metric must be smaller than."""
    times: Annotated[PositiveInt, Field(alias="for")] = 1
    """Number of measurements in a row that must be so: evaluations, or steps."""

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.above is None) == (self.below is None):
            given = "both" if self.above is not None else "neither"
            raise ValueError(f"exactly one of above and below must be given, got {given}")
        return self

    def met(self, value: float) -> bool:
        """Whether one measurement is beyond the bound; NaN is not."""
        return value > self.above if self.above is not None else self.below is not None and value < self.below

    @property
    def sentence(self) -> str:
        """`evaluation/pass_at_1 above 0.9 for 3 in a row`."""
        bound = f"above {self.above:g}" if self.above is not None else f"below {self.below:g}"
        return f"{self.metric} {bound}" + (f" for {self.times} in a row" if self.times > 1 else "")


def evaluation_metrics(tasks: Sequence[str], figures: Sequence[str] = FIGURES) -> list[str]:
    """Returns the names of an evaluation's metrics, the means over its tasks first."""
    return [f"{EVALUATION}{task}{figure}" for task in ("", *(f"{name}/" for name in tasks)) for figure in figures]


def metric_problem(key: str, metric: str, known: Sequence[str]) -> str | None:
    """Returns why `metric` cannot be the value of a key, with the nearest names that can, or None."""
    if metric in known:
        return None
    close = difflib.get_close_matches(metric, known, n=3) or list(known)[:3]
    return f"{key}: no metric {metric!r} in this run; the nearest: {', '.join(close)}"
