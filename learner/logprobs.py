"""Log-probs of selected ids without the [positions, V] matrix (METHOD §3).

Only one chunk of float32 logits is alive at a time, also in the backward pass, which computes them again where the
output layer is trained (:class:`_LogProbs`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from latent_grpo.common.density import Flip, surrogate_log_prob
from latent_grpo.common.head import Float32Head, float32_logits

if TYPE_CHECKING:
    from latent_grpo.common.config import LearnerConfig
    from latent_grpo.learner.batching import ReplayInputs
    from latent_grpo.learner.centering import OtherDraws

LOGIT_BYTES = 128 * 2**20
"""Bytes of logits that exist at once by default: at V = 151,936, T = 4,096 less than 5 % of the plain way's memory."""
MOST_POSITIONS, LEAST_POSITIONS = 2048, 16  # at once, by default


def selected_log_probs(
    head: nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    temperatures: torch.Tensor,
    chunks: int,
    visit: Callable[[slice, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """log_softmax(head(hidden) / temperature)[ids] over all V, float32: [N, W].

    `hidden` [N, D], `ids` [N, W], `temperatures` [N]. `visit(piece, logits)` gets each chunk's logits [n, V], divided
    by the temperatures; there is no gradient then. The head is called once (:func:`_computes_inside`), or exactly
    `chunks` times, on no rows if need be, since with ZeRO-3 each call is a collective.
    """
    if _computes_inside(head):
        return head(hidden, lambda states: _inside(head, states, ids, temperatures, chunks, visit))
    parts = []
    for piece in _pieces(len(hidden), chunks):
        arguments = (head, hidden[piece], ids[piece], temperatures[piece])
        if torch.is_grad_enabled() and visit is None:
            parts.append(checkpoint(_chunk, *arguments, use_reentrant=False))
            continue
        with torch.no_grad():
            logits = float32_logits(head, hidden[piece]).div_(temperatures[piece].unsqueeze(-1))
            if visit is not None:
                visit(piece, logits)
            parts.append(_selected(logits, ids[piece]))
            del logits  # before the next chunk's are made
    return torch.cat(parts)


def chunk_size(learner: LearnerConfig, vocabulary: int) -> int:
    """Returns how many positions' logits exist at once (`learner.logprob_chunk_tokens`), of a vocabulary's rows."""
    if learner.logprob_chunk_tokens != "auto":
        return learner.logprob_chunk_tokens
    return max(min(LOGIT_BYTES // (4 * vocabulary), MOST_POSITIONS), LEAST_POSITIONS)


def calls_size(learner: LearnerConfig, vocabulary: int) -> int:
    """Returns the same where each chunk is a call of the layer: with ZeRO-3, which gathers it then, by default more."""
    if learner.logprob_chunk_tokens == "auto" and learner.zero_stage == 3:
        return MOST_POSITIONS
    return chunk_size(learner, vocabulary)


def _computes_inside(head: nn.Module) -> TypeGuard[Float32Head]:
    """Whether all chunks are computed within one call of the layer, in which its weights are whole (ZeRO-3)."""
    return isinstance(head, Float32Head) and (head.bias is None or not head.bias.requires_grad)


def _inside(
    head: Float32Head,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    temperatures: torch.Tensor,
    chunks: int,
    visit: Callable[[slice, torch.Tensor], None] | None,
) -> torch.Tensor:
    if torch.is_grad_enabled() and visit is None:
        return _LogProbs.apply(head, head.weight, hidden, ids, temperatures, chunks)  # type: ignore[no-untyped-call]  # torch
    parts = []
    for piece in _pieces(len(hidden), chunks):
        with torch.no_grad():
            logits = _logits(head, hidden[piece], temperatures[piece])
            if visit is not None:
                visit(piece, logits)
            parts.append(_normalised(logits, ids[piece])[0])  # as with a gradient: equal weights then give equal bits
            del logits  # before the next chunk's are made
    return torch.cat(parts)


def _pieces(count: int, chunks: int) -> list[slice]:
    size = max(-(-count // chunks), 1)
    return [slice(index * size, (index + 1) * size) for index in range(chunks)]


def _chunk(head: nn.Module, hidden: torch.Tensor, ids: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    return _selected(float32_logits(head, hidden).div_(temperatures.unsqueeze(-1)), ids)


def _logits(head: Float32Head, hidden: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    # in place: a second copy would double the peak
    return head.logits(hidden).div_(temperatures.unsqueeze(-1))


class _LogProbs(torch.autograd.Function):
    """The log-probs of all chunks, of whose logits nothing is kept and at most one copy exists.

    Under a frozen layer the gradient needs no logits: d log p[i] / d hidden = (W[i] - sum_v p[v] W[v]) / temperature.
    The sum, a row of the layer as the policy expects it, is computed with the log-probs: [N, D] float32. A layer that
    is trained computes its logits again, the gradient takes their place, and that of the weights is added up in
    float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: Float32Head,
        weight: torch.Tensor,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        temperatures: torch.Tensor,
        chunks: int,
    ) -> torch.Tensor:
        ctx.head, ctx.chunks, ctx.trained = head, chunks, weight.requires_grad
        states, parts, kept = hidden.detach(), [], []
        for piece in _pieces(len(hidden), chunks):
            logits = _logits(head, states[piece], temperatures[piece])
            selected, normaliser, total = _normalised(logits, ids[piece])
            parts.append(selected)
            kept.append(normaliser if ctx.trained else head.times_rows(logits).div_(total))
            del logits  # before the next chunk's are made
        ctx.save_for_backward(hidden, ids, temperatures, torch.cat(kept))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor | None, torch.Tensor, None, None, None]:
        hidden, ids, temperatures, kept = ctx.saved_tensors
        head, total = ctx.head, gradient.sum(-1, keepdim=True).neg()
        if not ctx.trained:
            of_hidden = total * kept
            for column, weights in zip(ids.unbind(-1), gradient.unbind(-1), strict=True):
                of_hidden.addcmul_(weights.unsqueeze(-1), head.weight[column].float())
            return None, None, of_hidden.div_(temperatures.unsqueeze(-1)).to(hidden.dtype), None, None, None
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros(head.weight.shape, dtype=torch.float32, device=hidden.device)
        for piece in _pieces(len(hidden), ctx.chunks):
            of_logits = _logits(head, hidden[piece], temperatures[piece]).sub_(kept[piece]).exp_().mul_(total[piece])
            of_logits.scatter_add_(-1, ids[piece], gradient[piece]).div_(temperatures[piece].unsqueeze(-1))
            of_hidden[piece] = head.times_rows(of_logits).to(hidden.dtype)
            head.add_weight_gradient(of_weight, of_logits, hidden[piece])
            del of_logits
        return None, of_weight.to(head.weight.dtype), of_hidden, None, None, None


def _normalised(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the log-probs of ids, their normaliser [n, 1], and the total [n, 1] of what takes the logits' place.

    That is exp(logits - largest): a `logsumexp` would make a second copy, which is most of what a chunk takes.
    """
    largest, chosen = logits.amax(-1, keepdim=True), logits.gather(-1, ids)
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    normaliser = largest + total.log()
    return chosen - normaliser, normaliser, total


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
