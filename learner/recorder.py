"""Learner records (`common.learner_record`): each rank collects them while its updates run, the driver joins them.

They need no forward pass of their own. A rank's share is an Arrow batch (rows of the batch and their step columns), so
that Ray ships columns.
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
    """The outcome of one update over all ranks."""

    loss: float
    grad_norm: float  # NaN if not applied
    applied: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFacts:
    """Values of all rows of the batch that every rank knows, [B] each."""

    advantages: np.ndarray  # float32, without first-token selection
    mean_old_log_probs: np.ndarray  # float64
    keeps_first: np.ndarray  # bool: keeps its advantage at the first step


@dataclass(slots=True)
class StepCollector:
    """Collects the step columns of a rank's rows, micro-batch by micro-batch."""

    rows: list[np.ndarray] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)
    columns: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {name: [] for name in STEP_COLUMNS})

    def add(self, inputs: ReplayInputs, **columns: torch.Tensor) -> None:
        """Adds a micro-batch with all its step columns, [N] each; rows are in order, and a row's steps lie together."""
        rows = inputs.batch_rows.cpu().numpy()
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        self.rows.append(rows[starts])
        self.lengths.append(np.diff(np.append(starts, len(rows))))
        for name, parts in self.columns.items():
            parts.append(columns[name].detach())

    def batch(self) -> pa.RecordBatch:
        """Returns `row` (int32, in the batch of trajectories) and the step columns. Rows without steps are left out."""
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
    """Returns the share of a latent step's K components whose gradient is the proxy's (METHOD §3.2): [N]; 0 for A >= 0.

    `components` [N, W or more] are log-probs under the policy; `advantages` is [N]. With A = 0 there is no gradient to
    flip.
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
    """Returns the learner records of all rows of `batch`, in its order."""
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
    """Why a row's advantage was set to 0, at all steps or at the first (METHOD §4.1, §4.2): [rows]; "" where not."""
    aborted = np.array([reason == "aborted" for reason in view.strings("finish_reason")], dtype=bool)
    invalid = ~view.valid & (masking in ("exclude", "include"))
    conditions = [aborted, np.isnan(view.rewards), invalid, ~keeps_first]
    return np.select(conditions, ["aborted", "ungraded", "invalid", "first_step"], default="")


def _in_batch_order(shares: list[pa.RecordBatch], num_steps: np.ndarray) -> dict[str, Ragged]:
    """Joins the ranks' step columns, rows in the batch's order; a row without steps is empty."""
    offsets = np.concatenate([[0], np.cumsum(num_steps)]).astype(np.int64)
    rows = np.concatenate([share.column("row").to_numpy() for share in shares])
    # the place of each value is its row's start plus its number within the row
    places = [np.arange(offsets[row], offsets[row + 1]) for row in rows]
    target = np.concatenate(places) if places else np.zeros(0, dtype=np.int64)
    columns = {}
    for name, kind in STEP_COLUMNS.items():
        values = np.zeros(offsets[-1], dtype=kind.to_pandas_dtype())
        values[target] = np.concatenate([share.column(name).flatten().to_numpy() for share in shares])
        columns[name] = Ragged(values, offsets.astype(np.int32))
    return columns
