"""The command `latent-grpo replay RUN --step N`, which computes a step's loss and gradient norm again.

    checkpoint before N ─► learner ranks ─► (recorded steps up to N - 1) ─► step N on its recorded batch ─► compared

No rollout worker is started, and nothing is written to the run's folder. On the hardware and with the settings of the
run, loss and norm are equal to the last bit; elsewhere they differ by rounding. A larger difference is reported with
its update, trajectory and response step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from latent_grpo.common.config import RunConfig
from latent_grpo.common.learner_record import LearnerBatch
from latent_grpo.deploy.replay.recorded import RecordedRun, RecordedStep, Start
from latent_grpo.deploy.run.folder import open_run
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.ray_session import ray_session
from latent_grpo.deploy.run.storage.copy import local_copy
from latent_grpo.learner.learner import LearnerGroup, LearnerReport

COMPARED = ("old_log_probs", "new_log_probs", "step_advantages", "ratios")
ADVANTAGE = 1e-4
"""Largest difference of an advantage in any dtype: it is made of rewards, in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """The differences that rounding alone may cause."""

    relative: float  # of loss and norm
    loss: float  # absolute: terms of both signs may add up to almost nothing
    step: float  # absolute, of a response step's log-probs and ratio

    def of(self, column: str) -> float:
        """Returns the bound of a column of `COMPARED`."""
        return ADVANTAGE if column == "step_advantages" else self.step


