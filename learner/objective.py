"""The clipped policy loss and the KL estimator (METHOD §5). Pure functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PolicyLossDiagnostics:
    """Sums over the counted steps, so that micro-batches and ranks add up; detached scalars."""

    steps: torch.Tensor  # counted steps
    clipped_low: torch.Tensor  # steps with A < 0 whose gradient the lower clip sets to 0
    clipped_high: torch.Tensor  # steps with A > 0 whose gradient the upper clip sets to 0
    clipped_dual: torch.Tensor  # steps with A < 0 whose loss the dual clip bounds


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    weights: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, PolicyLossDiagnostics]:
    """PPO with dual clip, token mean (METHOD §5). All tensors of one shape, [B, T] or flat; `mask` bool.

    Per step, with ratio = exp(log_probs - old_log_probs), not clamped: max(-A ratio, -A clip(ratio, 1 - clip_low,
    1 + clip_high)), and for A < 0 at most -A dual_clip. `weights` holds truncated importance weights per step
    (METHOD §6). `denominator` is the global number of counted steps, `mask.sum()` by default. Steps outside of `mask`
    may hold any value.
    Returns the scalar loss and diagnostics. Raises ValueError for clip bounds that contradict each other.
    """
    if not (0 <= clip_low < 1 and clip_high >= 0 and dual_clip >= 1 + clip_high):
        raise ValueError(
            f"clipping must have 0 <= clip_low < 1, clip_high >= 0 and dual_clip >= 1 + clip_high, "
            f"got {clip_low}, {clip_high}, {dual_clip}"
        )
    mask = mask.bool()
    advantages = torch.where(mask, advantages.detach().float(), 0.0)
    gap = torch.where(mask, log_probs.float() - old_log_probs.detach().float(), 0.0)
    with torch.no_grad():
        ratio = torch.exp(gap)
        codes = clip_codes(ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
        low, high, dual = codes == 1, codes == 2, codes == 3
        bound = torch.where(low, 1.0 - clip_low, torch.where(high, 1.0 + clip_high, dual_clip))
        constant = low | high | dual | (advantages == 0)
        bound = torch.where(advantages == 0, 1.0, bound)
    # A step without gradient never reaches the exponential: a ratio that overflows there would turn 0 * inf into NaN
    losses = -advantages * torch.where(constant, bound, torch.exp(torch.where(constant, 0.0, gap)))
    if weights is not None:
        weights = torch.where(mask, weights.detach().float(), 0.0)
        losses = losses * weights
    steps = mask.sum()
    loss = losses.sum() / (steps.clamp(min=1) if denominator is None else denominator)
    diagnostics = PolicyLossDiagnostics(
        steps=steps,
        clipped_low=low.sum(),
        clipped_high=high.sum(),
        clipped_dual=dual.sum(),
    )
    return loss, diagnostics


def importance_weights(gap: torch.Tensor, mode: str, floor: float, cap: float) -> torch.Tensor | None:
    """Returns the weight of each step's loss for a policy that differs from the rollout's, or None (METHOD §6).

    `gap` [...] = log pi_old - log pi_behaviour. `truncate`: exp(gap), at most `cap`. `mask`: exp(gap) where it lies in
    [floor, cap], else 0, so that a step on which the two policies disagree teaches nothing. `off`: None.
    """
    if mode == "off":
        return None
    ratio = torch.exp(gap)
    if mode == "truncate":
        return ratio.clamp(max=cap)
    return torch.where((ratio >= floor) & (ratio <= cap), ratio, 0.0)


def clip_codes(
    ratio: torch.Tensor, advantages: torch.Tensor, *, clip_low: float, clip_high: float, dual_clip: float
) -> torch.Tensor:
    """Returns which bound stops a step's gradient, int8, same shape: 0 none, 1 low, 2 high, 3 dual (METHOD §5)."""
    negative = (advantages < 0).to(torch.int8)
    low, dual = ratio < 1.0 - clip_low, ratio > dual_clip
    high = (advantages > 0) & (ratio > 1.0 + clip_high)
    return negative * low + 3 * negative * dual + 2 * high.to(torch.int8)


def k3_kl(log_probs: torch.Tensor, ref_log_probs: torch.Tensor) -> torch.Tensor:
    """KL to the reference per step, k3 estimator: exp(q - p) - (q - p) - 1 >= 0, same shape (METHOD §5).

    p = `log_probs` of the policy, which gets the gradient 1 - exp(q - p); q = `ref_log_probs`.
    """
    gap = ref_log_probs.detach().float() - log_probs.float()
    return torch.expm1(gap) - gap
