"""METHOD §2: candidates, one-sided noise, mixtures, visible sampling, and randomness as a function of identity.

Every engine and the learner call these functions, so a record means the same everywhere. Everything is float32
inside, whatever the model's dtype. Two forms of each sampler give exactly the same result:

* the plain form takes Gumbel draws for all V ids: the specification, and what reference vectors check;
* the keyed form, for engines, looks at the `top_m` most likely ids and draws noise for those only. Rows whose nucleus
  reaches beyond `top_m` (or whose boundary is tied) take the plain way.

Ties always go to the lower id: a result is a function of values, never of a kernel's order.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch

GUMBEL_LOW, GUMBEL_HIGH = -1.5, 3.0  # METHOD §2.1.3; the one-sided shift is -GUMBEL_LOW
TOP_M = 256
_M32 = 0xFFFFFFFF

Setting = float | torch.Tensor


# --- noise (METHOD §2.5) -----------------------------------------------------------------------------------------


def trajectory_key(
    *, run_seed: int, purpose: str, problem_uid: str, epoch: int, sample_index: int, policy_version: int
) -> int:
    """The 63-bit key of a trajectory's randomness. `policy_version` is that of the rollout's start; 0 in evaluation."""
    identity = repr((run_seed, purpose, problem_uid, epoch, sample_index, policy_version)).encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "big") >> 1


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Bijective 32-bit finaliser ("lowbias32") on uint32 values kept in int64: the same integers on CPU and CUDA."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _M32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _M32
    return x ^ (x >> 15)


def gumbel_noise(keys: torch.Tensor, step: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel draws, a function of (trajectory key, step, token id) only (METHOD §2.5).

    `keys` [N] int64 (:func:`trajectory_key`), `step` [N] int64, `ids` [N, M] int64 -> float32 [N, M], always finite.
    """
    low, high = keys & _M32, (keys >> 32) & _M32
    row = _mix(_mix(low ^ 0x9E3779B9) ^ high)
    row = _mix((row + step * 0x85EBCA6B) & _M32)
    row2 = _mix(row ^ _mix(high ^ 0x7F4A7C15) ^ low)  # a second word: rows that collide in one differ in the other
    bits = _mix((_mix(row.unsqueeze(-1) ^ _mix((ids * 0x27D4EB2F + 0x165667B1) & _M32)) + row2.unsqueeze(-1)) & _M32)
    # e = -log(u), u in (0, 1): 32 bits in float64, so that the top value does not round to u = 1 (noise +inf)
    exponential = -torch.log((bits.double() + 0.5) * 2.0**-32)
    return (-torch.log(exponential)).float()


# --- ordering ----------------------------------------------------------------------------------------------------


def _column(value: Setting, like: torch.Tensor) -> Setting:
    """A setting as something that broadcasts over [N, M]."""
    if isinstance(value, torch.Tensor) and value.ndim == 1:
        return value.to(like.device).unsqueeze(-1)
    return value


