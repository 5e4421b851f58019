"""Soft labels, which make latent chains from explicit ones (METHOD §7): c consecutive tokens become one label.

The plug point is :class:`ChainSource`. :class:`UniformChains` is METHOD §7a, `learner.sft.induction.InducedChains` §7b;
both give equally many steps, so that a row's length does not depend on the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Chain(NamedTuple):
    """L latent steps. Unused slots of a step have label 0 and repeat its first id."""

    ids: np.ndarray  # [L, K] int64
    labels: np.ndarray  # [L, K] float32: q, rows sum to 1


class ChainSource(Protocol):
    """A source of soft labels for explicit chains."""

    def chains(self, prompts: Sequence[np.ndarray], cots: Sequence[np.ndarray]) -> list[Chain]:
        """Returns one chain of :func:`chain_length` steps per row.

        `prompts` [P] int64 and `cots` [N] int64 hold one array per row. The latent-end token is in no `cot` and must be
        in no label.
        """


def chain_length(tokens: int, c: int) -> int:
    """Returns L, the number of latent steps; the last one may stand for fewer than c tokens."""
    return -(-tokens // c)


class UniformChains:
    """Uniform labels: q is uniform over the step's tokens (METHOD §7a)."""

    def __init__(self, c: int, k: int):
        self.c, self.k = c, k

    def chains(self, prompts: Sequence[np.ndarray], cots: Sequence[np.ndarray]) -> list[Chain]:
        """Returns the chain of each problem; the prompts are not looked at."""
        return [build_chain(cot, self.c, self.k) for cot in cots]


def build_chain(cot_ids: Sequence[int] | np.ndarray, c: int, k: int, latent_end_id: int | None = None) -> Chain:
    """Makes one step of every c consecutive tokens, q uniform over them, equal tokens merged (METHOD §7a).

    The last step may be shorter. The latent-end token is never in a label: as a proxy it would end the chain.
    """
    if c < 1 or k < c:
        raise ValueError(f"a latent step of k = {k} ids cannot hold c = {c} tokens; need 1 <= c <= k")
    tokens = [int(i) for i in cot_ids if i != latent_end_id]
    steps = [tokens[start : start + c] for start in range(0, len(tokens), c)]
    ids, labels = [], []
    for step in steps:
        distinct = list(dict.fromkeys(step))
        unused = k - len(distinct)
        ids.append(distinct + [distinct[0]] * unused)
        labels.append([step.count(i) / len(step) for i in distinct] + [0.0] * unused)
    shape = (len(steps), k)
    return Chain(np.array(ids, dtype=np.int64).reshape(shape), np.array(labels, dtype=np.float32).reshape(shape))
