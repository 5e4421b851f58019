"""The plan of a step, which assigns a batch's rows to ranks, and the tensors of a micro-batch.

Pure: no Ray, no DeepSpeed, no model.

The unit of the plan is a *sequence*: a prompt and the responses of one or several samples of its group, side by side::

    prompt | response of sample 0 | response of sample 1 | ...        (the last step of each is predicted, not fed)

Each response sees the prompt and itself, and its positions count from the prompt's end, so the prompt is computed once
for all of them. Attention costs the square of a sequence's length, however: a sequence takes another response only
while that costs less than computing the prompt again (:class:`Sharing`).

Every rank sees the whole batch (a few megabytes) and computes the same plan, so nothing about it is communicated.
ZeRO's collectives need equal numbers of forward passes, and of calls of every layer, on all ranks: ranks are padded
with empty micro-batches, and all ranks split their positions into the same number of chunks for the output layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from latent_grpo.common.schema import TrajectoryBatch

MOST_PADDING = 0.05  # of a micro-batch's positions
FAIR_SIZE = 1024  # positions from which on a micro-batch ends rather than takes more padding


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward pass of one rank. Without rows the rank takes part in the collectives and contributes nothing."""

    sequences: tuple[tuple[int, ...], ...]  # rows of each
    chunks: int  # pieces that the positions are split into at the output layer; equal on all ranks

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows of all sequences, in their order."""
        return tuple(row for sequence in self.sequences for row in sequence)


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """The rows from which one optimizer update is computed (METHOD symbols)."""

    rows: tuple[int, ...]  # of all ranks, in the batch's order
    ranks: tuple[tuple[MicroBatch, ...], ...]  # [ranks][micro-batches], equally many on every rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """When samples share a sequence. A token costs as much as `token_in_pairs` pairs of positions in attention.

    In a layer of width D a token takes about 24 D^2 FLOPs (12 D^2 weights) and a pair 4 D, so a token is 6 D pairs.
    """

    token_in_pairs: int

    def pays(self, prompt: int, fed: int, more: int) -> bool:
        """Whether `more` fed steps cost less in a sequence of `prompt` tokens and `fed` steps than in one of their own.

        A shared sequence computes all pairs, since its mask is given as a matrix; one of its own the causal half.
        """
        alone = self.token_in_pairs * (prompt + more) + (prompt + more) ** 2 // 2
        length = prompt + fed
        return self.token_in_pairs * more + (length + more) ** 2 - length**2 < alone


def group_indices(group_uids: Sequence[str]) -> np.ndarray:
    """Numbers the groups in order of first appearance: [B] int64."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(uid, len(numbers)) for uid in group_uids], dtype=np.int64)


