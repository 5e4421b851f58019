"""Stage 1 of Latent-SFT: soft labels that a trained encoder induces (METHOD §7b). Pure torch.

Two models begin as copies of the initial one. The *encoder* reads the problem and its explicit chain, with a slot after
every c tokens; the state of a slot, projected on the vocabulary, is the latent step q (top-K softmax). The *decoder*
gets the mixtures in the chain's place and must write on::

    encoder   prompt <think> t1 t2 [s1] t3 t4 [s2] t5 t6 [s3]
    decoder   prompt <think> [q1] t3 t4 [q2] t5 t6 [q3] </think> \\boxed{7} <eos>
                              text       text       answer        cross-entropy on what is marked

Two masks give the latent steps their meaning:

* *induction* (encoder): nothing after a slot sees it, so each slot summarises text and not other slots;
* *supervision* (decoder): text after a slot sees that slot and its own segment only (a step must be compact enough to
  predict what comes next), the answer sees prompt and slots but no text (the chain must suffice for it). A slot sees
  the prompt and the slots before it, as a latent step does at inference.

Positions skip what is masked: to the answer the slots lie at P, P+1, ..., exactly where latent steps lie in stage 2.
The slot token is the latent-end token: no chain contains it, and the encoder has an embedding of its own for it.
The decoder's input embeddings stay frozen, so that a label means the same mixture before and after.

While the encoder learns alone, its labels are also pulled towards the uniform ones (an *anchor*, ours): the decoder has
not seen a slot by then, and a small encoder learned next to nothing from it without an anchor (docs/latent_sft.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from latent_grpo.common.head import float32_logits, install_float32_head
from latent_grpo.common.latent import mix_embeddings
from latent_grpo.learner.policy import checkpoint_layers
from latent_grpo.learner.sft.soft_labels import Chain, chain_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Phase = Literal["encoder", "decoder", "union"]
PHASES: tuple[Phase, ...] = ("encoder", "decoder", "union")
ENCODER, DECODER = "encoder", "decoder"
"""The two models in a folder of stage 1. Whatever continues from it is given the decoder's folder."""


def encoder_beside(decoder: str | Path) -> str:
    """Returns the folder of stage 1's encoder, or the model itself if it has none, of which the encoder is a copy."""
    beside = Path(decoder).parent / ENCODER
    return str(beside if Path(decoder).name == DECODER and (beside / "config.json").is_file() else decoder)


# --- layouts -----------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """One row of either model; T positions."""

    ids: np.ndarray  # [T] int64
    positions: np.ndarray  # [T] int64: of the position embedding
    slots: np.ndarray  # [T] bool
    visible: np.ndarray  # [T, T] bool: row i sees column j
    text: np.ndarray  # [T] bool: to be predicted from what comes before
    answer: np.ndarray  # [T] bool: to be predicted from prompt and slots


def encoder_layout(prompt: np.ndarray, cot: np.ndarray, c: int, slot_id: int) -> Layout:
    """Lays out the prompt, then the chain with a slot after every c tokens and after the rest (induction mask)."""
    start, ids, positions, is_slot = len(prompt), list(prompt), list(range(len(prompt))), [False] * len(prompt)
    for first in range(0, len(cot), c):
        segment = cot[first : first + c]
        ids += [*segment, slot_id]
        # a slot is no text, so it does not move the positions that follow
        positions += range(start + first, start + first + len(segment) + 1)
        is_slot += [False] * len(segment) + [True]
    slots = np.array(is_slot)
    visible = np.tril(np.ones((len(ids), len(ids)), dtype=bool)) & ~slots[None, :]
    np.fill_diagonal(visible, True)
    nothing = np.zeros(len(ids), dtype=bool)
    return Layout(np.array(ids), np.array(positions), slots, visible, nothing, nothing)


