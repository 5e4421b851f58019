"""How far a learner's log-probs may lie from the recorded ones of the engine (METHOD §6).

Self-test, metrics and alarms speak of the same quantity, |log p_learner - log p_engine| of single components: K of a
latent step, one of a hard step. The limits are measured, docs/numerics.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    "float32": Tolerance(mean=1e-4, p99=1e-3, max=1e-3),
    "bfloat16": Tolerance(mean=0.05, p99=0.25, max=math.inf),
}
"""By `model.dtype`. A model of 135 M parameters after Latent-SFT has, in the worst of many self-tests, 4e-6 (mean) and
5e-5 (max) in float32, 0.029 (mean) and 0.14 (p99) in bfloat16; with logits rounded to bfloat16 it would have 0.064 and
0.23, and whole steps would differ by more than a policy clip (docs/numerics.md)."""
ROUNDING_STEPS = 4
"""The p99 of a gap that rounding alone can explain, in distances of neighbouring numbers at the logits' size. Measured:
0.4 of one after Latent-SFT, 2 where a model reads mixtures that it was not trained on."""


def tolerance_of(dtype: str, mean: float | str | None) -> Tolerance:
    """Returns the bounds for a dtype.

    `mean` is `health.max_log_prob_gap`: a number is the bound of the mean and scales the others alike.
    """
    found = TOLERANCES[dtype]
    if not isinstance(mean, float):
        return found
    scale = mean / found.mean
    return Tolerance(mean=mean, p99=found.p99 * scale, max=found.max * scale if scale else 0.0)


def spacing(dtype: str, size: float) -> float:
    """Returns the distance of neighbouring numbers of `dtype` at `size`: 0.25 in bfloat16 at 36."""
    if not (math.isfinite(size) and size):
        return 0.0
    return math.ldexp(1.0, math.frexp(abs(size))[1] - 1 - MANTISSA_BITS[dtype])


def looks_like_rounding(gap: Gap, dtype: str, largest_logit: float) -> bool:
    """Whether a gap can come from rounding alone, by the distance of the dtype's numbers at the logits' size.

    Its mean must be within one of them, and nearly all of it within `ROUNDING_STEPS`. `largest_logit` is the mean over
    steps of the largest logit's size. Other weights, another mask or another position differ by whole nats.
    """
    step = spacing(dtype, largest_logit)
    return gap.mean <= step and gap.p99 <= ROUNDING_STEPS * step
