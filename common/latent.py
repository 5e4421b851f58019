"""METHOD §2: candidates, one-sided noise, mixtures, visible sampling, and randomness as a function of identity.

Every engine and the learner call these functions, so a record means the same everywhere. Everything is float32
inside, whatever the model's dtype. Two forms of each sampler give exactly the same result:

* the plain form takes Gumbel draws for all V ids: the specification, and what reference vectors check;
* the keyed form, for engines, looks at the `top_m` most likely ids and draws noise for those only. That is exact where
  the nucleus ends among them, and where noise, being bounded, cannot lift what lies beyond over what was selected. A
  row for which neither holds (or which is tied at the edge) is drawn again, alone, from as many ids as can matter.

Ties always go to the lower id: a result is a function of values, never of a kernel's order. Settings are scalars or
[N] tensors, one per row; `allowed` is bool [V] or [N, V] and names the ids that the tokenizer has. A row that cannot
give what is asked (fewer than k allowed ids with a finite logit, NaN) raises ValueError: nothing of it is recorded.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch

GUMBEL_LOW, GUMBEL_HIGH = -1.5, 3.0  # METHOD §2.1.3; the one-sided shift is -GUMBEL_LOW
TOP_M = 128  # ids that the keyed forms look at first: few distributions reach further, and noise costs by the id
WIDEN = 2  # how much further they look, at the least, where that was too few
ROUNDING = 2e-6  # over what three float32 operations lose

Setting = float | torch.Tensor
Switch = bool | torch.Tensor
Noise = Callable[[torch.Tensor], torch.Tensor]  # draws [N, M] for ids [N, M]
Drawn = tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]
"""What was drawn, [N] bool: it can be used, and [N]: no id with a logit below this could have changed it."""


# --- noise (METHOD §2.5) -----------------------------------------------------------------------------------------


def trajectory_key(
    *, run_seed: int, purpose: str, problem_uid: str, epoch: int, sample_index: int, policy_version: int
) -> int:
    """The key of a trajectory's randomness (METHOD §2.5): an int in [0, 2**63), equal on every machine and Python.

    `policy_version` is that of the rollout's start, 0 in evaluation; `sample_index` is the run or the pass@k sample
    there. Raises TypeError for a number that is not an integer: 1 and 1.0 would be two trajectories.
    """
    numbers = [operator.index(n) for n in (run_seed, epoch, sample_index, policy_version)]  # NumPy's 3 is 3
    identity = json.dumps([str(purpose), str(problem_uid), *numbers]).encode()  # quoted: no two identities read alike
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8, person=b"latent-grpo").digest(), "big") >> 1


def _signed(word: int) -> int:
    """A uint64 as the int64 of the same bits."""
    return word - (1 << 64) if word >> 63 else word


_STRIDE = _signed(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: no two steps or ids of nearby keys meet
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit words kept in int64, in place.

    Products wrap modulo 2**64 in int64 as in uint64 (two's complement, CPU and CUDA alike); the shifts of a uint64 are
    those of int64 with the copies of the sign cut off.
    """
    for shift, multiplier in zip((30, 27), _MULTIPLIERS):
        x ^= (x >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        x *= multiplier
    x ^= (x >> 31).bitwise_and_((1 << 33) - 1)
    return x


def gumbel_noise(keys: torch.Tensor, step: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel draws, a function of (trajectory key, step, token id) only (METHOD §2.5).

    `keys` [N] int64 (:func:`trajectory_key`), `step` [N] int64, `ids` [N, M] int64 -> float32 [N, M] in [-3.61, 36.8].
    The integers behind the draws are the same on every device. All 63 bits of a key count.
    """
    row = _mix((step + 1) * _STRIDE + keys)
    bits = _mix(ids * _STRIDE + row.unsqueeze(-1))
    # u in (0, 1): 52 bits and a half, exact in float64, so that the top word does not round to u = 1 (noise +inf)
    uniform = (bits >> 11).bitwise_and_((1 << 53) - 1).bitwise_or_(1).double().mul_(2.0**-53)
    return uniform.log_().neg_().log_().neg_().float()


# --- candidates --------------------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """The ids of N rows among which to choose, most likely first, ties to the lower id."""

    ids: torch.Tensor  # [N, M] int64
    logits: torch.Tensor  # [N, M] float32, descending; -inf where not allowed
    floor: torch.Tensor | None  # [N]: no id outside of the table has a larger logit. None: all V ids are here


def _table(logits: torch.Tensor, allowed: torch.Tensor | None, top_m: int) -> _Table:
    rows, vocabulary = logits.shape
    ids, floor = torch.arange(vocabulary, device=logits.device).expand(rows, -1), None
    if vocabulary > top_m:
        logits, ids = logits.topk(top_m, dim=-1)
        floor = logits[:, -1]
        if allowed is not None:
            allowed = allowed[ids] if allowed.ndim == 1 else allowed.gather(-1, ids)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    order = _order_key(logits, ids).sort(dim=-1, descending=True).indices
    return _Table(order if floor is None else ids.gather(-1, order), logits.gather(-1, order), floor)


def _order_key(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 keys, all different, that order as float32 `values` do and equal values from higher to lower id.

    One sort or topk of them is exact, where that of the floats breaks ties as the kernel likes. A float's bits order
    as an integer once those below the sign of a negative are inverted; + 0.0 turns -0.0 into its equal.
    """
    bits = (values + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.long() << 32) | (0x7FFFFFFF - ids)


def _column(value: Setting, dtype: torch.dtype) -> Setting:
    """A setting as something that broadcasts over [N, M]; a number stays one."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.to(dtype)
    return value.unsqueeze(-1) if value.ndim == 1 else value


def _rows_of(value: Setting | None, rows: torch.Tensor) -> Setting | None:
    return value[rows] if isinstance(value, torch.Tensor) and value.ndim == 1 else value


def _nucleus(probabilities: torch.Tensor, top_p: Setting, total: Setting = 1.0) -> torch.Tensor:
    """METHOD §2.1.2: which of the float64 `probabilities` [N, M], in descending order, the nucleus keeps: [N, M] bool.

    float64, so that neither the table's width nor a parallel scan's order of addition shows in the result. A `top_p`
    of 1 keeps everything, whatever the sum of the rounded probabilities is.
    """
    top_p = _column(top_p, torch.float64)
    inside = (probabilities.cumsum(-1) - probabilities) < top_p * total
    if isinstance(top_p, torch.Tensor):
        return inside | (top_p >= 1.0)
    return inside if top_p < 1.0 else torch.ones_like(inside)


def _last_kept(table: _Table, keep: torch.Tensor) -> torch.Tensor:
    """The lowest logit in the prefix `keep` [N, M] of the table: [N]. An id below it does not belong to the prefix."""
    return table.logits.gather(-1, keep.sum(-1, keepdim=True) - 1).squeeze(-1)


def _plain(
    draw: Callable,
    logits: torch.Tensor,
    gumbel: torch.Tensor,
    allowed: torch.Tensor | None,
    settings: tuple[Setting, ...],
) -> tuple[torch.Tensor, ...]:
    """`draw` on all V ids with the given noise."""
    table = _table(logits, allowed, logits.shape[-1])
    normaliser = logits.logsumexp(-1, keepdim=True)
    drawn, usable, _ = draw(table, normaliser, lambda ids: gumbel.float().gather(-1, ids), *settings)
    if not bool(usable.all()):
        raise _unusable(usable)
    return drawn


def _keyed(
    draw: Callable,
    logits: torch.Tensor,
    normaliser: torch.Tensor,
    keys: torch.Tensor,
    steps: torch.Tensor,
    allowed: torch.Tensor | None,
    top_m: int,
    settings: tuple[Setting, ...],
    widen: bool = True,
    table: _Table | None = None,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """`draw` on the `top_m` most likely ids; rows that reach further are drawn again from as many as they reach.

    `table`: those ids, where the caller has them. Returns what was drawn and [N] bool, which rows are exact: all of
    them, unless `widen` is False.
    """
    table = _table(logits, allowed, top_m) if table is None else table
    drawn, usable, reach = draw(table, normaliser, lambda ids: gumbel_noise(keys, steps, ids), *settings)
    exact = usable if table.floor is None else usable & (reach > table.floor)
    if not widen or bool(exact.all()):
        return drawn, exact
    if table.floor is None:
        raise _unusable(exact)
    rows = (~exact).nonzero().squeeze(-1)
    wider = logits[rows]
    reached = (wider >= reach[rows].unsqueeze(-1)).sum(-1)
    wide, _ = _keyed(
        draw,
        wider,
        normaliser[rows],
        keys[rows],
        steps[rows],
        allowed[rows] if allowed is not None and allowed.ndim == 2 else allowed,
        max(int(reached.max()) + 1, WIDEN * top_m),  # one more, to see that nothing else reaches as far
        tuple(_rows_of(setting, rows) for setting in settings),
    )
    drawn = tuple(narrow.index_copy(0, rows, again) for narrow, again in zip(drawn, wide, strict=True))
    return drawn, torch.ones_like(exact)


def _unusable(usable: torch.Tensor) -> ValueError:
    return ValueError(
        f"the logits of {int((~usable).sum())} rows leave nothing to select: fewer allowed ids with a finite logit "
        "than asked for, or NaN or +inf among logits or settings. Check the model's output, `allowed` (the "
        "tokenizer's ids) and the sampling settings"
    )


def _check(k: int, vocabulary: int, **positive: Setting) -> None:
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be between 1 and the vocabulary's {vocabulary} rows, got {k}")
    for name, value in positive.items():
        if not isinstance(value, torch.Tensor) and not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")


# --- latent steps (METHOD §2.1, §2.2) ----------------------------------------------------------------------------


def _mixture(
    table: _Table,
    normaliser: torch.Tensor,
    gumbel: Noise,
    k: int,
    top_p: Setting,
    noise_scale: Setting,
    noisy: Switch,
    one_sided: Switch,
) -> Drawn:
    """METHOD §2.1.1-4 and §2.2: ids, scores, log-probs [N, k], most likely id [N]."""
    log_p = table.logits - normaliser
    if noisy is False:
        ids, scores = table.ids[:, :k], log_p[:, :k]
        drawn = (ids, scores, scores, table.ids[:, 0])
        keep = torch.ones_like(ids, dtype=torch.bool)
    else:
        mixed = isinstance(noisy, torch.Tensor)
        pick = _column(noisy, torch.bool)
        # without noise nothing but the k most likely can be selected: an empty nucleus says so
        keep = _nucleus(log_p.double().exp(), _per_row(pick, top_p, 0.0) if mixed else top_p)
        keep[:, :k] = True
        shift, scale = _column(one_sided, torch.float32) * -GUMBEL_LOW, _column(noise_scale, torch.float32)
        noise = gumbel(table.ids).clamp(GUMBEL_LOW, GUMBEL_HIGH) + shift
        score = log_p + noise * scale
        by = score
        if mixed:
            score = torch.where(pick, score, log_p)
            by = torch.where(pick, score, table.logits)  # not log p, which can tie where logits do not
        by = by.masked_fill(~keep, float("-inf"))
        best = _order_key(by, table.ids).topk(k, dim=-1).indices
        drawn = (table.ids.gather(-1, best), score.gather(-1, best), log_p.gather(-1, best), table.ids[:, 0])
    usable = drawn[1].isfinite().all(-1)
    reach = _last_kept(table, keep)
    if noisy is not False:
        # beyond the nucleus' end or not: noise lifts nothing below this logit over the last id that was taken
        taken, lift = drawn[1][:, -1:], (GUMBEL_HIGH + shift) * scale
        slack = ROUNDING * (taken.abs() + lift + normaliser.abs())
        lowest = (taken - lift + normaliser - slack).squeeze(-1)
        reach = torch.maximum(reach, lowest.where(pick.squeeze(-1), reach) if mixed else lowest)
    return drawn, usable, reach


def _per_row(pick: torch.Tensor, if_true: Setting, if_false: float) -> torch.Tensor:
    """[N] float64: a setting where `pick` [N, 1], else `if_false`."""
    pick = pick.squeeze(-1)
    if not isinstance(if_true, torch.Tensor):  # made on the device: a copy of a host value would wait for it
        if_true = torch.full_like(pick, if_true, dtype=torch.float64)
    return torch.where(pick, if_true.double(), if_false)


def mixture_weights(scores: torch.Tensor, tau: Setting) -> torch.Tensor:
    """softmax(scores / tau) (METHOD §2.1.5): [N, k]; `tau` a number or [N]."""
    return torch.softmax(scores / _column(tau, torch.float32), dim=-1)


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
    """A latent step with noise (METHOD §2.1), from raw standard Gumbel draws for every id.

    `logits` [N, V], `gumbel` [N, V] before the clamp. Returns ids [N, k] int64, scores [N, k] float32 in descending
    order, weights [N, k] = softmax(scores / tau). log p is over all V rows; the nucleus counts allowed ids only.
    """
    _check(k, logits.shape[-1], tau=tau)
    settings = (k, top_p, noise_scale, True, one_sided)
    ids, scores, _, _ = _plain(_mixture, logits.float(), gumbel, allowed, settings)
    return ids, scores, mixture_weights(scores, tau)


def greedy_mixture(
    logits: torch.Tensor, *, k: int, tau: Setting = 1.0, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A latent step without noise (METHOD §2.2): the k best by logit; scores are their log-probs. All [N, k]."""
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
    """:func:`sample_mixture` on the draws of :func:`gumbel_noise`, looking at `top_m` candidates where they suffice.

    `logits` [N, V], `keys` and `steps` [N] int64. Returns ids, scores, weights and behaviour log-probs, each [N, k].
    """
    step = latent_step(
        logits, keys, steps, k=k, top_p=top_p, noise_scale=noise_scale, tau=tau, noisy=True, one_sided=one_sided,
        end_id=-1, allowed=allowed, top_m=top_m,
    )  # fmt: skip
    return step.ids, step.scores, step.weights, step.log_probs


class LatentStep(NamedTuple):
    """One latent step of N rows. Where `leaves`, the step is the hard latent-end token instead (METHOD §2.3)."""

    ids: torch.Tensor  # [N, k] int64
    scores: torch.Tensor  # [N, k] float32, descending
    weights: torch.Tensor  # [N, k] float32
    log_probs: torch.Tensor  # [N, k] float32: behaviour log p
    leaves: torch.Tensor  # [N] bool
    exact: torch.Tensor  # [N] bool: all True, unless asked not to `widen`


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
    allowed: torch.Tensor | None = None,
    top_m: int = TOP_M,
    widen: bool = True,
) -> LatentStep:
    """METHOD §2.1-§2.3 for rows of mixed noise modes: an engine's latent step.

    `logits` [N, V], `keys` and `steps` [N] int64. `noisy`: §2.1 where True, §2.2 where False (a `noise_scale` of 0 is
    §2.1 still: it draws, and adds nothing). Plain booleans save work over [N] tensors that are all alike. A row leaves
    latent mode where the most likely allowed id or the first selected one is `end_id`; what is recorded of it then is
    :func:`common.density.hard_log_prob` of `end_id`.

    `widen=False`: never waits for the device. Rows whose result may depend on ids beyond `top_m`, or whose logits are
    unusable, are then not `exact`, and the caller takes them again with `widen=True`.
    """
    _check(k, logits.shape[-1], tau=tau)
    logits = logits.float()
    normaliser = logits.logsumexp(-1, keepdim=True)
    # one more than k, to see a tie at its edge; far more where ties (usual in bfloat16) may not be looked at again
    top_m = k + 1 if noisy is False and widen else max(top_m, k + 1)
    settings = (k, top_p, noise_scale, noisy, one_sided)
    drawn, exact = _keyed(_mixture, logits, normaliser, keys, steps, allowed, top_m, settings, widen)
    return _latent(drawn, exact, tau, end_id)


def _latent(
    drawn: tuple[torch.Tensor, ...], exact: torch.Tensor, tau: Setting, end_id: int | torch.Tensor
) -> LatentStep:
    ids, scores, log_probs, likeliest = drawn
    leaves = (likeliest == end_id) | (ids[:, 0] == end_id)
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
    allowed: torch.Tensor | None = None,
    top_m: int = TOP_M,
) -> list[LatentStep]:
    """J draws of the same latent steps (METHOD §2.1, §2.3): equal to J calls of :func:`latent_step` with noise.

    `logits` [N, V], `keys` [N, J] int64, `steps` [N] int64. The candidates are looked for once.
    """
    _check(k, logits.shape[-1], tau=tau)
    logits = logits.float()
    normaliser, top_m = logits.logsumexp(-1, keepdim=True), max(top_m, k + 1)
    table, settings = _table(logits, allowed, top_m), (k, top_p, noise_scale, True, one_sided)
    return [
        _latent(
            *_keyed(_mixture, logits, normaliser, of_draw, steps, allowed, top_m, settings, table=table), tau, end_id
        )
        for of_draw in keys.unbind(-1)
    ]


