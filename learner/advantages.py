"""METHOD §4: advantages, the first-token winner and the groups worth training on. Pure; statistics in float64."""

from __future__ import annotations

import numpy as np
import torch

MASKINGS = ("exclude", "include", "off")


def _array(values) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _like(result: np.ndarray, given):
    return torch.from_numpy(result).to(given.device) if isinstance(given, torch.Tensor) else result


def _statistics_mask(rewards, valid, graded, masking: str) -> tuple[np.ndarray, np.ndarray]:
    """`graded` and S: the samples that enter the statistics (METHOD §4.1), both [B] bool. A NaN reward is ungraded."""
    if masking not in MASKINGS:
        raise ValueError(f"masking must be one of {', '.join(MASKINGS)}, got {masking!r}")
    graded = ~np.isnan(rewards) if graded is None else _array(graded).astype(bool) & ~np.isnan(rewards)
    return graded, (graded & valid if masking == "exclude" else graded)


def group_advantages(rewards, groups, valid, *, graded=None, masking="exclude", scale_by_std=True):
    """Advantage of every sample, [B] float32, without first-token selection (METHOD §4.1).

    `rewards` [B] float (NaN: ungraded), `groups` [B] integer ids, `valid` [B] bool (finish reason `stop`), `graded` [B]
    bool. NumPy or torch in, the same kind out. A group with fewer than two samples in its statistics, or with all
    rewards equal, gets exactly 0. Raises ValueError for an unknown `masking`.
    """
    reward, valid_here = _array(rewards).astype(np.float64), _array(valid).astype(bool)
    is_graded, in_statistics = _statistics_mask(reward, valid_here, graded, masking)
    owns_advantage = is_graded if masking == "off" else is_graded & valid_here
    result = np.zeros(len(reward), dtype=np.float32)
    _, group = np.unique(_array(groups), return_inverse=True)
    for index in range(group.max(initial=-1) + 1):
        members = group == index
        sample = reward[members & in_statistics]
        if len(sample) < 2 or (sample == sample[0]).all():
            continue
        scale = sample.std(ddof=1) + 1e-6 if scale_by_std else 1.0
        rows = members & owns_advantage
        result[rows] = (reward[rows] - sample.mean()) / scale
    return _like(result, rewards)


def first_token_mask(advantages, groups, valid, mean_old_log_probs):
    """Which samples keep their advantage at the first response step (METHOD §4.2): [B] bool.

    In each group the winner is the valid sample with A > 0 of the highest mean old log-prob over its steps, ties to the
    first row; every other sample of the group gets False. A group without such a sample is all True.
    """
    advantage, mean = _array(advantages), _array(mean_old_log_probs)
    candidate = _array(valid).astype(bool) & (advantage > 0)
    keep = np.ones(len(advantage), dtype=bool)
    _, group = np.unique(_array(groups), return_inverse=True)
    for index in np.unique(group[candidate]):
        members = np.flatnonzero(group == index)
        rows = members[candidate[members]]
        keep[members] = False
        keep[rows[np.argmax(mean[rows])]] = True
    return _like(keep, advantages)


def drop_reason(rewards, valid, *, graded=None, masking="exclude") -> str | None:
    """Why one group has nothing to learn from (METHOD §4.3); None: it is kept. `rewards`, `valid`: [G]."""
    reward, valid_here = _array(rewards).astype(np.float64), _array(valid).astype(bool)
    is_graded, in_statistics = _statistics_mask(reward, valid_here, graded, masking)
    sample = reward[in_statistics]
    if not is_graded.any():
        return "ungraded"
    if len(sample) < 2:
        return "too_few_valid"
    if (sample == sample[0]).all():
        return "all_equal"
    advantage = group_advantages(reward, np.zeros(len(reward), int), valid_here, graded=is_graded, masking=masking)
    return None if (advantage != 0).any() else "no_advantage"