def _masked(logits: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    return logits if allowed is None else logits.masked_fill(~allowed, float("-inf"))


def _sorted(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Descending, ties to the lower position."""
    return torch.sort(values, dim=-1, descending=True, stable=True)


def _most_likely(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `count` largest of each row, sorted, ties to the lower id: values, ids [N, count]; and [N] bool: exact.

    `torch.topk` breaks ties as it likes; a tie that straddles the boundary makes a row inexact.
    """
    size = values.shape[-1]
    if count >= size:
        top, ids = _sorted(values)
        return top, ids, torch.ones(values.shape[0], dtype=torch.bool, device=values.device)
    top, ids = torch.topk(values, count + 1, dim=-1)
    exact = (top[:, count - 1] > top[:, count]) | torch.isneginf(top[:, count - 1])
    ids, order = torch.sort(ids[:, :count], dim=-1)
    top, by_value = _sorted(top[:, :count].gather(-1, order))
    return top, ids.gather(-1, by_value), exact


def _select(scores: torch.Tensor, ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k best of `scores` [N, M], descending, ties to the lower id: scores, ids and positions, each [N, k]."""
    ids, by_id = torch.sort(ids, dim=-1)
    best, order = _sorted(scores.gather(-1, by_id))
    order = order[:, :k]
    return best[:, :k], ids.gather(-1, order), by_id.gather(-1, order)


def _check_k(k: int, vocabulary: int) -> None:
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be between 1 and the vocabulary's {vocabulary} rows, got {k}")


# --- latent steps (METHOD §2.1, §2.2) ----------------------------------------------------------------------------


def _noisy(
    log_p: torch.Tensor,
    ids: torch.Tensor,
    gumbel: torch.Tensor,
    k: int,
    top_p: Setting,
    noise_scale: Setting,
    one_sided: bool | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """METHOD §2.1.2-4 on candidates sorted by `log_p` [N, M]: ids, scores and log-probs of the K selected."""
    p = log_p.exp()
    keep = (p.cumsum(-1) - p) < _column(top_p, log_p)
    keep[:, :k] = True
    keep &= ~torch.isneginf(log_p)
    shift = _column(one_sided, log_p)
    shift = shift.float() * -GUMBEL_LOW if isinstance(shift, torch.Tensor) else (-GUMBEL_LOW if shift else 0.0)
    noise = (gumbel.float().clamp(GUMBEL_LOW, GUMBEL_HIGH) + shift) * _column(noise_scale, log_p)
    scores = torch.where(keep, log_p + noise, float("-inf"))
    best, selected, position = _select(scores, ids, k)
    return selected, best, log_p.gather(-1, position)


def sample_mixture(
    logits: torch.Tensor,
    gumbel: torch.Tensor,
    *,
    k: int,
    top_p: Setting,
    noise_scale: Setting,
    tau: Setting,
    one_sided: bool | torch.Tensor = True,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A latent step with noise (METHOD §2.1), from raw standard Gumbel draws for every id.

    `logits` [N, V], `gumbel` [N, V] before the clamp; settings scalar or [N]; `allowed` bool [V] or [N, V].
    Returns ids [N, k] int64, scores [N, k] float32 in descending order, weights [N, k] = softmax(scores / tau).
    """
    _check_k(k, logits.shape[-1])
    logits = logits.float()
    log_p, order = _sorted(_masked(logits - logits.logsumexp(-1, keepdim=True), allowed))
    ids, scores, _ = _noisy(log_p, order, gumbel.gather(-1, order), k, top_p, noise_scale, one_sided)
    return ids, scores, torch.softmax(scores / _column(tau, scores), dim=-1)


def greedy_mixture(
    logits: torch.Tensor, *, k: int, tau: Setting = 1.0, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A latent step without noise (METHOD §2.2): the k best by logit; scores are their log-probs."""
    _check_k(k, logits.shape[-1])
    logits = logits.float()
    log_p = _masked(logits - logits.logsumexp(-1, keepdim=True), allowed)
    scores, ids, exact = _most_likely(log_p, k)
    if not bool(exact.all()):
        scores, ids = (t[:, :k] for t in _sorted(log_p))
    return ids, scores, torch.softmax(scores / _column(tau, scores), dim=-1)


def sample_mixture_keyed(
    logits: torch.Tensor,
    keys: torch.Tensor,
    steps: torch.Tensor,
    *,
    k: int,
    top_p: Setting,
    noise_scale: Setting,
    tau: Setting,
    one_sided: bool | torch.Tensor = True,
    allowed: torch.Tensor | None = None,
    top_m: int = TOP_M,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`sample_mixture` on the draws of :func:`gumbel_noise`, looking at `top_m` candidates where they suffice.

    Returns ids, scores, weights and behaviour log-probs, each [N, k].
    """
    top, order = _candidates(logits, k, top_p, allowed, top_m)
    ids, scores, log_probs = _noisy(top, order, gumbel_noise(keys, steps, order), k, top_p, noise_scale, one_sided)
    return ids, scores, torch.softmax(scores / _column(tau, scores), dim=-1), log_probs


def _candidates(
    logits: torch.Tensor, k: int, top_p: Setting, allowed: torch.Tensor | None, top_m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """At least every id that METHOD §2.1.2 keeps, most likely first: log-probs and ids [N, M].

    M is `top_m`, or V when some row's nucleus (or a tie at the boundary) reaches beyond it.
    """
    _check_k(k, logits.shape[-1])
    logits = logits.float()
    log_p = _masked(logits - logits.logsumexp(-1, keepdim=True), allowed)
    top, order, exact = _most_likely(log_p, max(top_m, k))
    if order.shape[-1] < log_p.shape[-1]:
        p = top.exp()  # the nucleus is all here iff the last one looked at is outside of it
        exact = exact & ~((p.cumsum(-1) - p)[:, -1] < torch.as_tensor(top_p, device=logits.device))
        if not bool(exact.all()):
            return _sorted(log_p)
    return top, order


class LatentStep(NamedTuple):
    """One latent step of N rows. Where `leaves`, the step is the hard latent-end token instead (METHOD §2.3)."""

    ids: torch.Tensor  # [N, k] int64
    scores: torch.Tensor  # [N, k] float32
    weights: torch.Tensor  # [N, k] float32
    log_probs: torch.Tensor  # [N, k] float32: behaviour log p
    leaves: torch.Tensor  # [N] bool


def latent_step(
    logits: torch.Tensor,
    keys: torch.Tensor,
    steps: torch.Tensor,
    *,
    k: int,
    top_p: Setting,
    noise_scale: Setting,
    tau: Setting,
    noisy: torch.Tensor,
    one_sided: torch.Tensor,
    end_id: int | torch.Tensor,
    allowed: torch.Tensor | None = None,
) -> LatentStep:
    """METHOD §2.1-§2.3 for rows of mixed noise modes: `noisy` [N] bool, `one_sided` [N] bool."""
    top, order = _candidates(logits, k, top_p, allowed, TOP_M)
    drawn, drawn_scores, drawn_log_probs = _noisy(
        top, order, gumbel_noise(keys, steps, order), k, top_p, noise_scale, one_sided
    )
    pick = noisy.unsqueeze(-1)
    ids = torch.where(pick, drawn, order[:, :k])
    scores = torch.where(pick, drawn_scores, top[:, :k])
    return LatentStep(
        ids=ids,
        scores=scores,
        weights=torch.softmax(scores / _column(tau, scores), dim=-1),
        log_probs=torch.where(pick, drawn_log_probs, top[:, :k]),
        leaves=(order[:, 0] == end_id) | (ids[:, 0] == end_id),
    )


def mix_embeddings(embedded: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_k w_k E[s_k]: `embedded` [..., K, D], `weights` [..., K] -> [..., D]; float32 sum, input's dtype out."""
    mixed = torch.einsum("...kd,...k->...d", embedded.float(), weights.float())
    return mixed.to(embedded.dtype)


# --- visible steps (METHOD §2.4) ---------------------------------------------------------------------------------


def _visible(
    scaled: torch.Tensor, ids: torch.Tensor, gumbel: torch.Tensor, top_p: Setting, top_k: Setting
) -> torch.Tensor:
    """One draw per row from candidates sorted by `scaled` [N, M], already temperature-divided: ids [N]."""
    position = torch.arange(scaled.shape[-1], device=scaled.device)
    within = (position < _column(top_k, scaled)) & ~torch.isneginf(scaled)
    p = torch.softmax(scaled.masked_fill(~within, float("-inf")), dim=-1)
    keep = within & ((p.cumsum(-1) - p) < _column(top_p, scaled))
    keep[:, 0] = True
    scores = torch.where(keep, scaled + gumbel.float(), float("-inf"))
    return _select(scores, ids, 1)[1][:, 0]


def sample_visible(
    logits: torch.Tensor,
    gumbel: torch.Tensor,
    *,
    temperature: Setting,
    top_p: Setting,
    top_k: Setting,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A hard step (METHOD §2.4) by Gumbel-max: `logits` [N, V], `gumbel` [N, V] -> ids [N], log-probs [N].

    The log-prob is log_softmax(logits / temperature)[id] over all V, not renormalised over the nucleus.
    """
    scaled = logits.float() / _column(temperature, logits)
    top, order = _sorted(_masked(scaled, allowed))
    ids = _visible(top, order, gumbel.gather(-1, order), top_p, top_k)
    return ids, _log_prob(scaled, ids)


def sample_visible_keyed(
    logits: torch.Tensor,
    keys: torch.Tensor,
    steps: torch.Tensor,
    *,
    temperature: Setting,
    top_p: Setting,
    top_k: Setting,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`sample_visible` on the draws of :func:`gumbel_noise`, computed for the top_k candidates only."""
    scaled = logits.float() / _column(temperature, logits)
    masked = _masked(scaled, allowed)
    widest = int(top_k.max()) if isinstance(top_k, torch.Tensor) else top_k
    top, order, exact = _most_likely(masked, min(widest, masked.shape[-1]))
    if not bool(exact.all()):
        top, order = _sorted(masked)
    ids = _visible(top, order, gumbel_noise(keys, steps, order), top_p, top_k)
    return ids, _log_prob(scaled, ids)


def _log_prob(scaled: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)
