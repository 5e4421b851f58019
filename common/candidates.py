"""The candidates of a step: their order, the nucleus, and the proof that no other id matters (METHOD §2.1, §2.4).

A step of the method is a function of :class:`Candidates`. :func:`draw_plain` gives it all V ids and the caller's noise;
:func:`draw_keyed` gives it the most likely ids and keyed noise, and draws rows again for which those were too few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, overload

import numpy as np
import torch

from latent_grpo.common.noise import gumbel_noise

TOP_M = 128  # ids that the keyed forms consider first: few distributions need more, and noise costs per id
WIDEN = 2  # the least factor by which they consider more ids where those were too few
ROUNDING = 2e-6  # more than three float32 operations lose
ON_HOST = 8192  # ids up to which NumPy finds the likeliest on a CPU several times faster than torch; far above, hardly
SPARE = 16  # ids that are not allowed, up to which so many more are looked at instead of rows being drawn again

Setting = float | torch.Tensor
Count = int | torch.Tensor
Switch = bool | torch.Tensor
Noise = Callable[[torch.Tensor], torch.Tensor]  # draws [N, M] for ids [N, M]
Drawn = tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]
"""The draws; [N] bool: whether they are usable; and [N]: a logit below which no id could have changed them."""
Draw = Callable[..., Drawn]
"""A step of METHOD §2: a function of candidates, a normaliser [N, 1], noise, and the step's settings in order."""


class Candidates(NamedTuple):
    """The ids of N rows among which to choose, most likely first, ties to the lower id."""

    ids: torch.Tensor  # [N, M] int64
    logits: torch.Tensor  # [N, M] float32, descending; -inf where not allowed
    floor: torch.Tensor | None  # [N]: no id outside of the table has a larger logit. None: all V ids are here
    ask: bool = False  # whether the host may ask the device, which on a CPU costs nothing

    def first(self, width: int) -> Candidates:
        """Returns the `width` most likely ids of each row."""
        return self._replace(ids=self.ids[:, :width], logits=self.logits[:, :width])

    def narrowed(self, keep: torch.Tensor, at_least: int) -> tuple[Candidates, torch.Tensor]:
        """Returns the table and the prefix `keep` [N, M] no wider than the widest row's, where the host may ask."""
        if not self.ask or not len(keep):
            return self, keep
        width = max(int(keep.sum(-1).max()), at_least)
        return self.first(width), keep[:, :width]


def likeliest(logits: torch.Tensor, allowed: torch.Tensor | None, top_m: int, ask: bool = True) -> Candidates:
    """Returns the `top_m` most likely ids of `logits` [N, V]; those that are not `allowed` have a logit of -inf.

    `ask`: whether the host may wait for the device. On a CPU it then may take a few more, so that `top_m` are allowed.
    """
    rows, vocabulary = logits.shape
    on_host = ask and logits.device.type == "cpu"
    if on_host and allowed is not None and allowed.ndim == 1:
        top_m += min(vocabulary - int(allowed.sum()), SPARE)
    floor = None
    if vocabulary > top_m:
        ids = _selected_on_host(logits, top_m) if on_host and vocabulary <= ON_HOST else None
        if ids is None:
            logits, ids = logits.topk(top_m, dim=-1)
            floor = logits[:, -1]
        else:
            logits = logits.gather(-1, ids)
            floor = logits.amin(-1)
        if allowed is not None:
            allowed = allowed[ids] if allowed.ndim == 1 else allowed.gather(-1, ids)
    else:
        ids = torch.arange(vocabulary, device=logits.device).expand(rows, -1)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    if on_host:
        return Candidates(*_ordered_on_host(logits, ids), floor, ask)
    order = order_key(logits, ids).sort(dim=-1, descending=True).indices
    return Candidates(order if floor is None else ids.gather(-1, order), logits.gather(-1, order), floor, ask)


def _selected_on_host(logits: torch.Tensor, top_m: int) -> torch.Tensor | None:
    """Returns the `top_m` most likely ids of each row [N, top_m], in no order; None where ties or NaN leave it open."""
    values = logits.numpy()
    edge = values.shape[-1] - top_m
    least = np.partition(values, edge, axis=-1)[:, edge : edge + 1]
    chosen = values >= least
    if (np.count_nonzero(chosen, axis=-1) != top_m).any():  # more with ties at the edge, fewer with NaN
        return None
    ids = torch.from_numpy(np.flatnonzero(chosen)).view(len(values), top_m)
    return ids - torch.arange(len(values)).unsqueeze(-1) * values.shape[-1]


