"""What a run's metrics decide while it goes on: which checkpoint is the best one, and whether the run ends here.

The scores of checkpoints are beside them (`learner.best_checkpoint`); the measurements that may end the run are those
of `metrics.jsonl`, so a resumed run knows both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from latent_grpo.common.config import RunConfig, StopConfig
from latent_grpo.common.config.stopping import EVALUATION, FIGURES
from latent_grpo.common.figure_names import by_label, of_first_protocol
from latent_grpo.common.metrics import FILE, read_metrics
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.learner.best_checkpoint import Scores
from latent_grpo.learner.checkpoint import list_checkpoints


class TaskFigures(Protocol):
    """The figures of one task in an evaluation."""

    @property
    def task(self) -> str:
        """The task's name."""

    def figures(self) -> Mapping[str, float]:
        """Returns its figures by name."""


class Milestones:
    """Takes the metrics of steps and evaluations. `stopped` says why the run ends, in a sentence, once it does.

    `step` is the step that the run continues from, 0 at its start.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, step: int, reporter: Reporter) -> None:
        self._root, self._rule, self._reporter = folder.checkpoints, config.stop_on, reporter
        self.stopped: str | None = None
        self._seen: dict[int, float] = {}  # step -> measurement of the rule's metric
        if self._rule is not None:
            self._seen = _measured(folder.path, self._rule, step)
            self._judge()
            if self.stopped is not None:
                reporter.say(
                    f"[yellow]{self.stopped}: the run has ended there and takes no further step; to go on, "
                    "resume it with stop_on=null, or with another rule[/]"
                )
        self._scores = None if config.checkpoint.keep_best is None else Scores(self._root, config.checkpoint.keep_best)
        if self._scores is not None:
            if self._scores.other_metric is not None:
                reporter.say(
                    f"the best checkpoint so far was chosen by {self._scores.other_metric}; from now on "
                    f"{self._scores.metric} decides (checkpoint.keep_best)"
                )
            for skipped in self._scores.drop_damaged():
                reporter.say(f"[yellow]best checkpoint {skipped.path.name} skipped: {skipped.reason}[/]")

    @property
    def protected(self) -> tuple[str, ...]:
        """The names of checkpoints that must not be removed: the best one, if there is one."""
        best = None if self._scores is None else self._scores.best
        return () if best is None else (best,)

    def took(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a step's metrics."""
        if self._rule is not None and self._rule.metric in metrics:
            self._measure(step, metrics[self._rule.metric])

    def evaluated(self, step: int, tasks: Sequence[TaskFigures], keep: Callable[[int], None]) -> None:
        """Takes the evaluation of the weights after `step`, which may have come when later steps were done.

        `keep(step)` writes that step's checkpoint if it is not there yet and still can be written.
        """
        values = means_and_figures({task.task: task.figures() for task in tasks})
        if self._rule is not None and self._rule.metric in values:
            self._measure(step, values[self._rule.metric])
        self._score(step, values, keep)

    def evaluated_at_end(self, step: int, tasks: Sequence[TaskFigures]) -> None:
        """Takes the evaluation after the run's last step, whose checkpoint is there."""
        self._score(step, means_and_figures({task.task: task.figures() for task in tasks}), lambda step: None)

    def _score(self, step: int, values: Mapping[str, float], keep: Callable[[int], None]) -> None:
        value = math.nan if self._scores is None else values.get(self._scores.metric, math.nan)
        if self._scores is None or math.isnan(value):
            return
        better = self._scores.improves(value)
        if better:
            keep(step)
        present = [path.name for at, path in list_checkpoints(self._root) if at == step]
        if not present:
            return
        self._scores.record(present[-1], value)
        if better:
            self._reporter.say(f"best checkpoint so far: step {step}, {self._scores.metric} {value:.3f}")

    def _measure(self, step: int, value: float) -> None:
        self._seen[step] = value
        if self.stopped is None:
            self._judge()
            if self.stopped is not None:
                self._reporter.say(f"[yellow]{self.stopped}[/]")

    def _judge(self) -> None:
        rule = self._rule
        if rule is None or len(self._seen) < rule.times:
            return
        steps = sorted(self._seen)[-rule.times :]
        if all(rule.met(self._seen[step]) for step in steps):
            values = ", ".join(f"{self._seen[step]:.4g}" for step in steps)
            self.stopped = f"stopped at step {steps[-1]}: {rule.sentence} (measured {values}; stop_on)"


def means_and_figures(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns an evaluation's metrics by name (`common.config.stopping`), the means over tasks included."""
    values = {f"{EVALUATION}{task}/{name}": value for task, found in tasks.items() for name, value in found.items()}
    for name in FIGURES:
        of_tasks = [found[name] for found in tasks.values() if name in found]
        if of_tasks:
            values[f"{EVALUATION}{name}"] = sum(of_tasks) / len(of_tasks)
    return values


def _measured(run: Path, rule: StopConfig, step: int) -> dict[int, float]:
    """Returns step -> value of the rule's metric in the run's live history, up to `step`, without the start's."""
    if not step or not (run / FILE).exists():
        return {}
    kind = "evaluation" if rule.metric.startswith(EVALUATION) else "train"
    found = {}
    for row in read_metrics(run, kind=kind):
        values = row["metrics"] if kind == "train" else means_and_figures(_by_task(row["metrics"]))
        value = values.get(rule.metric)
        if 0 < row["step"] <= step and value is not None:
            found[row["step"]] = value
    return found


def _by_task(metrics: Mapping[str, float | None]) -> dict[str, dict[str, float]]:
    """Sorts the figures of the first protocol by task; a value that is not finite is left out."""
    finite = {name: value for name, value in metrics.items() if value is not None}
    return of_first_protocol(by_label(finite))[1]
