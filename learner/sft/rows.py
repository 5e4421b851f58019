"""The training rows of Latent-SFT, one per problem (METHOD §7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from latent_grpo.common.config import ConfigError
from latent_grpo.common.golds import alternatives
from latent_grpo.learner.sft.soft_labels import Chain, UniformChains

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMPTY = Chain(np.zeros((0, 1), dtype=np.int64), np.zeros((0, 1), dtype=np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTRow:
    """One problem: prompt, then either a latent or an explicit chain, then the visible part."""

    prompt_ids: np.ndarray  # [P] int64
    cot_ids: np.ndarray  # [N] int64: what the latent steps stand for, without the latent-end token; N = 0 if explicit
    chain: Chain  # uniform labels (METHOD §7a); L = 0 in explicit mode
    hard_ids: np.ndarray  # [H] int64: (explicit chain,) end of thinking, solution or boxed answer, EOS

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.chain.ids) + len(self.hard_ids)


class ChainTooShort(ConfigError):
    """A chain of thought that does not fill one latent step."""


@dataclass(frozen=True, slots=True)
class EncodedChain:
    """A problem's chain and answer as token ids, which is all that a row needs from the tokenizer; made once each."""

    cot_ids: np.ndarray  # [N] int32: what the latent steps stand for, without the latent-end token; N = 0 if explicit
    hard_ids: np.ndarray  # [H] int32: (explicit chain,) end of thinking, solution or boxed answer, EOS

    def row(self, prompt_ids: np.ndarray, *, c: int, k: int) -> SFTRow:
        """Returns the training row with uniform labels (METHOD §7a)."""
        cot = self.cot_ids.astype(np.int64)
        return SFTRow(
            prompt_ids=np.asarray(prompt_ids, dtype=np.int64),
            cot_ids=cot,
            chain=UniformChains(c, k).chains([prompt_ids], [cot])[0] if len(cot) else EMPTY,
            hard_ids=self.hard_ids.astype(np.int64),
        )

    def steps(self, c: int) -> int:
        """Returns the row's number of response steps: latent ones of c tokens each, and hard ones."""
        return -(-len(self.cot_ids) // c) + len(self.hard_ids)


def visible_text(answer: str, think_end: str = "</think>", solution: str = "") -> str:
    """Returns a row's visible text: the end of thinking, then the whole solution, or without one the boxed answer.

    Of several gold answers it is the first one. An end of thinking inside the solution is left out, since the row has
    its own (METHOD §7).
    """
    shown = (solution.replace(think_end, "") if think_end else solution) or f"\\boxed{{{alternatives(answer)[0]}}}"
    return think_end + shown


def encode_chain(
    tokenizer: PreTrainedTokenizerBase,
    cot: str,
    answer: str,
    *,
    c: int,
    latent_end_id: int | None,
    think_end: str = "</think>",
    explicit: bool = False,
    solution: str = "",
) -> EncodedChain:
    """Encodes a problem's chain and answer; `explicit` keeps the chain as hard tokens (the baseline's start).

    Raises ConfigError for an empty chain, and as :func:`chain_of_ids` does.
    """
    if not cot.strip():
        raise ConfigError("Latent-SFT needs an explicit chain of thought, got an empty one; set the task's columns.cot")
    cot_ids = tokenizer.encode(cot, add_special_tokens=False)
    visible = tokenizer.encode(visible_text(answer, think_end, solution), add_special_tokens=False)
    eos_id = tokenizer.eos_token_id
    return chain_of_ids(
        cot_ids, visible, eos_id, c=c, latent_end_id=latent_end_id, think_end=think_end, explicit=explicit
    )


def chain_of_ids(
    cot_ids: Sequence[int] | np.ndarray,
    visible_ids: Sequence[int] | np.ndarray,
    eos_id: int,
    *,
    c: int,
    latent_end_id: int | None,
    think_end: str,
    explicit: bool,
) -> EncodedChain:
    """Makes a chain of the ids of a problem's chain of thought and of its :func:`visible_text`.

    Raises ConfigError for an end of thinking that the tokenizer merges with the answer, and (:class:`ChainTooShort`)
    for a chain of fewer than c tokens.
    """
    cot, visible = np.asarray(cot_ids, dtype=np.int32), np.asarray(visible_ids, dtype=np.int32)
    if latent_end_id is not None and visible[0] != latent_end_id:
        raise ConfigError(
            f"{think_end!r} starts with token {visible[0]} before the answer, but with {latent_end_id} by itself: the "
            "tokenizer merges it with what follows; use another prompt.think_end"
        )
    compressed = cot[:0] if explicit else cot[cot != (-1 if latent_end_id is None else latent_end_id)]
    if not explicit and len(compressed) < c:
        raise ChainTooShort(
            f"the chain of thought has {len(compressed)} token(s), fewer than one latent step stands for "
            f"(warm_start.compression {c}); lower warm_start.compression, or leave the problem out"
        )
    hard = [cot if explicit else cot[:0], visible, np.array([eos_id], dtype=np.int32)]
    return EncodedChain(compressed, np.concatenate(hard))