def mix_embeddings(embedded: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_k w_k E[s_k]: `embedded` [..., K, D], `weights` [..., K] -> [..., D]; float32 sum, input's dtype out.

    Not a matrix product: that could run in TF32, and in another order for another batch shape.
    """
    return (embedded.float() * weights.float().unsqueeze(-1)).sum(-2).to(embedded.dtype)


# --- visible steps (METHOD §2.4) ---------------------------------------------------------------------------------


def _visible(
    table: _Table,
    normaliser: torch.Tensor,
    gumbel: Noise,
    top_p: Setting,
    top_k: Setting,
) -> Drawn:
    """METHOD §2.4 on temperature-divided logits: ids [N], log-probs [N]."""
    width = table.ids.shape[-1]
    position = torch.arange(width, device=table.ids.device)
    top_k = _column(top_k, torch.int64)
    if isinstance(top_k, torch.Tensor):
        within = ((position < top_k) | (top_k == 0)).expand(table.ids.shape)
    else:
        within = (position < (top_k or width)).expand(table.ids.shape)
    p = (table.logits - table.logits[:, :1]).double().exp() * within
    keep = within & _nucleus(p, top_p, p.sum(-1, keepdim=True))
    keep[:, 0] = True
    log_p = table.logits - normaliser
    scores = (log_p + gumbel(table.ids)).masked_fill(~keep, float("-inf"))
    best = _order_key(scores, table.ids).argmax(-1, keepdim=True)
    log_probs = log_p.gather(-1, best).squeeze(-1)
    drawn = (table.ids.gather(-1, best).squeeze(-1), log_probs)
    return drawn, log_probs.isfinite(), _last_kept(table, within)


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

    `temperature` > 0; `top_k` 0 keeps every id. The log-prob is log_softmax(logits / temperature)[id] over all V, not
    renormalised over the nucleus.
    """
    _check(1, logits.shape[-1], temperature=temperature)
    scaled = logits.float() / _column(temperature, torch.float32)
    return _plain(_visible, scaled, gumbel, allowed, (top_p, top_k))


class VisibleStep(NamedTuple):
    """One hard step of N rows."""

    ids: torch.Tensor  # [N] int64
    log_probs: torch.Tensor  # [N] float32
    exact: torch.Tensor  # [N] bool: all True, unless asked not to `widen`


def visible_step(
    logits: torch.Tensor,
    keys: torch.Tensor,
    steps: torch.Tensor,
    *,
    temperature: Setting,
    top_p: Setting,
    top_k: Setting,
    largest_top_k: int | None = None,
    allowed: torch.Tensor | None = None,
    widen: bool = True,
) -> VisibleStep:
    """:func:`sample_visible` on the draws of :func:`gumbel_noise`: `keys` and `steps` [N] int64.

    Looks at little more than the `top_k` likeliest ids; with `top_k` 0 at all of them. `largest_top_k`: of the rows,
    where `top_k` is [N] and the caller knows it without asking the device; else all ids are looked at. `widen` as in
    :func:`latent_step`.
    """
    vocabulary = logits.shape[-1]
    _check(1, vocabulary, temperature=temperature)
    scaled = logits.float() / _column(temperature, torch.float32)
    reach = (largest_top_k if isinstance(top_k, torch.Tensor) else top_k) or vocabulary
    # one more than top_k, to see a tie at its edge; far more where it may not be looked at again
    top_m = reach + 1 if widen else max(TOP_M, WIDEN * reach)
    normaliser = scaled.logsumexp(-1, keepdim=True)
    drawn, exact = _keyed(_visible, scaled, normaliser, keys, steps, allowed, top_m, (top_p, top_k), widen)
    return VisibleStep(*drawn, exact)
