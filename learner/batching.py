"""The plan of a step, which assigns a batch's rows to ranks, and the tensors of a micro-batch.

Pure: no Ray, no DeepSpeed, no model.

Every rank sees the whole batch (a few megabytes) and computes the same plan, so nothing about it is communicated.
ZeRO's collectives need equal numbers of forward passes, and of calls of every layer, on all ranks: ranks are padded
with empty micro-batches, and all ranks split their positions into the same number of chunks for the output layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from latent_grpo.common.schema import TrajectoryBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward pass of one rank. Without rows the rank takes part in the collectives and contributes nothing."""

    rows: tuple[int, ...]
    chunks: int  # pieces that the positions are split into at the output layer; equal on all ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """The rows from which one optimizer update is computed (METHOD symbols)."""

    rows: tuple[int, ...]  # of all ranks, in the batch's order
    ranks: tuple[tuple[MicroBatch, ...], ...]  # [ranks][micro-batches], equally many on every rank


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
) -> tuple[MiniBatch, ...]:
    """Plans mini-batches in prompt order, deals their rows to ranks by tokens and packs them into micro-batches.

    `prompt_lengths`, `num_steps`, `groups` [B]; groups numbered as by :func:`group_indices`. The padded size of a
    micro-batch, rows * longest, stays within `tokens_per_microbatch` unless a single row is longer. Deterministic.
    """
    for name, value in (("minibatch_prompts", minibatch_prompts), ("ranks", ranks), ("chunk_tokens", chunk_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    steps, group = np.asarray(num_steps, dtype=np.int64), np.asarray(groups, dtype=np.int64)
    lengths = np.asarray(prompt_lengths, dtype=np.int64) + np.maximum(steps, 1) - 1
    result = []
    for first in range(0, int(group.max(initial=-1)) + 1, minibatch_prompts):
        rows = np.flatnonzero((group >= first) & (group < first + minibatch_prompts))
        packed = [_pack(share, lengths, tokens_per_microbatch) for share in _deal(rows, lengths, ranks)]
        count = max(len(p) for p in packed)
        packed = [p + [()] * (count - len(p)) for p in packed]
        chunks = [max(1, *(-(-int(steps[list(p[i])].sum()) // chunk_tokens) for p in packed)) for i in range(count)]
        result.append(
            MiniBatch(
                rows=tuple(rows.tolist()),
                ranks=tuple(
                    tuple(MicroBatch(rows=part, chunks=c) for part, c in zip(p, chunks, strict=True)) for p in packed
                ),
            )
        )
    return tuple(result)


def _deal(rows: np.ndarray, lengths: np.ndarray, ranks: int) -> list[list[int]]:
    """Deals rows longest first, each to the rank with the fewest tokens (then the lowest number)."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for row in sorted(rows.tolist(), key=lambda r: (-lengths[r], r)):
        target = min(range(ranks), key=lambda r: (load[r], r))
        shares[target].append(row)
        load[target] += int(lengths[row])
    return shares


def _pack(rows: list[int], lengths: np.ndarray, budget: int) -> list[tuple[int, ...]]:
    """Packs rows sorted by falling length, for little padding; a micro-batch ends where one more exceeds the budget."""
    packed: list[tuple[int, ...]] = []
    current: list[int] = []
    for row in rows:
        if current and (len(current) + 1) * int(lengths[current[0]]) > budget:
            packed.append(tuple(current))
            current = []
        current.append(row)
    if current:
        packed.append(tuple(current))
    return packed


# --- the tensors of a micro-batch --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayInputs:
    """The tensors of a micro-batch: R sequences, right-padded to S, with F fed latent steps and N response steps.

    W is max(K, 1).

    A sequence is the prompt and all response steps but the last, which is only predicted. Padding lies to the right, so
    causal attention needs no mask. A hard step's id and log-prob lie in column 0, and its other columns repeat them.
    """

    ids: torch.Tensor  # [R, S] int64: prompt and hard ids; 0 at latent positions and padding
    fed_rows: torch.Tensor  # [F] int64: where mixtures are fed
    fed_positions: torch.Tensor  # [F] int64
    fed_ids: torch.Tensor  # [F, W] int64
    fed_weights: torch.Tensor  # [F, W] float32: softmax(r / tau) (METHOD §1)
    rows: torch.Tensor  # [N] int64: sequence of a step
    positions: torch.Tensor  # [N] int64: whose hidden state predicts the step
    selected: torch.Tensor  # [N, W] int64: ids whose log-probs are wanted
    temperatures: torch.Tensor  # [N] float32: 1 for latent steps (METHOD §3.1, §3.3)
    latent: torch.Tensor  # [N] bool
    scores: torch.Tensor  # [N, W] float32: recorded r; 0 for hard steps
    weights: torch.Tensor  # [N, W] float32: softmax(r / tau); 0 for hard steps
    behaviour: torch.Tensor  # [N, W] float32: recorded log-probs
    batch_rows: torch.Tensor  # [N] int64: row of the record batch
    steps: torch.Tensor  # [N] int64: number of the step in its response, from 0
    chunks: int

    def to(self, device: str | torch.device) -> ReplayInputs:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "chunks"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def collate(view: TrajectoryBatch, rows: Sequence[int], chunks: int = 1) -> ReplayInputs:
    """Makes tensors of the rows of a record batch; without rows, one padding token without any step."""
    width = max(view.k, 1)
    lengths = [len(view.prompt_ids[r]) + max(int(view.num_steps[r]), 1) - 1 for r in rows]
    ids = np.zeros((max(len(rows), 1), max(lengths, default=1)), dtype=np.int64)
    parts: dict[str, list[np.ndarray]] = {f.name: [] for f in fields(ReplayInputs) if f.name not in ("ids", "chunks")}
    temperature = view.numbers("sampling_temperature").astype(np.float32)
    tau = view.numbers("sampling_tau").astype(np.float32)
    for i, row in enumerate(rows):
        prompt, hard = view.prompt_ids[row], view.hard_ids[row]
        latents, start = int(view.num_latent_steps[row]), len(prompt)
        total = latents + len(hard)
        fed = min(latents, max(total - 1, 0))
        ids[i, :start] = prompt
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
            "positions": start - 1 + step,
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
    return ReplayInputs(
        ids=torch.from_numpy(ids), chunks=chunks, **{name: _joined(name, part, width) for name, part in parts.items()}
    )


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
