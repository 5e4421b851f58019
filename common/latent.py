"""Latent and visible steps (METHOD §2): mixtures with and without noise, leaving latent mode, visible sampling.

Every engine and the learner call these functions, so a record means the same everywhere. They compute in float32,
whatever the model's dtype. Two forms of each sampler give exactly the same result:

* the plain form takes Gumbel draws for all V ids; it is the specification, and reference vectors check it;
* the keyed form, for engines, considers the `top_m` most likely ids and draws noise for those only. That is exact where
  the nucleus ends among them, and where noise, being bounded, cannot lift other ids above the selected ones. A row for
  which neither holds (or which is tied at the edge) is drawn again, alone, from as many ids as can matter.

Ties always go to the lower id, so that a result is a function of values, never of a kernel's order. Settings are
scalars or [N] tensors, one per row; `allowed` is bool [V] or [N, V] and marks the ids that the tokenizer has. A row
that cannot be drawn (fewer than k allowed ids with a finite logit, NaN) raises ValueError, and nothing is recorded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from latent_grpo.common.candidates import (
    ROUNDING,
    TOP_M,
    WIDEN,
    Candidates,
    Count,
    Drawn,
    Noise,
    Setting,
    Switch,
    broadcast,
    check_draw,
    draw_keyed,
    draw_plain,
    last_kept,
    likeliest,
    nucleus,
    order_key,
    unusable,
)
from latent_grpo.common.noise import GUMBEL_HIGH, GUMBEL_LOW, gumbel_noise, trajectory_key

__all__ = [
    "LatentStep",
    "VisibleStep",
    "greedy_mixture",
    "gumbel_noise",
    "latent_draws",
    "latent_step",
    "mix_embeddings",
    "mixture_weights",
    "sample_mixture",
    "sample_mixture_keyed",
    "sample_visible",
    "trajectory_key",
    "visible_step",
]

NOISE_AT_ONCE = 2**21  # ids of a draw that nothing bounds; each of its temporary tensors then has 16 MiB

# --- latent steps (METHOD §2.1, §2.2) ----------------------------------------------------------------------------


def _mixture(
    table: Candidates,
    normaliser: torch.Tensor,
    gumbel: Noise,
    k: int,
    top_p: Setting,
    noise_scale: Setting,
    noisy: Switch,
    one_sided: Switch,
) -> Drawn:
    """Draws ids, scores and log-probs [N, k], and the most likely id [N] (METHOD §2.1.1-4 and §2.2)."""
    log_p = table.logits - normaliser
    if noisy is False:
        ids, scores = table.ids[:, :k], log_p[:, :k]
        drawn = (ids, scores, scores, table.ids[:, 0])
        reach = table.logits[:, k - 1]
    else:
        pick = broadcast(noisy, torch.bool) if isinstance(noisy, torch.Tensor) else None  # None: noise in all rows
        # without noise only the k most likely can be selected, so the nucleus is empty
        keep = nucleus(log_p.double().exp(), top_p if pick is None else _per_row(pick, top_p, 0.0))
        keep[:, :k] = True
        reach = last_kept(table, keep)
        table, keep = table.narrowed(keep, k)
        log_p = log_p[:, : keep.shape[-1]]
        shift, scale = broadcast(one_sided, torch.float32) * -GUMBEL_LOW, broadcast(noise_scale, torch.float32)
        noise = gumbel(table.ids).clamp(GUMBEL_LOW, GUMBEL_HIGH) + shift
        score = log_p + noise * scale
        by = score
        if pick is not None:
            score = torch.where(pick, score, log_p)
            by = torch.where(pick, score, table.logits)  # not log p, which can tie where logits do not
        by = by.masked_fill(~keep, float("-inf"))
        best = order_key(by, table.ids).topk(k, dim=-1).indices
        drawn = (table.ids.gather(-1, best), score.gather(-1, best), log_p.gather(-1, best), table.ids[:, 0])
    usable = drawn[1].isfinite().all(-1)
    if noisy is not False:
        # inside the nucleus or not, noise lifts no id below this logit above the last selected one
        taken, lift = drawn[1][:, -1:], (GUMBEL_HIGH + shift) * scale
        slack = ROUNDING * (taken.abs() + lift + normaliser.abs())
        lowest = (taken - lift + normaliser - slack).squeeze(-1)
        reach = torch.maximum(reach, lowest if pick is None else lowest.where(pick.squeeze(-1), reach))
    return drawn, usable, reach


def _per_row(pick: torch.Tensor, if_true: Setting, if_false: float) -> torch.Tensor:
    """Returns a setting where `pick` [N, 1] is true, else `if_false`: [N] float64."""
    pick = pick.squeeze(-1)
    if not isinstance(if_true, torch.Tensor):  # made on the device: a copy of a host value would wait for it
        if_true = torch.full_like(pick, if_true, dtype=torch.float64)
    return torch.where(pick, if_true.double(), if_false)


def mixture_weights(scores: torch.Tensor, tau: Setting) -> torch.Tensor:
    """Returns softmax(scores / tau) (METHOD §2.1.5): [N, k]; `tau` is a number or [N]."""
    return torch.softmax(scores / broadcast(tau, torch.float32), dim=-1)


def sample_mixture(
    logits: torch.Tensor,
    gumbel: torch.Tensor,
    *,
    k: int,
    top_p: Setting,
    noise_scale: Setting,
    tau: Setting,
    one_sided: Switch = True,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Takes a latent step with noise (METHOD §2.1) from raw standard Gumbel draws for every id.

    `logits` [N, V], `gumbel` [N, V] before the clamp. Returns ids [N, k] int64, scores [N, k] float32 in descending
    order, weights [N, k] = softmax(scores / tau). log p is over all V rows; the nucleus counts allowed ids only.
    """
    check_draw(k, logits.shape[-1], tau=tau)
    settings = (k, top_p, noise_scale, True, one_sided)
    ids, scores, _, _ = draw_plain(_mixture, logits.float(), gumbel, allowed, settings)
    return ids, scores, mixture_weights(scores, tau)


