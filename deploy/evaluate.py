"""Evaluation (METHOD §8): accuracy, lengths and the invalid rate of a set of groups, per task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from common.schema import TrajectoryBatch, concat


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """One task's figures. Standard error over problems; lengths in response steps, invalid samples included."""

    task: str
    problems: int
    samples: int
    pass_at_1: float
    standard_error: float
    chain_length: float
    latent_length: float
    invalid_rate: float
    ungraded: int  # samples left out of pass@1: their grading failed

    def metrics(self) -> dict[str, float]:
        names = ("pass_at_1", "standard_error", "chain_length", "latent_length", "invalid_rate", "ungraded")
        return {f"{self.task}/{name}": float(getattr(self, name)) for name in names}


def results(groups: Iterable[pa.RecordBatch], together: str | None = None) -> list[TaskResult]:
    """Figures per task, in order of first appearance; `together` names one result of all tasks instead.

    pass@1 is the mean over problems of their samples' mean.
    """
    by_task: dict[str, list[pa.RecordBatch]] = {}
    for group in groups:
        by_task.setdefault(together or group.column("task")[0].as_py(), []).append(group)
    return [_result(task, of_task) for task, of_task in by_task.items()]


def _result(task: str, groups: list[pa.RecordBatch]) -> TaskResult:
    view = TrajectoryBatch(concat(groups))
    rewards = view.rewards
    graded = ~np.isnan(rewards)
    sizes = [group.num_rows for group in groups]
    ends = np.cumsum(sizes)
    means = np.array(
        [
            rewards[end - size : end][graded[end - size : end]].mean()
            for end, size in zip(ends, sizes, strict=True)
            if graded[end - size : end].any()
        ]
    )
    return TaskResult(
        task=task,
        problems=len(groups),
        samples=len(view),
        pass_at_1=float(means.mean()) if len(means) else 0.0,
        standard_error=float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else 0.0,
        chain_length=float(view.num_steps.mean()),
        latent_length=float(view.num_latent_steps.mean()),
        invalid_rate=float((~view.valid).mean()),
        ungraded=int((~graded).sum()),
    )