TOLERANCES = {
    "float32": Rounding(relative=1e-4, loss=1e-7, step=1e-4),
    "bfloat16": Rounding(relative=0.05, loss=5e-3, step=0.25),
}
"""By `model.dtype`. In bfloat16 a step of a model of 135 M parameters, repeated with other micro-batches, differed by
3 % in the loss (7e-4), 0.4 % in the norm, 0.06 in a step's log-prob and 0.09 in its ratio (docs/numerics.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number of the step, recorded and replayed; `recorded` is None if the run has none."""

    name: str
    recorded: float | None
    replayed: float
    deviates: bool

    @property
    def difference(self) -> float | None:
        """Replayed less recorded; None: it was not recorded."""
        return None if self.recorded is None else self.replayed - self.recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """The place at which a step column differs most."""

    column: str
    group_uid: str
    sample_index: int
    response_step: int  # from 0
    recorded: float
    replayed: float
    steps: int  # response steps beyond the tolerance
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReplay:
    """The comparison of a step with its replay."""

    step: int
    figures: tuple[Figure, ...]
    deviations: tuple[Deviation, ...]
    note: str = ""

    @property
    def reproduced(self) -> bool:
        """Whether every figure and every row agree within their tolerances."""
        return not self.deviations and not any(f.deviates for f in self.figures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The replay of the requested step; `before` holds the steps that were taken again to reach it."""

    run: str
    start: Start
    before: tuple[StepReplay, ...]
    asked: StepReplay

    @property
    def reproduced(self) -> bool:
        """Whether the step, and those before it that led to it, are reproduced."""
        return self.asked.reproduced and all(step.reproduced for step in self.before)

    def as_json(self) -> dict[str, Any]:
        """Returns the replay for JSON, with null for NaN and infinity."""
        steps = [asdict(s) | {"reproduced": s.reproduced} for s in (*self.before, self.asked)]
        return {
            "run": self.run,
            "from_step": self.start.step,
            "reproduced": self.reproduced,
            "steps": [_without_nan(step) for step in steps],
        }


def _without_nan(node: Any) -> Any:
    if isinstance(node, dict):
        return {name: _without_nan(value) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_without_nan(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def replay(path: str | Path, step: int, overrides: list[str], reporter: Reporter | None = None) -> Replay:
    """Replays a step. Raises RecordedError or ResumeError, each with one sentence, if that is not possible."""
    reporter = reporter or Reporter()
    folder, config = open_run(path := local_copy(path), overrides, "replay")
    run = RecordedRun(folder, config)
    if (dtype := run.dtype(step)) != config.model.dtype and not any(o.startswith("model.dtype=") for o in overrides):
        reporter.say(f"step {step} was taken in {dtype}, and so is its replay")
        folder, config = open_run(path, [*overrides, f"model.dtype={dtype}"], "replay")
        run = RecordedRun(folder, config)
    start = run.start_for(step)
    run.step(step)  # a dump that cannot be replayed is found before anything is started
    origin = "the initial model" if start.checkpoint is None else start.checkpoint.name
    numbers = range(start.step + 1, step + 1)
    way = f" through {len(numbers) - 1} earlier step(s)" if len(numbers) > 1 else ""
    reporter.say(f"replaying step {step} from {origin}{way}")
    with (
        recorded_learner(config, run.base, start, reporter) as learner,
        reporter.phase("replay", len(numbers)) as advance,
    ):
        replayed = []
        for number in numbers:
            replayed.append(_replayed(run.step(number), learner, config))
            advance(len(replayed))
    return Replay(run=folder.name, start=start, before=tuple(replayed[:-1]), asked=replayed[-1])


@contextmanager
def recorded_learner(config: RunConfig, base: str | Path, start: Start, reporter: Reporter) -> Iterator[LearnerGroup]:
    """Starts a learner alone, in a Ray of its own, in the state of `start`; it makes records of every step."""
    every = config.dump.model_copy(update={"every": 1})
    with ray_session(config, reporter, "learner") as reservation:
        learner = LearnerGroup(config.model_copy(update={"dump": every}), base, reservation.ranks)
        try:
            if start.checkpoint is not None:
                learner.load(start.checkpoint / "learner")
            yield learner
        finally:
            learner.close()


def _replayed(recorded: RecordedStep, learner: LearnerGroup, config: RunConfig) -> StepReplay:
    if recorded.batch is None:
        note = "no group of this step had signal, so the run did not train on it, and neither does the replay"
        return StepReplay(step=recorded.step, figures=(), deviations=(), note=note)
    report = learner.train(recorded.batch, recorded.step - 1)
    tolerance = TOLERANCES[config.model.dtype]
    note = "" if recorded.records is not None else "the run has no learner records: only the step's means are compared"
    return StepReplay(
        step=recorded.step,
        figures=tuple(_figures(recorded, report, tolerance)),
        deviations=tuple(deviations(recorded.records, report.records, tolerance)),
        note=note,
    )


def _figures(recorded: RecordedStep, report: LearnerReport, tolerance: Rounding) -> Iterator[Figure]:
    """Yields loss and gradient norm: means of the step, then of each update where the run has records."""

    def figure(name: str, was: float | None, now: float) -> Figure:
        return Figure(name=name, recorded=was, replayed=now, deviates=was is not None and _differ(was, now, tolerance))

    for name, metric in (("loss", "learner/loss"), ("gradient norm", "learner/grad_norm")):
        yield figure(name, recorded.metrics.get(metric), report.metrics[metric])
    if recorded.records is None:
        return
    table = recorded.records.select(["update_index", "update_loss", "update_grad_norm"]).to_pylist()
    was = {row["update_index"]: row for row in table}
    for index, update in enumerate(report.updates):
        yield figure(f"loss of update {index + 1}", was[index]["update_loss"], update.loss)
        yield figure(f"gradient norm of update {index + 1}", was[index]["update_grad_norm"], update.grad_norm)


def _differ(was: float, now: float, tolerance: Rounding) -> bool:
    if math.isnan(was) or math.isnan(now):
        return math.isnan(was) != math.isnan(now)
    return not math.isclose(was, now, rel_tol=tolerance.relative, abs_tol=tolerance.loss)


def deviations(was: pa.RecordBatch | None, now: pa.RecordBatch, tolerance: Rounding) -> Iterator[Deviation]:
    """Yields each step column that differs by more than rounding, at the place where it differs most."""
    if was is None:
        return
    before, after = LearnerBatch(was), LearnerBatch(now)
    for column in COMPARED:
        old, new = before.steps(column), after.steps(column)
        gap = np.abs(old.values.astype(np.float64) - new.values)
        gap[np.isnan(old.values) & np.isnan(new.values)] = 0.0
        gap[np.isnan(gap)] = np.inf  # a number on one side only
        beyond = int((gap > tolerance.of(column)).sum())
        if beyond:
            place = int(gap.argmax())
            row = int(np.searchsorted(old.offsets, place, side="right")) - 1
            yield Deviation(
                column=column,
                group_uid=was.column("group_uid")[row].as_py(),
                sample_index=was.column("sample_index")[row].as_py(),
                response_step=place - int(old.offsets[row]),
                recorded=float(old.values[place]),
                replayed=float(new.values[place]),
                steps=beyond,
                of=len(gap),
            )


# --- what the user sees ------------------------------------------------------------------------------------------


def show(result: Replay, console: Console) -> None:
    """Prints the comparison of the step, and of those before it that deviate."""
    for step in (*result.before, result.asked):
        if step is result.asked or not step.reproduced:
            _show_step(step, console)
    if result.reproduced:
        exact = all(f.difference in (None, 0.0) for f in result.asked.figures)
        console.print(Text.assemble((f"step {result.asked.step} reproduced", "green"), ", to the last bit" * exact))
        return
    first = next(step for step in (*result.before, result.asked) if not step.reproduced)
    console.print(
        Text.assemble(
            (f"not reproduced; the first step that deviates is {first.step}", "red"),
            ". Only the same program, torch build, ranks and hardware give the same numbers: compare the run's "
            "manifest.json with this machine",
        )
    )


def _show_step(step: StepReplay, console: Console) -> None:
    table = Table(title=f"step {step.step}", title_justify="left")
    for column in ("", "recorded", "replayed", "difference"):
        table.add_column(column, justify="right" if column else "left")
    for figure in step.figures:
        recorded, difference = _or_dash(figure.recorded, ".9g"), _or_dash(figure.difference, ".2e")
        table.add_row(
            figure.name,
            recorded,
            f"{figure.replayed:.9g}",
            Text.assemble(difference, (" deviates" * figure.deviates, "red")),
        )
    if step.figures:
        console.print(table)
    for d in step.deviations:
        console.print(
            f"{d.column}: {d.steps:,} of {d.of:,} response steps deviate, most at {d.group_uid} #{d.sample_index}, "
            f"response step {d.response_step}: recorded {d.recorded:.6g}, replayed {d.replayed:.6g}"
        )
    if step.note:
        console.print(step.note)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