def greedy_mixture(
    logits: torch.Tensor, *, k: int, tau: Setting = 1.0, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Takes a latent step without noise (METHOD §2.2): the k best by logit, scored by log-prob; all [N, k]."""
    no_draws = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    step = latent_step(
        logits, no_draws, no_draws, k=k, top_p=1.0, noise_scale=0.0, tau=tau, noisy=False, one_sided=False, end_id=-1,
        allowed=allowed,
    )  # fmt: skip
    return step.ids, step.scores, step.weights


def sample_mixture_keyed(
    logits: torch.Tensor,
    keys: torch.Tensor,
    steps: torch.Tensor,
    *,
    k: int,
    top_p: Setting,
    noise_scale: Setting,
    tau: Setting,
    one_sided: Switch = True,
    allowed: torch.Tensor | None = None,
    top_m: int = TOP_M,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Takes the step of :func:`sample_mixture` with :func:`gumbel_noise`, on `top_m` candidates where they suffice.

    `logits` [N, V], `keys` and `steps` [N] int64. Returns ids, scores, weights and behaviour log-probs, each [N, k].
    """
    step = latent_step(
        logits, keys, steps, k=k, top_p=top_p, noise_scale=noise_scale, tau=tau, noisy=True, one_sided=one_sided,
        end_id=-1, allowed=allowed, top_m=top_m,
    )  # fmt: skip
    return step.ids, step.scores, step.weights, step.log_probs


class LatentStep(NamedTuple):
    """One latent step of N rows; where `leaves`, the step is the hard latent-end token instead (METHOD §2.3)."""

    ids: torch.Tensor  # [N, k] int64
    scores: torch.Tensor  # [N, k] float32, descending
    weights: torch.Tensor  # [N, k] float32
    log_probs: torch.Tensor  # [N, k] float32: behaviour log p
    leaves: torch.Tensor  # [N] bool
    exact: torch.Tensor  # [N] bool: all True unless `widen` was False


def latent_step(
    logits: torch.Tensor,
    keys: torch.Tensor,
    steps: torch.Tensor,
    *,
    k: int,
    top_p: Setting,
    noise_scale: Setting,
    tau: Setting,
    noisy: Switch,
    one_sided: Switch,
    end_id: int | torch.Tensor,
    argmax_exits: Switch = True,
    allowed: torch.Tensor | None = None,
    top_m: int = TOP_M,
    widen: bool = True,
) -> LatentStep:
    """Takes an engine's latent step, for rows of mixed noise modes (METHOD §2.1-§2.3).

    `logits` [N, V], `keys` and `steps` [N] int64. A `noisy` row follows §2.1, others §2.2 (a `noise_scale` of 0 is
    still §2.1: it draws, and adds nothing). Plain booleans save work over [N] tensors of equal values. A row leaves
    latent mode where the first selected id is `end_id`, and with `argmax_exits` also where the most likely allowed one
    is; its record then has :func:`common.density.hard_log_prob` of `end_id`.

    With `widen=False` it never waits for the device. Rows whose result may depend on ids beyond `top_m`, or whose
    logits are unusable, are then not `exact`, and the caller takes them again with `widen=True`.
    """
    check_draw(k, logits.shape[-1], tau=tau)
    logits = logits.float()
    normaliser = logits.logsumexp(-1, keepdim=True)
    # one more than k, to see a tie at its edge; far more where ties (usual in bfloat16) may not be drawn again
    top_m = k + 1 if noisy is False and widen else max(top_m, k + 1)
    settings = (k, top_p, noise_scale, noisy, one_sided)
    drawn, exact = draw_keyed(_mixture, logits, normaliser, keys, steps, allowed, top_m, settings, widen)
    return _latent(drawn, exact, tau, end_id, argmax_exits)


def _latent(
    drawn: tuple[torch.Tensor, ...],
    exact: torch.Tensor,
    tau: Setting,
    end_id: int | torch.Tensor,
    argmax_exits: Switch,
) -> LatentStep:
    ids, scores, log_probs, argmax = drawn
    leaves = (ids[:, 0] == end_id) | ((argmax == end_id) & argmax_exits)
    return LatentStep(ids, scores, mixture_weights(scores, tau), log_probs, leaves, exact)


def latent_draws(
    logits: torch.Tensor,
    keys: torch.Tensor,
    steps: torch.Tensor,
    *,
    k: int,
    top_p: Setting,
    noise_scale: Setting,
    tau: Setting,
    one_sided: Switch,
    end_id: int,
    argmax_exits: Switch = True,
    allowed: torch.Tensor | None = None,
    top_m: int = TOP_M,
) -> list[LatentStep]:
    """Draws the same latent steps J times (METHOD §2.1, §2.3); equal to J calls of :func:`latent_step` with noise.

    `logits` [N, V], `keys` [N, J] int64, `steps` [N] int64. The candidates are found once.
    """
    check_draw(k, logits.shape[-1], tau=tau)
    logits = logits.float()
    normaliser, top_m = logits.logsumexp(-1, keepdim=True), max(top_m, k + 1)
    table, settings = likeliest(logits, allowed, top_m), (k, top_p, noise_scale, True, one_sided)

    def step(of_draw: torch.Tensor) -> LatentStep:
        drawn, exact = draw_keyed(_mixture, logits, normaliser, of_draw, steps, allowed, top_m, settings, table=table)
        return _latent(drawn, exact, tau, end_id, argmax_exits)

    return [step(of_draw) for of_draw in keys.unbind(-1)]


def mix_embeddings(embedded: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns sum_k w_k E[s_k]: `embedded` [..., K, D], `weights` [..., K] -> [..., D]; float32 sum, input's dtype out.

    It is not a matrix product, which could run in TF32, and in another order for another batch shape.
    """
    return (embedded.float() * weights.float().unsqueeze(-1)).sum(-2).to(embedded.dtype)


# --- visible steps (METHOD §2.4) ---------------------------------------------------------------------------------


def _visible(
    table: Candidates,
    normaliser: torch.Tensor,
    gumbel: Noise,
    top_p: Setting,
    top_k: Count,
    mass: Setting,
) -> Drawn:
    """Draws ids [N] and log-probs [N] from logits divided by the temperature (METHOD §2.4).

    `mass` [N] is the logsumexp of all allowed logits, which the nucleus is a part of where `top_k` is 0.
    """
    table, keep, reach = _kept(table, top_p, top_k, mass)
    table, keep = table.narrowed(keep, 1)
    log_p = table.logits - normaliser
    scores = (log_p + gumbel(table.ids)).masked_fill(~keep, float("-inf"))
    best = order_key(scores, table.ids).argmax(-1, keepdim=True)
    log_probs = log_p.gather(-1, best).squeeze(-1)
    return (table.ids.gather(-1, best).squeeze(-1), log_probs), log_probs.isfinite(), reach


def _kept(
    table: Candidates, top_p: Setting, top_k: Count, mass: Setting
) -> tuple[Candidates, torch.Tensor, torch.Tensor]:
    """Returns candidates, which of them a hard step may draw [N, M], and a logit below which no other could be [N]."""
    if not isinstance(top_k, torch.Tensor) and top_k:
        table = table.first(top_k)
        p = (table.logits - table.logits[:, :1]).double().exp()
        keep = nucleus(p, top_p, p.sum(-1, keepdim=True))
        keep[:, 0] = True
        return table, keep, table.logits[:, -1]
    p = (table.logits - table.logits[:, :1]).double().exp()
    whole = (broadcast(mass, torch.float32) - table.logits[:, :1]).double().exp()
    if not isinstance(top_k, torch.Tensor):  # only the nucleus bounds what can be drawn
        keep = nucleus(p, top_p, whole)
        keep[:, 0] = True
        return table, keep, last_kept(table, keep)
    top_k = broadcast(top_k, torch.int64)
    free = top_k == 0
    within = (torch.arange(p.shape[-1], device=p.device) < top_k) | free
    p = p * within
    keep = within & nucleus(p, top_p, torch.where(free, whole, p.sum(-1, keepdim=True)))
    keep[:, 0] = True
    return table, keep, last_kept(table, torch.where(free, keep, within))


def _mass(scaled: torch.Tensor, allowed: torch.Tensor | None, top_k: Count) -> Setting:
    """Returns the logsumexp of the allowed logits [N], which rows without top_k need; 0 where all have one."""
    if not isinstance(top_k, torch.Tensor) and top_k:
        return 0.0
    return (scaled if allowed is None else scaled.masked_fill(~allowed, float("-inf"))).logsumexp(-1)


def sample_visible(
    logits: torch.Tensor,
    gumbel: torch.Tensor,
    *,
    temperature: Setting,
    top_p: Setting,
    top_k: Count,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes a hard step (METHOD §2.4) by Gumbel-max: `logits` [N, V], `gumbel` [N, V] -> ids [N], log-probs [N].

    `temperature` > 0; `top_k` 0 keeps every id. The log-prob is log_softmax(logits / temperature)[id] over all V, not
    renormalised over the nucleus.
    """
    check_draw(1, logits.shape[-1], temperature=temperature)
    scaled = logits.float() / broadcast(temperature, torch.float32)
    ids, log_probs = draw_plain(_visible, scaled, gumbel, allowed, (top_p, top_k, _mass(scaled, allowed, top_k)))
    return ids, log_probs


class VisibleStep(NamedTuple):
    """One hard step of N rows."""

    ids: torch.Tensor  # [N] int64
    log_probs: torch.Tensor  # [N] float32
    exact: torch.Tensor  # [N] bool: all True unless `widen` was False


def visible_step(
    logits: torch.Tensor,
    keys: torch.Tensor,
    steps: torch.Tensor,
    *,
    temperature: Setting,
    top_p: Setting,
    top_k: Count,
    largest_top_k: int | None = None,
    some_unbounded: bool = False,
    allowed: torch.Tensor | None = None,
    widen: bool = True,
) -> VisibleStep:
    """Takes the step of :func:`sample_visible` with :func:`gumbel_noise`: `keys` and `steps` [N] int64.

    It considers little more than the `top_k` likeliest ids, and with `top_k` 0 little more than the nucleus; only where
    neither bounds the draw, all ids.
    `largest_top_k` is that of the rows, where `top_k` is [N] and the caller knows it without asking the device; without
    it all ids are considered. `some_unbounded` says that nothing bounds some of such rows. `widen` has the meaning of
    :func:`latent_step`.
    """
    vocabulary = logits.shape[-1]
    check_draw(1, vocabulary, temperature=temperature)
    scaled = logits.float() / broadcast(temperature, torch.float32)
    plain = not isinstance(top_k, torch.Tensor) and not isinstance(top_p, torch.Tensor)
    if plain and top_k == 0 and top_p >= 1.0:
        return _unbounded_visible_step(scaled, keys, steps, allowed, widen)
    if isinstance(top_k, torch.Tensor):
        reach = max(largest_top_k or vocabulary, TOP_M)  # the nucleus of a row without top_k is seldom wider
    else:
        reach = top_k or TOP_M
    # one more than top_k, to see a tie at its edge; far more where it may not be drawn again
    top_m = reach + 1 if widen else max(TOP_M, WIDEN * reach)
    normaliser = scaled.logsumexp(-1, keepdim=True)
    settings = (top_p, top_k, _mass(scaled, allowed, top_k))
    drawn, exact = draw_keyed(_visible, scaled, normaliser, keys, steps, allowed, top_m, settings, widen)
    ids, log_probs = drawn
    if some_unbounded and not widen:  # which a look at some of the ids cannot prove
        every = _unbounded_visible_step(scaled, keys, steps, allowed, widen)
        unbounded = torch.ones_like(exact)
        for free in (top_k == 0, top_p >= 1.0):
            if isinstance(free, torch.Tensor):  # a plain one is true of all rows
                unbounded &= free
        ids, log_probs = torch.where(unbounded, every.ids, ids), torch.where(unbounded, every.log_probs, log_probs)
        exact = torch.where(unbounded, every.exact, exact)
    return VisibleStep(ids, log_probs, exact)


def _unbounded_visible_step(
    scaled: torch.Tensor, keys: torch.Tensor, steps: torch.Tensor, allowed: torch.Tensor | None, widen: bool
) -> VisibleStep:
    """Draws from all ids of `scaled` [N, V], so that their order does not matter; some rows at a time.

    Every id needs noise, whose integers take several times the logits' memory.
    """
    ids, log_probs = [], []
    rows = max(NOISE_AT_ONCE // scaled.shape[-1], 1)
    every = torch.arange(scaled.shape[-1], device=scaled.device)
    for logits, key, step in zip(scaled.split(rows), keys.split(rows), steps.split(rows), strict=True):
        log_p = logits - logits.logsumexp(-1, keepdim=True)
        if allowed is not None:
            log_p = log_p.masked_fill(~allowed, float("-inf"))
        scores = log_p + gumbel_noise(key, step, every.expand(len(logits), -1))
        best = order_key(scores, every).argmax(-1, keepdim=True)
        ids.append(best.squeeze(-1))
        log_probs.append(log_p.gather(-1, best).squeeze(-1))
    found = torch.cat(log_probs)
    usable = found.isfinite()
    if widen and not bool(usable.all()):
        raise unusable(usable)
    return VisibleStep(torch.cat(ids), found, usable)
