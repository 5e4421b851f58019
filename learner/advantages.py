"""Advantages, the first-token winner and the groups worth training on (METHOD §4). Pure; statistics in float64.

Rows are samples in any order, and `groups` holds their groups' integer ids. Functions take NumPy arrays or torch
tensors and return the kind (and the device) of their first argument. A sample is graded unless `graded` says otherwise
or its reward is NaN (the record's null); an aborted sample counts as not graded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

MASKINGS = ("exclude", "include", "off")

Column = np.ndarray | torch.Tensor | Sequence[float]
"""One value per sample, [B]."""

Kind = TypeVar("Kind", np.ndarray, torch.Tensor)


@dataclass(frozen=True, slots=True)
class GroupSelection:
    """The groups that dynamic sampling keeps (METHOD §4.3): one entry per group, in ascending order of its id."""

    groups: np.ndarray  # [M] int64: the ids
    reasons: tuple[str, ...]  # [M] why the group is dropped; "" where it is kept

    @property
    def kept(self) -> np.ndarray:
        """Whether a group is kept, [M] bool."""
        return np.array([not reason for reason in self.reasons], dtype=bool)


@dataclass(frozen=True, slots=True)
class _Samples:
    """The samples with their groups numbered 0..M-1, and how each one counts (METHOD §4.1)."""

    ids: np.ndarray  # [M] int64
    group: np.ndarray  # [B] int64
    rewards: np.ndarray  # [B] float64; 0 where ungraded
    graded: np.ndarray  # [B] bool
    counted: np.ndarray  # [B] bool: S, the samples that enter the statistics
    scored: np.ndarray  # [B] bool: the samples that get an advantage of their own

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sums per group: [M] float64."""
        return np.bincount(self.group, values, minlength=len(self.ids))

    @property
    def size(self) -> np.ndarray:
        """|S| per group: [M]."""
        return self.total(self.counted)

    @property
    def differ(self) -> np.ndarray:
        """Whether two rewards in S differ: [M] bool. Compared, not subtracted from a mean that is rounded."""
        low, high = np.full(len(self.ids), np.inf), np.full(len(self.ids), -np.inf)
        np.minimum.at(low, self.group[self.counted], self.rewards[self.counted])
        np.maximum.at(high, self.group[self.counted], self.rewards[self.counted])
        return low < high

    def advantages(self, scale_by_std: bool) -> np.ndarray:
        size = np.maximum(self.size, 1)
        centred = self.rewards - (self.total(self.rewards * self.counted) / size)[self.group]
        if scale_by_std:
            variance = self.total(centred**2 * self.counted) / np.maximum(size - 1, 1)
            scaled = centred / (np.sqrt(variance) + 1e-6)[self.group]
        else:
            scaled = centred
        return np.where(self.scored & self.differ[self.group], scaled, 0.0).astype(np.float32)


def _array(values: Column) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _like(result: np.ndarray, given: Kind) -> Kind:
    return torch.from_numpy(result).to(given.device) if isinstance(given, torch.Tensor) else result


def _columns(**columns: Column) -> list[np.ndarray]:
    arrays = {name: _array(values) for name, values in columns.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"each column must have one value per sample, [B]; got {shapes}")
    return list(arrays.values())


def _samples(rewards: Column, groups: Column, valid: Column, graded: Column | None, masking: str) -> _Samples:
    if masking not in MASKINGS:
        raise ValueError(f"masking must be one of {', '.join(MASKINGS)}, got {masking!r}")
    graded = np.ones(len(rewards), dtype=bool) if graded is None else graded
    rewards, groups, valid, graded = _columns(rewards=rewards, groups=groups, valid=valid, graded=graded)
    rewards, valid = rewards.astype(np.float64), valid.astype(bool)
    graded = graded.astype(bool) & ~np.isnan(rewards)
    if np.isinf(rewards[graded]).any():
        raise ValueError("rewards must be finite, or NaN where ungraded; got inf. Check the verifier")
    ids, group = np.unique(groups.astype(np.int64), return_inverse=True)
    return _Samples(
        ids=ids,
        group=group,
        rewards=np.where(graded, rewards, 0.0),
        graded=graded,
        counted=graded & valid if masking == "exclude" else graded,
        scored=graded if masking == "off" else graded & valid,
    )


def group_advantages(
    rewards: Kind,
    groups: Column,
    valid: Column,
    *,
    graded: Column | None = None,
    masking: str = "exclude",
    scale_by_std: bool = True,
) -> Kind:
    """Advantage of every sample, [B] float32, without first-token selection (METHOD §4.1).

    `rewards` [B] float, `groups` [B] integer ids, `valid` [B] bool (finish reason `stop`), `graded` [B] bool. A group
    with fewer than two samples in its statistics, or with all their rewards equal, gets exactly 0, and so does a
    sample that is ungraded or, unless `masking` is "off", invalid. Raises ValueError for an unknown
    `masking`, columns of different lengths and infinite rewards.
    """
    return _like(_samples(rewards, groups, valid, graded, masking).advantages(scale_by_std), rewards)


def first_token_mask(advantages: Kind, groups: Column, valid: Column, mean_old_log_probs: Column) -> Kind:
    """Returns which samples keep their advantage at the first response step (METHOD §4.2): [B] bool.

    In each group the winner is the valid sample with A > 0 of the highest mean old log-prob over its steps; every other
    sample of the group gets False. Ties go to the first row: give a group's rows in the order of their sample indices.
    A group without such a sample is all True. Raises ValueError where a candidate's mean log-prob is NaN.
    """
    advantage, groups, valid, mean = _columns(
        advantages=advantages, groups=groups, valid=valid, mean_old_log_probs=mean_old_log_probs
    )
    _, group = np.unique(groups, return_inverse=True)
    candidates = np.flatnonzero(valid.astype(bool) & (advantage > 0))
    if np.isnan(mean[candidates]).any():
        raise ValueError("mean_old_log_probs must not be NaN for valid samples with a positive advantage, got NaN")
    ranked = candidates[np.lexsort((candidates, -mean[candidates], group[candidates]))]
    led, first = np.unique(group[ranked], return_index=True)
    keep = ~np.isin(group, led)
    keep[ranked[first]] = True
    return _like(keep, advantages)


def keep_groups(
    rewards: Column, groups: Column, valid: Column, *, graded: Column | None = None, masking: str = "exclude"
) -> GroupSelection:
    """Returns which groups have something to teach (METHOD §4.3), and why the others have not. All columns are [B].

    Reasons: `ungraded` (no sample was graded), `too_few_valid` (fewer than two samples in the statistics),
    `all_equal` (their rewards), `no_advantage` (rewards differ, but only among samples whose advantage is masked).
    """
    samples = _samples(rewards, groups, valid, graded, masking)
    teaches = samples.total(samples.advantages(scale_by_std=False) != 0) > 0
    conditions = [
        samples.total(samples.graded) == 0,
        samples.size < 2,
        ~samples.differ,
        ~teaches,
    ]
    reasons = np.select(conditions, ["ungraded", "too_few_valid", "all_equal", "no_advantage"], default="")
    return GroupSelection(samples.ids, tuple(reasons.tolist()))