def plan(
    prompt_lengths: Sequence[int] | np.ndarray,
    num_steps: Sequence[int] | np.ndarray,
    groups: Sequence[int] | np.ndarray,
    *,
    minibatch_prompts: int,
    ranks: int,
    tokens_per_microbatch: int,
    chunk_tokens: int,
    sharing: Sharing | None = None,
) -> tuple[MiniBatch, ...]:
    """Plans mini-batches in prompt order, deals their sequences to ranks by tokens and packs them into micro-batches.

    `prompt_lengths`, `num_steps`, `groups` [B]; groups numbered as by :func:`group_indices`. The padded size of a
    micro-batch, sequences * longest, stays within `tokens_per_microbatch` unless a single row is longer. Without
    `sharing` each sequence has one row. Deterministic.
    """
    for name, value in (("minibatch_prompts", minibatch_prompts), ("ranks", ranks), ("chunk_tokens", chunk_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    steps, group = np.asarray(num_steps, dtype=np.int64), np.asarray(groups, dtype=np.int64)
    prompts, fed = np.asarray(prompt_lengths, dtype=np.int64), np.maximum(steps, 1) - 1
    result = []
    for first in range(0, int(group.max(initial=-1)) + 1, minibatch_prompts):
        rows = np.flatnonzero((group >= first) & (group < first + minibatch_prompts))
        sequences: list[tuple[int, ...]] = [(row,) for row in rows.tolist()]
        if sharing is not None:  # at least as many sequences as ranks, so that each has its share of the rows
            limits = {"most": max(len(rows) // ranks, 1), "budget": tokens_per_microbatch}
            sequences = _shared(rows.tolist(), prompts, fed, group, sharing, **limits)
        lengths = {rows: int(prompts[rows[0]] + fed[list(rows)].sum()) for rows in sequences}
        packed = [_pack(share, lengths, tokens_per_microbatch) for share in _deal(lengths, ranks)]
        count = max(len(p) for p in packed)
        packed = [p + [()] * (count - len(p)) for p in packed]
        asked = [[sum(int(steps[list(rows)].sum()) for rows in part) for part in p] for p in packed]
        chunks = [max(1, *(-(-a[i] // chunk_tokens) for a in asked)) for i in range(count)]
        result.append(
            MiniBatch(
                rows=tuple(rows.tolist()),
                ranks=tuple(
                    tuple(MicroBatch(sequences=part, chunks=c) for part, c in zip(p, chunks, strict=True))
                    for p in packed
                ),
            )
        )
    return tuple(result)


def _shared(
    rows: list[int],
    prompts: np.ndarray,
    fed: np.ndarray,
    group: np.ndarray,
    sharing: Sharing,
    *,
    most: int,
    budget: int,
) -> list[tuple[int, ...]]:
    """Joins neighbouring rows of a group into sequences of at most `most` rows and `budget` tokens where it pays."""
    sequences: list[list[int]] = []
    length = 0
    for row in rows:
        current = sequences[-1] if sequences else []
        prompt, more = int(prompts[row]), int(fed[row])
        joins = current and group[current[0]] == group[row] and len(current) < most and length + more <= budget
        if joins and sharing.pays(prompt, length - prompt, more):
            current.append(row)
            length += more
        else:
            sequences.append([row])
            length = prompt + more
    return [tuple(sequence) for sequence in sequences]


def _deal(lengths: dict[tuple[int, ...], int], ranks: int) -> list[list[tuple[int, ...]]]:
    """Deals sequences longest first, each to the rank with the fewest tokens (then the lowest number)."""
    shares: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for sequence in sorted(lengths, key=lambda s: (-lengths[s], s)):
        target = min(range(ranks), key=lambda r: (load[r], r))
        shares[target].append(sequence)
        load[target] += lengths[sequence]
    return shares


def _pack(
    sequences: list[tuple[int, ...]], lengths: dict[tuple[int, ...], int], budget: int
) -> list[tuple[tuple[int, ...], ...]]:
    """Packs sequences sorted by falling length into micro-batches of at most `budget` positions.

    A micro-batch also ends where one more sequence would leave more than `MOST_PADDING` of it to padding, once it has a
    fair size: passes that are very small cost more than their padding.
    """
    packed: list[tuple[tuple[int, ...], ...]] = []
    current: list[tuple[int, ...]] = []
    real = 0
    for sequence in sequences:
        length = lengths[sequence]
        padded = (len(current) + 1) * lengths[current[0]] if current else length
        wasteful = real >= FAIR_SIZE and (padded - real - length) > MOST_PADDING * padded
        if current and (padded > budget or wasteful):
            packed.append(tuple(current))
            current, real = [], 0
        current.append(sequence)
        real += length
    if current:
        packed.append(tuple(current))
    return packed


# --- the tensors of a micro-batch --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayInputs:
    """The tensors of a micro-batch: R sequences, right-padded to S, with F fed latent steps and N response steps.

    W is max(K, 1).

    A response has all its steps but the last, which is only predicted. Padding lies to the right, so where each
    sequence has one response causal attention needs no mask. A hard step's id and log-prob lie in column 0, and its
    other columns repeat them.
    """

    ids: torch.Tensor  # [R, S] int64: prompt and hard ids; 0 at latent positions and padding
    fed_rows: torch.Tensor  # [F] int64: where mixtures are fed
    fed_positions: torch.Tensor  # [F] int64
    fed_ids: torch.Tensor  # [F, W] int64
    fed_weights: torch.Tensor  # [F, W] float32: softmax(r / tau) (METHOD §1)
    rows: torch.Tensor  # [N] int64: sequence of a step
    positions: torch.Tensor  # [N] int64: place in the sequence whose hidden state predicts the step
    selected: torch.Tensor  # [N, W] int64: ids whose log-probs are wanted
    temperatures: torch.Tensor  # [N] float32: 1 for latent steps (METHOD §3.1, §3.3)
    latent: torch.Tensor  # [N] bool
    scores: torch.Tensor  # [N, W] float32: recorded r; 0 for hard steps
    weights: torch.Tensor  # [N, W] float32: softmax(r / tau); 0 for hard steps
    behaviour: torch.Tensor  # [N, W] float32: recorded log-probs
    batch_rows: torch.Tensor  # [N] int64: row of the record batch
    steps: torch.Tensor  # [N] int64: number of the step in its response, from 0
    responses: torch.Tensor | None  # [R, S] int64: 0 in the prompt, then the number of the response; None: one each
    position_ids: torch.Tensor | None  # [R, S] int64: they count on from the prompt's end in each response
    chunks: int

    def to(self, device: str | torch.device) -> ReplayInputs:
        """Returns the inputs on a device."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device)
        return replace(self, **moved)

    def attention(self) -> dict[str, torch.Tensor]:
        """Returns what the forward pass of a model is given besides embeddings: nothing where no prompt is shared.

        Else `attention_mask` [R, 1, S, S] bool, by which a position sees the prompt, and its own response up to itself.
        """
        if self.responses is None or self.position_ids is None:
            return {}
        own, place = self.responses, torch.arange(self.responses.shape[1], device=self.responses.device)
        seen = (own.unsqueeze(1) == 0) | (own.unsqueeze(1) == own.unsqueeze(2))  # [R, queries, keys]
        seen &= place <= place.unsqueeze(1)
        return {"attention_mask": seen.unsqueeze(1), "position_ids": self.position_ids}


def collate(view: TrajectoryBatch, sequences: Sequence[Sequence[int]], chunks: int = 1) -> ReplayInputs:
    """Makes tensors of rows of a record batch, by sequences; without any, one padding token without any step.

    Rows of one sequence must have the same prompt.
    """
    width = max(view.k, 1)
    fed_steps = np.maximum(np.asarray(view.num_steps), 1) - 1
    lengths = [len(view.prompt_ids[rows[0]]) + int(fed_steps[list(rows)].sum()) for rows in sequences]
    ids = np.zeros((max(len(sequences), 1), max(lengths, default=1)), dtype=np.int64)
    responses, position_ids = np.zeros_like(ids), np.zeros_like(ids)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in _PER_STEP}
    temperature = view.numbers("sampling_temperature").astype(np.float32)
    tau = view.numbers("sampling_tau").astype(np.float32)
    placed = []  # (sequence, row, place of its first fed step)
    for i, rows in enumerate(sequences):
        prompt = view.prompt_ids[rows[0]]
        ids[i, : len(prompt)] = prompt
        position_ids[i] = np.arange(ids.shape[1])
        start = len(prompt)
        for number, row in enumerate(rows, 1):
            placed.append((i, row, start))
            end = start + int(fed_steps[row])
            responses[i, start:end] = number
            position_ids[i, start:end] = len(prompt) + np.arange(end - start)
            start = end
        responses[i, start:] = len(rows)  # padding follows the last response, and no position sees it
    for i, row, start in placed:
        prompt, hard = view.prompt_ids[row], view.hard_ids[row]
        latents = int(view.num_latent_steps[row])
        total = latents + len(hard)
        fed = min(latents, max(total - 1, 0))
        ids[i, start + latents : start + total - 1] = hard[: max(total - 1 - latents, 0)]
        latent_ids = view.latent_ids[row].reshape(latents, width)
        scores = view.latent_scores[row].reshape(latents, width)
        weights = _softmax(scores / tau[row])
        step = np.arange(total)

        def both(latent: np.ndarray, of_hard: np.ndarray) -> np.ndarray:
            return np.concatenate([latent, np.repeat(of_hard[:, None], width, axis=1).astype(latent.dtype)])

        nothing = np.zeros(len(hard), dtype=np.float32)
        for name, value in {
            "fed_rows": np.full(fed, i),
            "fed_positions": start + np.arange(fed),
            "fed_ids": latent_ids[:fed],
            "fed_weights": weights[:fed],
            "rows": np.full(total, i),
            "positions": np.where(step == 0, len(prompt) - 1, start - 1 + step),  # the prompt's end predicts the first
            "selected": both(latent_ids, hard),
            "temperatures": np.where(step < latents, np.float32(1.0), temperature[row]),
            "latent": step < latents,
            "scores": both(scores, nothing),
            "weights": both(weights, nothing),
            "behaviour": both(view.latent_log_probs[row].reshape(latents, width), view.hard_log_probs[row]),
            "batch_rows": np.full(total, row),
            "steps": step,
        }.items():
            parts[name].append(value)
    shared = any(len(rows) > 1 for rows in sequences)
    return ReplayInputs(
        ids=torch.from_numpy(ids),
        responses=torch.from_numpy(responses) if shared else None,
        position_ids=torch.from_numpy(position_ids) if shared else None,
        chunks=chunks,
        **{name: _joined(name, part, width) for name, part in parts.items()},
    )


_PER_STEP = tuple(f.name for f in fields(ReplayInputs) if f.name not in ("ids", "responses", "position_ids", "chunks"))
_MATRICES = ("fed_ids", "fed_weights", "selected", "scores", "weights", "behaviour")
_FLOATS = ("fed_weights", "temperatures", "scores", "weights", "behaviour")


def _joined(name: str, parts: list[np.ndarray], width: int) -> torch.Tensor:
    dtype = np.float32 if name in _FLOATS else bool if name == "latent" else np.int64
    if not parts:
        return torch.from_numpy(np.zeros((0, width) if name in _MATRICES else 0, dtype=dtype))
    return torch.from_numpy(np.concatenate(parts).astype(dtype))


def _softmax(values: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, computed by torch for the same bits as the engine's."""
    return torch.softmax(torch.from_numpy(np.array(values, dtype=np.float32)), dim=-1).numpy()
