"""The figures of an evaluation (METHOD §8): pass@1 with its interval, pass@k, lengths, invalid rate, averages. Pure.

All uncertainty is over problems: the samples of one problem are averaged first, so that five runs of 30 problems are
30 observations and not 150. Correct is what the verifier calls `correct`, whatever reward it gives.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from latent_grpo.common.config.monitoring_and_checkpoints import EvaluationProtocol
from latent_grpo.common.figure_names import label, protocol_of, titled
from latent_grpo.common.schema import CORRECT, TrajectoryBatch
from latent_grpo.common.types import NoiseMode

Z = 1.959964  # normal quantile of a two-sided 95 % interval
MACRO = "macro average"


@dataclass(frozen=True, slots=True, kw_only=True)
class PassAtK:
    """Unbiased pass@k over the problems that have at least k graded samples."""

    k: int
    value: float
    standard_error: float
    problems: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """One task's figures by one protocol. Lengths are in response steps.

    They include invalid samples, unless the protocol is the authors' and the task a low one (METHOD §8).
    """

    task: str
    problems: int
    samples: int
    pass_at_1: float  # mean over problems of the share of their samples that is correct
    standard_error: float  # of pass@1, over problems
    interval: tuple[float, float]  # 95 % of pass@1 (:func:`interval`)
    runs: tuple[float, ...]  # accuracy of each repetition
    mean_reward: float  # mean over problems of their samples' mean; pass@1, unless a verifier gives other rewards
    chain_length: float
    latent_length: float
    invalid_rate: float
    ungraded: int  # samples left out of pass@1: their grading failed
    pass_at_k: tuple[PassAtK, ...] = field(default=())  # from samples with the run's noise
    protocol: EvaluationProtocol = "ours"
    noise: NoiseMode = "off"  # of the samples of pass@1
    budget: int | None = None  # response steps that a sample may have; None: several or unknown

    @property
    def label(self) -> str:
        """The name of the figures in metrics (`common.figure_names`)."""
        return label(self.task, self.protocol, self.noise)

    @property
    def rules(self) -> str:
        """The protocol for people, with the noise of pass@1 where that is not always off."""
        return protocol_of(self.label)

    @property
    def title(self) -> str:
        """The task with its protocol, for people."""
        return titled(self.label)

    def figures(self) -> dict[str, float]:
        """The stored figures: name -> value."""
        names = ["pass_at_1", "standard_error", "mean_reward", "chain_length", "latent_length", "invalid_rate"]
        names.append("ungraded")
        values = {name: float(getattr(self, name)) for name in names}
        for at in self.pass_at_k:
            values[f"sampled_pass_at_{at.k}"] = at.value
            values[f"sampled_error_at_{at.k}"] = at.standard_error
        return values

    @property
    def other_rewards(self) -> bool:
        """Whether the mean reward says something else than pass@1: a verifier gave others than 1 and 0."""
        return abs(self.mean_reward - self.pass_at_1) > 1e-6

    def metrics(self) -> dict[str, float]:
        """Returns the figures, named `TASK/FIGURE`."""
        return {f"{self.label}/{name}": value for name, value in self.figures().items()}


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Returns the probability that k of `samples` drawn without replacement hold a correct one.

    It is 1 - C(n - c, k) / C(n, k).
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"need 0 <= correct <= samples and 1 <= k <= samples, got n={samples}, c={correct}, k={k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def interval(value: float, standard_error: float, observations: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a rate, for the number of independent observations that its error implies.

    A standard error of 0 (all right or all wrong) implies `observations`; the interval then still has a width, which
    value +- 1.96 standard errors would not have.
    """
    if observations == 0:
        return 0.0, 1.0
    n = float(observations) if standard_error == 0.0 else value * (1.0 - value) / standard_error**2
    n = max(n, 1.0)
    centre = (value + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(value * (1 - value) / n + Z * Z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


# --- from groups ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """A few numbers per sample of a task's groups, so that trajectories need not stay in memory."""

    uncut_lengths: bool = False  # whether lengths are those of the samples that the budget did not cut
    rewards: list[np.ndarray] = field(default_factory=list)  # per group [samples] float32; NaN: ungraded
    correct: list[np.ndarray] = field(default_factory=list)  # the same of 1 (correct) and 0
    indices: list[np.ndarray] = field(default_factory=list)  # sample index: the repetition
    measured: int = 0  # samples whose lengths count
    steps: int = 0
    latent_steps: int = 0
    valid: int = 0

    def add(self, group: pa.RecordBatch) -> None:
        """Counts the samples of a complete group."""
        view = TrajectoryBatch(group)
        self.rewards.append(view.rewards.copy())  # a view would keep the whole batch
        correct = np.array([reason == CORRECT for reason in view.strings("grade_reason")], dtype=np.float32)
        self.correct.append(np.where(np.isnan(view.rewards), np.float32(np.nan), correct))
        self.indices.append(view.numbers("sample_index").copy())
        counts = np.ones(len(view), dtype=bool)
        if self.uncut_lengths:
            counts = np.array([reason != "length" for reason in view.strings("finish_reason")], dtype=bool)
        self.measured += int(counts.sum())
        self.steps += int(view.num_steps[counts].sum())
        self.latent_steps += int(view.num_latent_steps[counts].sum())
        self.valid += int(view.valid.sum())

    def pass_at_k(self, ks: Iterable[int]) -> tuple[PassAtK, ...]:
        """Returns pass@k for each k. Ungraded samples are left out."""
        return tuple(_pass_at_k(self.correct, k) for k in ks)

    def result(self, task: str) -> TaskResult:
        """Returns the task's figures, without pass@k."""
        correct, indices = np.concatenate(self.correct), np.concatenate(self.indices)
        graded = ~np.isnan(correct)
        means = _means(self.correct)
        value, error = _mean_and_error(means)
        each = (correct[graded & (indices == run)] for run in np.unique(indices))
        return TaskResult(
            task=task,
            problems=len(self.rewards),
            samples=len(correct),
            pass_at_1=value,
            standard_error=error,
            interval=interval(value, error, len(means)),
            runs=tuple(float(of_run.mean()) for of_run in each if len(of_run)),
            mean_reward=_mean_and_error(_means(self.rewards))[0],
            chain_length=self.steps / max(self.measured, 1),
            latent_length=self.latent_steps / max(self.measured, 1),
            invalid_rate=1.0 - self.valid / len(correct),
            ungraded=int((~graded).sum()),
        )


def _collect(groups: Iterable[pa.RecordBatch], together: str | None) -> dict[str, Tally]:
    by_task: dict[str, Tally] = {}
    for group in groups:
        by_task.setdefault(together or group.column("task")[0].as_py(), Tally()).add(group)
    return by_task


def results(groups: Iterable[pa.RecordBatch], together: str | None = None) -> list[TaskResult]:
    """Computes pass@1 and lengths per task, in order of first appearance.

    `together` names one result over all tasks instead. `groups` is read once; a generator's groups are not kept.
    """
    return [found.result(task) for task, found in _collect(groups, together).items()]


def _means(groups: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of each group's graded samples, without groups that have none."""
    return np.array([group[~np.isnan(group)].mean() for group in groups if not np.isnan(group).all()])


def failure_shares(groups: Iterable[pa.RecordBatch]) -> dict[str, float]:
    """Returns the share of samples that were not graded `correct`, by the verifier's reason; commonest first."""
    reasons = Counter(reason for group in groups for reason in group.column("grade_reason").to_pylist())
    total = reasons.total()
    return {reason: count / total for reason, count in reasons.most_common() if reason != CORRECT}


def _pass_at_k(correct: list[np.ndarray], k: int) -> PassAtK:
    counts = [(int((~np.isnan(group)).sum()), int(np.nansum(group))) for group in correct]
    values = np.array([pass_at_k(n, right, k) for n, right in counts if n >= k])
    value, error = _mean_and_error(values)
    return PassAtK(k=k, value=value, standard_error=error, problems=len(values))


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean and its standard error; (0, 0) without values."""
    values = values.astype(np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return (float(values.mean()) if len(values) else 0.0), float(error)


def is_error(name: str) -> bool:
    """Whether a figure of this name is a standard error."""
    return name == "standard_error" or name.startswith("sampled_error_at_")


def average(tasks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Averages several tasks' :meth:`TaskResult.figures`.

    Every task has the same weight. The tasks are independent samples, so the squares of their errors add up; `ungraded`
    is a count. A figure that a task lacks is left out.
    """
    found = {}
    for name in [name for name in tasks[0] if all(name in task for task in tasks)] if tasks else []:
        values = [task[name] for task in tasks]
        total = math.hypot(*values) if is_error(name) else sum(values)
        found[name] = total if name == "ungraded" else total / len(values)
    return found


def macro_average(found: Sequence[TaskResult]) -> TaskResult:
    """Returns one result for all tasks, by :func:`average`. They are of one protocol, with the noise alike."""
    if not found:
        raise ValueError("macro average of no task")
    values = average([result.figures() for result in found])
    problems = sum(r.problems for r in found)
    return TaskResult(
        task=MACRO,
        problems=problems,
        samples=sum(r.samples for r in found),
        pass_at_1=values["pass_at_1"],
        standard_error=values["standard_error"],
        interval=interval(values["pass_at_1"], values["standard_error"], problems),
        runs=tuple(sum(of_run) / len(found) for of_run in zip(*(r.runs for r in found), strict=False)),
        mean_reward=values["mean_reward"],
        chain_length=values["chain_length"],
        latent_length=values["latent_length"],
        invalid_rate=values["invalid_rate"],
        ungraded=int(values["ungraded"]),
        protocol=found[0].protocol,
        noise=found[0].noise,
        pass_at_k=tuple(
            PassAtK(
                k=at.k,
                value=values[f"sampled_pass_at_{at.k}"],
                standard_error=values[f"sampled_error_at_{at.k}"],
                problems=sum(a.problems for r in found for a in r.pass_at_k if a.k == at.k),
            )
            for at in found[0].pass_at_k
            if f"sampled_pass_at_{at.k}" in values
        ),
    )