def decoder_layout(prompt: np.ndarray, cot: np.ndarray, hard: np.ndarray, c: int, slot_id: int) -> Layout:
    """Lays out prompt; slot 1, segment 2, slot 2, segment 3, ...; end of thinking and answer (supervision mask)."""
    start, steps = len(prompt), chain_length(len(cot), c)
    ids, positions, parts = list(prompt), list(range(start)), [0] * start  # part 0: prompt; i: text after slot i
    is_slot, answer = [False] * start, steps + 1
    for step in range(1, steps + 1):
        segment = cot[step * c : (step + 1) * c]
        ids += [slot_id, *segment]
        positions += range(start + step - 1, start + step + len(segment))
        parts += [step] * (1 + len(segment))
        is_slot += [True] + [False] * len(segment)
    ids += list(hard)
    positions += range(start + steps, start + steps + len(hard))
    parts += [answer] * len(hard)
    is_slot += [False] * len(hard)
    part, slots = np.array(parts), np.array(is_slot)
    same, prompt_column, slot_column = part[:, None] == part[None, :], part[None, :] == 0, slots[None, :]
    whole = slots | (part == answer) | (part == 0)  # rows that see the prompt, and every slot before them
    causal = np.tril(np.ones((len(ids), len(ids)), dtype=bool))
    visible = causal & (same | (whole[:, None] & (prompt_column | slot_column)))
    in_text = ~slots & (part > 0) & (part < answer)
    return Layout(np.array(ids), np.array(positions), slots, visible, in_text, part == answer)


