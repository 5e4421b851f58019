"""From what a step computes anyway to learner records (`common.learner_record`): collected on each rank while its
updates run, put together on the driver. No forward pass is made for it.

A rank's share is an Arrow batch of its own (rows of the batch and their step columns), so that Ray ships columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch

from latent_grpo.common.learner_record import STEP_COLUMNS, encode_records
from latent_grpo.common.schema import Ragged, TrajectoryBatch
from latent_grpo.learner.batching import ReplayInputs, group_indices


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateOutcome:
    """One update over all ranks."""

    loss: float
    grad_norm: float  # NaN if not applied
    applied: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFacts:
    """What is known of all rows of the batch on every rank. [B] each."""

    advantages: np.ndarray  # float32, without first-token selection
    mean_old_log_probs: np.ndarray  # float64
    keeps_first: np.ndarray  # bool: keeps its advantage at the first step


@dataclass(slots=True)
class StepCollector:
    """The step columns of a rank's rows, micro-batch by micro-batch."""

    rows: list[np.ndarray] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)
    columns: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {name: [] for name in STEP_COLUMNS})

    def add(self, inputs: ReplayInputs, **columns: torch.Tensor) -> None:
        """`columns`: every step column of the micro-batch, [N] each; steps of a row lie together, rows in order."""
        rows = inputs.batch_rows.cpu().numpy()
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        self.rows.append(rows[starts])
        self.lengths.append(np.diff(np.append(starts, len(rows))))
        for name, parts in self.columns.items():
            parts.append(columns[name].detach())

    def batch(self) -> pa.RecordBatch:
        """`row` (int32: of the batch of trajectories) and the step columns. Rows without any step are left out."""
        rows = np.concatenate(self.rows) if self.rows else np.zeros(0)
        lengths = np.concatenate(self.lengths) if self.lengths else np.zeros(0)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        arrays = [pa.array(rows.astype(np.int32))]
        for name, kind in STEP_COLUMNS.items():
            parts = self.columns[name]
            values = torch.cat(parts).cpu().numpy() if parts else np.zeros(0)
            arrays.append(pa.ListArray.from_arrays(offsets, pa.array(values.astype(kind.to_pandas_dtype()))))
        return pa.RecordBatch.from_arrays(arrays, names=["row", *STEP_COLUMNS])


def flip_shares(components: torch.Tensor, inputs: ReplayInputs, advantages: torch.Tensor, flip: str) -> torch.Tensor:
    """Share of a latent step's K components whose gradient takes the proxy (METHOD §3.2): [N]; 0 where A >= 0.

    `components` [N, W or more]: log-probs under the policy; `advantages` [N]. (With A = 0 there is no gradient to
    turn.)
    """
    components = components[:, : inputs.scores.shape[1]]
    turned = (inputs.scores < components.detach().float()) & (advantages < 0).unsqueeze(-1)
    share = turned.float().mean(-1)
    return torch.where(inputs.latent, share, 0.0) if flip != "off" else torch.zeros_like(share)


def assemble(
    batch: pa.RecordBatch,
    shares: list[pa.RecordBatch],
    facts: RowFacts,
    updates: list[UpdateOutcome],
    *,
    minibatch_prompts: int,
    masking: str,
    first_token: bool,
) -> pa.RecordBatch:
    """Learner records of all rows of `batch`, in its order."""
    view = TrajectoryBatch(batch)
    update = group_indices(view.strings("group_uid")) // minibatch_prompts
    applied = np.array([u.applied for u in updates], dtype=bool)[update]
    masked = mask_reasons(view, facts.keeps_first, masking)
    outcome = np.where(applied, np.where(masked == "", "trained", "masked"), "skipped")
    graded = ~np.isnan(view.rewards)
    winner = facts.keeps_first & view.valid & graded & (facts.advantages > 0)
    rows = {
        "group_uid": batch.column("group_uid"),
        "sample_index": batch.column("sample_index"),
        "outcome": outcome.tolist(),
        "reason": np.where(applied, masked, "non_finite").tolist(),
        "advantage": facts.advantages,
        "winner": winner if first_token else np.zeros(len(view), dtype=bool),
        "mean_old_log_prob": facts.mean_old_log_probs,
        "update_index": update,
        "update_applied": applied,
        "update_loss": np.array([u.loss for u in updates])[update],
        "update_grad_norm": np.array([u.grad_norm for u in updates])[update],
    }
    return encode_records(rows, _in_batch_order(shares, view.num_steps))


def mask_reasons(view: TrajectoryBatch, keeps_first: np.ndarray, masking: str) -> np.ndarray:
    """[rows]: why a row's advantage was set to 0, at all steps or at the first (METHOD §4.1, §4.2); "" where not."""
    aborted = np.array([reason == "aborted" for reason in view.strings("finish_reason")], dtype=bool)
    invalid = ~view.valid & (masking in ("exclude", "include"))
    conditions = [aborted, np.isnan(view.rewards), invalid, ~keeps_first]
    return np.select(conditions, ["aborted", "ungraded", "invalid", "first_step"], default="")


def _in_batch_order(shares: list[pa.RecordBatch], num_steps: np.ndarray) -> dict[str, Ragged]:
    """The ranks' step columns as one, rows in the batch's order; a row without steps is empty."""
    offsets = np.concatenate([[0], np.cumsum(num_steps)]).astype(np.int64)
    rows = np.concatenate([share.column("row").to_numpy() for share in shares])
    # where each value goes: its row's start plus its number within the row
    places = [np.arange(offsets[row], offsets[row + 1]) for row in rows]
    target = np.concatenate(places) if places else np.zeros(0, dtype=np.int64)
    columns = {}
    for name, kind in STEP_COLUMNS.items():
        values = np.zeros(offsets[-1], dtype=kind.to_pandas_dtype())
        values[target] = np.concatenate([share.column(name).flatten().to_numpy() for share in shares])
        columns[name] = Ragged(values, offsets.astype(np.int32))
    return columns