def _ordered_on_host(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and float32 logits [N, M], most likely first, ties to the lower id, as :func:`order_key` has them."""
    bits = (logits.numpy() + np.float32(0)).view(np.int32)
    bits = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    keys = (bits.astype(np.int64) << 32) | ids.numpy()  # ascending: NumPy sorts integers with vector instructions
    keys.sort(axis=-1)
    bits = ~(keys >> 32).astype(np.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(np.float32)
    return torch.from_numpy(keys & 0x7FFFFFFF), torch.from_numpy(ordered)


def order_key(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns distinct int64 keys that order as float32 `values` do, and equal values from higher to lower id.

    A sort or topk of them is exact, while one of the floats breaks ties in the kernel's own way. A float's bits order
    as an integer once those below the sign of a negative are inverted; + 0.0 turns -0.0 into its equal.
    """
    bits = (values + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.long() << 32) | (0x7FFFFFFF - ids)


@overload
def broadcast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...


@overload
def broadcast(value: Setting, dtype: torch.dtype) -> Setting: ...


def broadcast(value: Setting, dtype: torch.dtype) -> Setting:
    """Makes a setting broadcast over [N, M]; a number stays a number."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.to(dtype)
    return value.unsqueeze(-1) if value.ndim == 1 else value


def _rows_of(value: Setting, rows: torch.Tensor) -> Setting:
    return value[rows] if isinstance(value, torch.Tensor) and value.ndim == 1 else value


def nucleus(probabilities: torch.Tensor, top_p: Setting, total: Setting = 1.0) -> torch.Tensor:
    """Returns which of the float64 `probabilities` [N, M], in descending order, the nucleus keeps: [N, M] bool.

    See METHOD §2.1.2. With float64 neither the table's width nor a parallel scan's order of addition affects the
    result. A `top_p` of 1 keeps everything, whatever the sum of the rounded probabilities is.
    """
    top_p = broadcast(top_p, torch.float64)
    inside = (probabilities.cumsum(-1) - probabilities) < top_p * total
    if isinstance(top_p, torch.Tensor):
        return inside | (top_p >= 1.0)
    return inside if top_p < 1.0 else torch.ones_like(inside)


def last_kept(table: Candidates, keep: torch.Tensor) -> torch.Tensor:
    """Returns the lowest logit in the prefix `keep` [N, M] of the table: [N]. An id below it is not in the prefix."""
    return table.logits.gather(-1, keep.sum(-1, keepdim=True) - 1).squeeze(-1)


def draw_plain(
    draw: Draw,
    logits: torch.Tensor,
    gumbel: torch.Tensor,
    allowed: torch.Tensor | None,
    settings: tuple[Setting, ...],
) -> tuple[torch.Tensor, ...]:
    """Applies `draw` to all V ids with the given noise."""
    table = likeliest(logits, allowed, logits.shape[-1])
    normaliser = logits.logsumexp(-1, keepdim=True)
    drawn, usable, _ = draw(table, normaliser, lambda ids: gumbel.float().gather(-1, ids), *settings)
    if not bool(usable.all()):
        raise unusable(usable)
    return drawn


def draw_keyed(
    draw: Draw,
    logits: torch.Tensor,
    normaliser: torch.Tensor,
    keys: torch.Tensor,
    steps: torch.Tensor,
    allowed: torch.Tensor | None,
    top_m: int,
    settings: tuple[Setting, ...],
    widen: bool = True,
    table: Candidates | None = None,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Applies `draw` to the `top_m` most likely ids; rows that need more are drawn again from as many as they need.

    `table` holds those ids if the caller has them. Returns the draws, and [N] bool: which rows are exact, which is all
    of them unless `widen` is False.
    """
    table = likeliest(logits, allowed, top_m, widen) if table is None else table
    drawn, usable, reach = draw(table, normaliser, lambda ids: gumbel_noise(keys, steps, ids), *settings)
    exact = usable if table.floor is None else usable & (reach > table.floor)
    if not widen or bool(exact.all()):
        return drawn, exact
    if table.floor is None:
        raise unusable(exact)
    rows = (~exact).nonzero().squeeze(-1)
    wider = logits[rows]
    reached = (wider >= reach[rows].unsqueeze(-1)).sum(-1)
    wide, _ = draw_keyed(
        draw,
        wider,
        normaliser[rows],
        keys[rows],
        steps[rows],
        allowed[rows] if allowed is not None and allowed.ndim == 2 else allowed,
        max(int(reached.max()) + 1, WIDEN * top_m),  # one more, to see that no other id matters
        tuple(_rows_of(setting, rows) for setting in settings),
    )
    drawn = tuple(narrow.index_copy(0, rows, again) for narrow, again in zip(drawn, wide, strict=True))
    return drawn, torch.ones_like(exact)


def unusable(usable: torch.Tensor) -> ValueError:
    """Returns what to raise where some rows are not `usable` [N]."""
    return ValueError(
        f"nothing can be selected from the logits of {int((~usable).sum())} rows: they have fewer allowed ids with a "
        "finite logit than requested, or logits or settings hold NaN or +inf. Check the model's output, `allowed` (the "
        "tokenizer's ids) and the sampling settings"
    )


def check_draw(k: int, vocabulary: int, **positive: Setting) -> None:
    """Raises ValueError for a width beyond the vocabulary, and for a setting that must be above 0 and is not."""
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be between 1 and the vocabulary's {vocabulary} rows, got {k}")
    for name, value in positive.items():
        if not isinstance(value, torch.Tensor) and not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
