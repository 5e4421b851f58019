"""How far a learner's log-probs may lie from the recorded ones of the engine (METHOD §6).

Self-test, metrics and alarms speak of the same quantity, |log p_learner - log p_engine| of single components: K of a
latent step, one of a hard step. The limits are measured, docs/numerics.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

MANTISSA_BITS = {"float32": 23, "bfloat16": 7}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Statistics of |log p_learner - log p_engine| over components."""

    mean: float
    p99: float
    max: float
    count: int

    @classmethod
    def of(cls, values: np.ndarray) -> Gap:
        """Summarises the gaps of any number of components; of none they are 0."""
        if not values.size:
            return cls(mean=0.0, p99=0.0, max=0.0, count=0)
        p99 = float(np.quantile(values, 0.99))
        return cls(mean=float(values.mean()), p99=p99, max=float(values.max()), count=int(values.size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Upper bounds on a gap."""

    mean: float
    p99: float
    max: float

    def exceeded(self, gap: Gap) -> str | None:
        """Returns the first statistic that is above its bound, or None; a NaN is above any bound."""
        return next((name for name in ("max", "p99", "mean") if not getattr(gap, name) <= getattr(self, name)), None)


TOLERANCES = {
    "float32": Tolerance(mean=1e-3, p99=1e-3, max=1e-3),
    "bfloat16": Tolerance(mean=0.02, p99=0.2, max=math.inf),
}
"""By `model.dtype`. METHOD §6."""


def tolerance_of(dtype: str, mean: float | str | None) -> Tolerance:
    """Returns the bounds for a dtype; `mean` is `health.max_log_prob_gap`, whose number replaces that of the mean."""
    found = TOLERANCES[dtype]
    return replace(found, mean=mean) if isinstance(mean, float) else found


def spacing(dtype: str, size: float) -> float:
    """Returns the distance of neighbouring numbers of `dtype` at `size`: 0.25 in bfloat16 at 36."""
    if not (math.isfinite(size) and size):
        return 0.0
    return math.ldexp(1.0, math.frexp(abs(size))[1] - 1 - MANTISSA_BITS[dtype])


def looks_like_rounding(gap: Gap, dtype: str, largest_logit: float) -> bool:
    """Whether a gap can come from rounding alone: nearly all of it is within the dtype's spacing at the logits' size.

    `largest_logit` is the mean over steps of the largest logit's size. Other weights, another mask or another position
    differ by whole nats at most steps.
    """
    return gap.p99 <= spacing(dtype, largest_logit)
