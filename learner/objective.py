"""METHOD §5: the clipped policy loss and the KL estimator. Pure functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PolicyLossDiagnostics:
    """Sums over the counted steps (so that micro-batches and ranks add up), and maxima; detached scalars."""

    steps: torch.Tensor  # counted steps
    ratio_sum: torch.Tensor
    ratio_max: torch.Tensor
    clipped_low: torch.Tensor  # steps where the lower clip is active
    clipped_high: torch.Tensor
    clipped_dual: torch.Tensor
    approx_kl_sum: torch.Tensor  # old - new, k1 estimator


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
    """PPO with dual clip, token mean (METHOD §5). All tensors [B, T] or flat; `mask` bool.

    ratio = exp(log_probs - old_log_probs), not clamped. `weights`: truncated importance weight per step (METHOD §6).
    `denominator`: the global number of counted steps; None: `mask.sum()`. Returns the scalar loss and diagnostics.
    """
    mask = mask.bool()
    gap = torch.where(mask, log_probs.float() - old_log_probs.detach().float(), 0.0)
    ratio = torch.exp(gap)
    advantages = advantages.detach().float()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    pessimistic = torch.maximum(plain, clipped)
    bounded = torch.minimum(pessimistic, -advantages * dual_clip)
    losses = torch.where(advantages < 0, bounded, pessimistic)
    if weights is not None:
        losses = losses * weights.detach().float()
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    loss = torch.where(mask, losses, 0.0).sum() / denominator
    with torch.no_grad():
        negative = mask & (advantages < 0)
        diagnostics = PolicyLossDiagnostics(
            steps=mask.sum(),
            ratio_sum=torch.where(mask, ratio, 0.0).sum(),
            ratio_max=torch.where(mask, ratio, 0.0).max() if ratio.numel() else ratio.new_zeros(()),
            clipped_low=(negative & (ratio < 1.0 - clip_low)).sum(),
            clipped_high=(mask & (advantages > 0) & (ratio > 1.0 + clip_high)).sum(),
            clipped_dual=(negative & (ratio > dual_clip)).sum(),
            approx_kl_sum=-gap.sum(),
        )
    return loss, diagnostics


def k3_kl(log_probs: torch.Tensor, ref_log_probs: torch.Tensor) -> torch.Tensor:
    """KL to the reference per step, k3 estimator: exp(q - p) - (q - p) - 1 >= 0, same shape (METHOD §5)."""
    gap = ref_log_probs.detach().float() - log_probs.float()
    return torch.exp(gap) - gap - 1.0
