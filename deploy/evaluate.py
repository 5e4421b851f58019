"""Evaluation (METHOD §8): accuracy, lengths and the invalid rate of a set of groups, per task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from common.config import ConfigError, RunConfig
from common.models import load_model
from common.schema import TrajectoryBatch, concat
from common.types import GroupRequest
from deploy.controller import gather
from deploy.progress import Reporter
from deploy.run import Run, started
from deploy.run_folder import create_run
from learner.weights import publish


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


Gather = Callable[[list[GroupRequest], Callable[[int], None]], list[pa.RecordBatch]]


def evaluate(run: Run, gather: Gather, step: int, tag: str) -> list[TaskResult]:
    """Every evaluation task on the workers' weights; into the metrics and the summary. `gather` generates groups."""
    requests = list(run.problems.evaluation_requests(tag))
    if not requests:
        return []
    with run.reporter.phase(f"evaluate {tag}", len(requests), "problems") as advance:
        groups = gather(requests, advance)
    found = results(groups)
    values = {name: value for result in found for name, value in result.metrics().items()}
    run.metrics.write(step, values, kind="evaluation", lineage=run.lineage)
    if run.config.dump.evaluation:
        run.store.write(step, concat(groups), "evaluation", run.lineage)
    if tag in ("before", "after"):
        run.record(**{tag: values})
    for result in found:
        run.reporter.say(
            f"{result.task}: pass@1 {result.pass_at_1:.3f} ± {result.standard_error:.3f}, chain length "
            f"{result.chain_length:.1f} ({result.latent_length:.1f} latent), invalid {result.invalid_rate:.1%}"
        )
    return found


def evaluate_model(config: RunConfig, profile: str, reporter: Reporter | None = None) -> list[TaskResult]:
    """A finished model on a profile's evaluation tasks, in a run folder of its own."""
    if not config.evaluation.tasks:
        raise ConfigError(f"profile {profile} has no evaluation.tasks; add one with `name` and `path`")
    reporter = reporter or Reporter()
    folder = create_run(config, f"evaluate-{profile}")
    with started(folder, config, 0, reporter) as run:
        model = load_model(run.initial, config.model.dtype)
        weights = ((name, parameter.detach()) for name, parameter in model.named_parameters())
        run.pool.publish(publish(weights, 0, config.learner.weight_bucket_bytes))
        del model
        return evaluate(run, partial(gather, run.pool), 0, "evaluation")
