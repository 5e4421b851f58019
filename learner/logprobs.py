"""Log-probs of selected ids without the [positions, V] matrix (METHOD §3).

Only one chunk of float32 logits is alive at a time. With a gradient, each chunk is a checkpoint that is computed again
in the backward pass; under an output layer that is not trained it need not be (:class:`_UnderFrozenHead`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from latent_grpo.common.density import Flip, surrogate_log_prob
from latent_grpo.common.head import Float32Head, float32_logits

if TYPE_CHECKING:
    from latent_grpo.learner.batching import ReplayInputs
    from latent_grpo.learner.centering import OtherDraws


def selected_log_probs(
    head: nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    temperatures: torch.Tensor,
    chunks: int,
    visit: Callable[[slice, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """log_softmax(head(hidden) / temperature)[ids] over all V, float32: [N, W].

    `hidden` [N, D], `ids` [N, W], `temperatures` [N]. The head is called exactly `chunks` times, on no rows if need be,
    since with ZeRO-3 each call is a collective. `visit(piece, logits)` gets each chunk's logits [n, V], divided by the
    temperatures; there is no gradient then.
    """
    size = max(-(-len(hidden) // chunks), 1)
    frozen, parts = _is_frozen(head), []
    for index in range(chunks):
        piece = slice(index * size, (index + 1) * size)
        arguments = (head, hidden[piece], ids[piece], temperatures[piece])
        if visit is not None:
            with torch.no_grad():
                logits = _logits(head, hidden[piece], temperatures[piece])
                visit(piece, logits)
                parts.append(_selected(logits, ids[piece]))
        elif torch.is_grad_enabled() and frozen:
            parts.append(_UnderFrozenHead.apply(*arguments))  # type: ignore[no-untyped-call]  # torch
        elif torch.is_grad_enabled():
            parts.append(checkpoint(_chunk, *arguments, use_reentrant=False))
        else:
            parts.append(_chunk(*arguments))
    return torch.cat(parts)


def _chunk(head: nn.Module, hidden: torch.Tensor, ids: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    return _selected(_logits(head, hidden, temperatures), ids)


def _logits(head: nn.Module, hidden: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    # in place: a second copy would double the peak
    return float32_logits(head, hidden).div_(temperatures.unsqueeze(-1))


def _is_frozen(head: nn.Module) -> bool:
    """Whether the layer is one whose rows are at hand in the backward pass too, and never change."""
    if not isinstance(head, Float32Head) or any(p.requires_grad for p in head.parameters()):
        return False
    return not hasattr(head.weight, "ds_id")  # ZeRO-3 has them within a call of the layer only


class _UnderFrozenHead(torch.autograd.Function):
    """Log-probs whose gradient needs no logits: d log p[i] / d hidden = (W[i] - sum_v p[v] W[v]) / temperature.

    The sum, a row of the layer as the policy expects it, is computed with the log-probs: [n, D] float32 is all that is
    kept. That is a product less than a checkpoint takes, which computes the logits twice.
    """

    @staticmethod
    def forward(
        ctx: Any, head: Float32Head, hidden: torch.Tensor, ids: torch.Tensor, temperatures: torch.Tensor
    ) -> torch.Tensor:
        logits = _logits(head, hidden, temperatures)
        normaliser = logits.logsumexp(-1, keepdim=True)
        selected = logits.gather(-1, ids) - normaliser
        ctx.head, ctx.dtype = head, hidden.dtype
        ctx.save_for_backward(head.expected_rows(logits.sub_(normaliser).exp_()), ids, temperatures)
        return selected

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:
        expected, ids, temperatures = ctx.saved_tensors
        total = gradient.sum(-1, keepdim=True).neg() * expected
        for column, weights in zip(ids.unbind(-1), gradient.unbind(-1), strict=True):
            total.addcmul_(weights.unsqueeze(-1), ctx.head.weight[column].float())
        return None, total.div_(temperatures.unsqueeze(-1)).to(ctx.dtype), None, None


def _selected(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)


def step_log_probs(
    log_probs: torch.Tensor,
    inputs: ReplayInputs,
    *,
    weighting: str,
    advantages: torch.Tensor | None = None,
    flip: Flip = "off",
    others: OtherDraws | None = None,
) -> torch.Tensor:
    """log pi of every response step: [N] (METHOD §3.1 for latent steps, §3.3 for hard ones).

    `log_probs` [N, W]: components (:func:`selected_log_probs`, or the recorded ones). `weighting`: `mixture` or
    `uniform`. `advantages` [N] with `flip` turn on METHOD §3.2. With `others`, latent steps are centered
    (`learner.centering`), and `log_probs` is [N, W + J K].
    """
    latent, width = inputs.latent, inputs.selected.shape[1]
    log_probs, rest = log_probs[:, :width], log_probs[:, width:]
    surrogate = surrogate_log_prob(
        log_probs[latent],
        inputs.scores[latent],
        advantages=None if advantages is None else advantages[latent],
        component_weights=inputs.weights[latent] if weighting == "mixture" else None,
        flip=flip,
    )
    if others is not None:
        surrogate = others.centered(
            surrogate,
            rest[latent].view(others.ids.shape),
            weighting=weighting,
            advantages=None if advantages is None else advantages[latent],
            flip=flip,
        )
    return log_probs[:, 0].float().masked_scatter(latent, surrogate)