# --- batches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """B rows of one model, padded on the right to T positions."""

    ids: torch.Tensor  # [B, T] int64
    positions: torch.Tensor  # [B, T] int64
    slots: torch.Tensor  # [B, T] bool
    visible: torch.Tensor  # [B, 1, T, T] bool
    text: torch.Tensor  # [B, T] bool
    answer: torch.Tensor  # [B, T] bool

    def to(self, device: torch.device | str) -> Side:
        """Returns the tensors on a device."""
        return Side(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class InductionBatch:
    """Both models' sides of the same rows; slot n of one is slot n of the other, in row-major order."""

    encoder: Side
    decoder: Side
    anchor_ids: torch.Tensor  # [slots, K] int64: the uniform labels of the same steps (METHOD §7a)
    anchor_labels: torch.Tensor  # [slots, K] float32
    shuffled: bool = False  # the decoder gets other rows' slots: a control that it reads its own
    calls: tuple[int, int, int] = (0, 0, 0)  # output-layer calls for text, answer and slots that every rank makes

    def to(self, device: torch.device | str) -> InductionBatch:
        """Returns the batch on a device."""
        moved = {n: getattr(self, n).to(device) for n in ("encoder", "decoder", "anchor_ids", "anchor_labels")}
        return replace(self, **moved)


class Example(Protocol):
    """A row of Latent-SFT (`learner.sft.module.SFTRow`)."""

    @property
    def prompt_ids(self) -> np.ndarray:
        """The prompt's token ids, [P] int64."""

    @property
    def cot_ids(self) -> np.ndarray:
        """The token ids of the chain of thought, [N] int64."""

    @property
    def chain(self) -> Chain:
        """The chain with uniform labels."""

    @property
    def hard_ids(self) -> np.ndarray:
        """The token ids from the end of thinking to EOS, [H] int64."""


def collate(
    rows: Sequence[Example],
    *,
    c: int,
    slot_id: int,
    pad_id: int,
    calls: tuple[int, int, int] = (0, 0, 0),
    shuffled: bool = False,
) -> InductionBatch:
    """Makes a batch of rows for both models."""
    return InductionBatch(
        encoder=pad([encoder_layout(row.prompt_ids, row.cot_ids, c, slot_id) for row in rows], pad_id),
        decoder=pad([decoder_layout(row.prompt_ids, row.cot_ids, row.hard_ids, c, slot_id) for row in rows], pad_id),
        anchor_ids=torch.from_numpy(np.concatenate([row.chain.ids for row in rows])),
        anchor_labels=torch.from_numpy(np.concatenate([row.chain.labels for row in rows])),
        calls=calls,
        shuffled=shuffled,
    )


def pad(layouts: Sequence[Layout], pad_id: int) -> Side:
    """Pads layouts to a batch. Padding sees itself only, since a position that sees nothing would divide by zero."""
    size, width = len(layouts), max(len(layout.ids) for layout in layouts)
    side = {
        "ids": np.full((size, width), pad_id, dtype=np.int64),
        "positions": np.zeros((size, width), dtype=np.int64),
        "slots": np.zeros((size, width), dtype=bool),
        "visible": np.tile(np.eye(width, dtype=bool), (size, 1, 1, 1)),
        "text": np.zeros((size, width), dtype=bool),
        "answer": np.zeros((size, width), dtype=bool),
    }
    for row, layout in enumerate(layouts):
        length = len(layout.ids)
        for name, values in layout._asdict().items():
            if name == "visible":
                side[name][row, 0, :length, :length] = values
            else:
                side[name][row, :length] = values
    return Side(**{name: torch.from_numpy(values) for name, values in side.items()})


# --- the two models ----------------------------------------------------------------------------------------------


class InductionParts(NamedTuple):
    """Sums of losses with gradient, to be divided by the global counts."""

    text_sum: torch.Tensor  # cross-entropies of the text after slots
    text_count: torch.Tensor
    answer_sum: torch.Tensor  # of the end of thinking, the answer and EOS
    answer_count: torch.Tensor
    anchor_sum: torch.Tensor  # KL(anchor || p) of the slots
    slot_count: torch.Tensor

    def combine(self, text: float, answer: float, slots: float, anchor: float = 0.0) -> torch.Tensor:
        """Returns the loss: means over the given global counts; `anchor` weights the distance to uniform labels."""
        loss = self.text_sum / max(text, 1.0) + self.answer_sum / max(answer, 1.0)
        return loss + anchor * self.anchor_sum / max(slots, 1.0) if anchor else loss


class Mixtures(NamedTuple):
    """Mixtures of all slots of a batch, row by row."""

    ids: torch.Tensor  # [slots, K] int64
    weights: torch.Tensor  # [slots, K] float32, descending
    anchor_sum: torch.Tensor  # sum of KL(anchor || p) over the slots; 0 without an anchor


class Encoder(nn.Module):
    """The encoder, which makes a mixture for every slot. It is the part of stage 1 that stage 2 still uses.

    The projection on the vocabulary is the model's own output layer (of a model with tied embeddings: its embeddings).
    """

    allowed: torch.Tensor  # [V] bool

    def __init__(self, model: PreTrainedModel, *, k: int, allowed: torch.Tensor | np.ndarray, chunk_tokens: int = 2048):
        super().__init__()
        install_float32_head(model)
        self.model, self.k, self.chunk_tokens = model, k, chunk_tokens
        self.register_buffer("allowed", torch.as_tensor(allowed, dtype=torch.bool).clone(), persistent=False)

    def forward(self, side: Side, anchor: tuple[torch.Tensor, torch.Tensor] | None = None, least: int = 0) -> Mixtures:
        """Returns the mixtures of all slots. `anchor` holds ids and labels [slots, K] to compare the softmax with."""
        hidden = self.model.base_model(
            input_ids=side.ids, attention_mask=side.visible, position_ids=side.positions, use_cache=False
        ).last_hidden_state
        states, head = hidden[side.slots], self.model.get_output_embeddings()
        count = max(-(-len(states) // self.chunk_tokens), least, 1)
        pieces = []
        for index, piece in enumerate(states.tensor_split(count)):
            given = [] if anchor is None else [t.tensor_split(count)[index] for t in anchor]
            pieces.append(checkpoint(self._mixtures, head, piece, *given, use_reentrant=False))
        ids, weights, anchors = zip(*pieces, strict=True)
        return Mixtures(torch.cat(ids), torch.cat(weights), torch.stack(anchors).sum())

    def _mixtures(
        self, head: nn.Module, states: torch.Tensor, *anchor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = float32_logits(head, states).masked_fill(~self.allowed, -torch.inf)
        values, ids = logits.topk(self.k, dim=-1)
        distance = values.new_zeros(())
        if anchor:
            target_ids, labels = anchor
            log_p = torch.log_softmax(logits, dim=-1).gather(-1, target_ids)
            distance = (torch.xlogy(labels, labels) - labels * log_p).sum()
        return ids, torch.softmax(values, dim=-1), distance


class InductionModule(nn.Module):
    """Computes a step's loss.

    `phase` says which model learns (METHOD §7b's three steps); `allowed` [V] bool marks the ids of labels.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        decoder: PreTrainedModel,
        *,
        k: int,
        phase: Phase,
        allowed: torch.Tensor | np.ndarray,
        chunk_tokens: int = 2048,
        gradient_checkpointing: bool | int = False,
    ):
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            for model in (encoder, decoder):
                model.gradient_checkpointing_enable({"use_reentrant": False})
        self.encoder = Encoder(encoder, k=k, allowed=allowed, chunk_tokens=chunk_tokens)
        install_float32_head(decoder)
        self.decoder = decoder
        self.chunk_tokens = chunk_tokens
        encoder.requires_grad_(phase != "decoder")
        decoder.requires_grad_(phase != "encoder")
        decoder.get_input_embeddings().requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> InductionModule:
        """Stays in evaluation mode, like the policy."""
        super().train(False)
        if self.gradient_checkpointing:
            for part in (self.encoder, self.decoder):
                checkpoint_layers(part, self.gradient_checkpointing)
        return self

    def forward(self, batch: InductionBatch) -> InductionParts:
        text, answer, slots = batch.calls
        ids, weights, anchor_sum = self.encoder(batch.encoder, (batch.anchor_ids, batch.anchor_labels), slots)
        if batch.shuffled:
            ids, weights = ids.roll(len(ids) // 2, 0), weights.roll(len(ids) // 2, 0)
        side, embed = batch.decoder, self.decoder.get_input_embeddings()
        mixed = mix_embeddings(embed(ids).detach(), weights)
        inputs = embed(side.ids).masked_scatter(side.slots.unsqueeze(-1), mixed)
        hidden = self.decoder.base_model(
            inputs_embeds=inputs, attention_mask=side.visible, position_ids=side.positions, use_cache=False
        ).last_hidden_state
        return InductionParts(
            self._summed(hidden, side, side.text, text),
            side.text.sum(),
            self._summed(hidden, side, side.answer, answer),
            side.answer.sum(),
            anchor_sum,
            side.slots.sum(),
        )

    def _summed(self, hidden: torch.Tensor, side: Side, mask: torch.Tensor, least: int) -> torch.Tensor:
        """Sums the cross-entropies of the marked positions, each predicted at the one before it."""
        rows, places = mask.nonzero(as_tuple=True)
        total, head = hidden.sum() * 0.0, self.decoder.get_output_embeddings()
        count = max(-(-len(rows) // self.chunk_tokens), least, 1)
        for row, place in zip(rows.tensor_split(count), places.tensor_split(count), strict=True):
            states, targets = hidden[row, place - 1], side.ids[row, place]
            total = total + checkpoint(_losses, head, states, targets, use_reentrant=False)
        return total


def _losses(head: nn.Module, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(float32_logits(head, states), ids, reduction="sum")


# --- the labels --------------------------------------------------------------------------------------------------


class InducedChains:
    """A `learner.sft.soft_labels.ChainSource`: the trained encoder's top-K mixtures, without gradient (METHOD §7b)."""

    def __init__(
        self,
        encoder: PreTrainedModel,
        *,
        c: int,
        k: int,
        latent_end_id: int,
        allowed: np.ndarray,
        pad_id: int,
        device: torch.device | str = "cpu",
        tokens_at_once: int = 16384,
    ):
        encoder.requires_grad_(False)
        self._encoder = Encoder(encoder, k=k, allowed=label_ids(allowed, latent_end_id)).eval().to(device)
        self._c, self._slot_id, self._pad_id = c, latent_end_id, pad_id
        self._device, self._tokens_at_once = device, tokens_at_once

    @torch.no_grad()
    def chains(self, prompts: Sequence[np.ndarray], cots: Sequence[np.ndarray]) -> list[Chain]:
        """Returns the chain of each problem, its labels induced by the encoder (METHOD §7b)."""
        layouts = [encoder_layout(p, t, self._c, self._slot_id) for p, t in zip(prompts, cots, strict=True)]
        found: list[Chain] = []
        size = max(self._tokens_at_once // max((len(layout.ids) for layout in layouts), default=1), 1)
        for start in range(0, len(layouts), size):
            part = layouts[start : start + size]
            ids, weights, _ = self._encoder(pad(part, self._pad_id).to(self._device))
            ends = np.cumsum([int(layout.slots.sum()) for layout in part])[:-1]
            pieces = (np.split(a.cpu().numpy(), ends) for a in (ids, weights))
            found += [Chain(*row) for row in zip(*pieces, strict=True)]
        return found


def label_ids(allowed: np.ndarray, latent_end_id: int) -> np.ndarray:
    """Returns which ids a label may hold, [V] bool: the tokenizer's, without the latent-end token."""
    usable = np.array(allowed, dtype=bool, copy=True)
    usable[latent_end_id] = False
    return usable
