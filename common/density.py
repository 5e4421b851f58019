"""The surrogate log-density of a latent step, its straight-through flip, and a hard step's log-prob (METHOD §3)."""

from __future__ import annotations

from typing import Literal

import torch

Flip = Literal["reference", "sign", "off"]
FLIPS = ("reference", "sign", "off")


def surrogate_log_prob(
    log_probs: torch.Tensor,
    scores: torch.Tensor,
    *,
    advantages: torch.Tensor | None = None,
    component_weights: torch.Tensor | None = None,
    flip: Flip = "reference",
) -> torch.Tensor:
    """Returns log pi of latent steps from their components (METHOD §3.1): [N] float32.

    `log_probs` [N, K]: log p_theta(s_k) at temperature 1; `scores` [N, K]: the recorded r_k, constant in the gradient.
    With d_k = r_k - log p_theta(s_k), the surrogate is the standard Gumbel log-density -d_k - exp(-d_k).
    `component_weights` [N, K]: c_k, constant in the gradient; None: uniform 1/K.
    `advantages` [N] turns on the straight-through flip (METHOD §3.2) for components with A <= 0 and d_k < 0: the value
    stays, the gradient is that of the proxy named by `flip`. None: no flip (old, reference and KL log-probs).
    Raises ValueError for an unknown `flip`.
    """
    if flip not in FLIPS:
        raise ValueError(f"flip must be one of {', '.join(FLIPS)}, got {flip!r}")
    d = scores.detach().float() - log_probs.float()
    if advantages is None or flip == "off":
        surrogate = -d - torch.exp(-d)
    else:
        turned = (advantages.unsqueeze(-1) <= 0) & (d < 0)
        # Each formula gets only its own d: the other's exp could overflow, and inf * 0 is NaN in a gradient
        straight = torch.where(turned, d.detach(), d)
        negative = torch.where(turned, d, 0.0)
        proxy = negative - torch.exp(negative) if flip == "reference" else torch.exp(negative) - negative
        surrogate = -straight - torch.exp(-straight) + (proxy - proxy.detach())
    if component_weights is None:
        return surrogate.mean(-1)
    return (surrogate * component_weights.detach().float()).sum(-1)


def latent_log_prob(
    logits: torch.Tensor,
    ids: torch.Tensor,
    scores: torch.Tensor,
    *,
    advantages: torch.Tensor | None = None,
    component_weights: torch.Tensor | None = None,
    flip: Flip = "reference",
) -> torch.Tensor:
    """Returns :func:`surrogate_log_prob` of `logits` [N, V] and selected `ids` [N, K] (log p at temperature 1): [N]."""
    logits = logits.float()
    log_probs = logits.gather(-1, ids.long()) - logits.logsumexp(-1, keepdim=True)
    return surrogate_log_prob(log_probs, scores, advantages=advantages, component_weights=component_weights, flip=flip)


def hard_log_prob(logits: torch.Tensor, ids: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """Returns log_softmax(logits / temperature)[id] over all V (METHOD §3.3), [N] float32.

    `logits` [N, V], `ids` [N]. `temperature` is the rollout's, a number or [N].
    """
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.float().unsqueeze(-1) if temperature.ndim == 1 else temperature.float()
    scaled = logits.float() / temperature
    return scaled.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)
