"""The cost of the distributed loop: a step through Ray and DeepSpeed, and a step of the same loop in one process.

Both run the same steps from the same model: all steps in one process, then all steps of the pipeline. Other work on the
machine may therefore slow only one of them; measure on an idle machine. CPU seconds are given besides wall seconds
because other work disturbs them less. The first steps of each (compilation, caches) are not counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from latent_grpo.common.config import RunConfig
from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.deploy.bench import figures
from latent_grpo.deploy.controller import Controller, Learner
from latent_grpo.deploy.reproduce.in_process import InProcessLearner, InProcessSFT, in_process_session
from latent_grpo.deploy.run.folder import create_run
from latent_grpo.deploy.run.preparation import prepare
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.session import Run, run_session
from latent_grpo.deploy.sft.loop import warm_start
from latent_grpo.learner.learner import LearnerGroup

WARM_UP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopCost:
    """Medians over counted steps; `cpu_s` is the mean, of all processes together."""

    wall_s: float
    rollout_s: float
    learner_s: float
    cpu_s: float
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The costs of the two loops on the same work."""

    pipeline: LoopCost
    in_process: LoopCost
    prompts: int
    samples: int

    @property
    def wall_ratio(self) -> float:
        """The pipeline's wall time in multiples of the loop's in one process."""
        return self.pipeline.wall_s / self.in_process.wall_s

    @property
    def cpu_ratio(self) -> float:
        """The pipeline's CPU time in multiples of the loop's in one process."""
        return self.pipeline.cpu_s / self.in_process.cpu_s


def compare(config: RunConfig, steps: int, reporter: Reporter | None = None) -> Comparison:
    """Measures both loops on the training run of `config`; its warm start, if any, is made once, in this process."""
    reporter = reporter or Reporter()
    with tempfile.TemporaryDirectory(prefix="lg-bench-") as scratch:
        root = Path(scratch)
        if config.warm_start is not None:
            folder = create_run(config, "start", root / "start")
            with in_process_session(folder, config, reporter) as run:
                base = warm_start(run, InProcessSFT)
            model = config.model.model_copy(update={"path": str(base), "new": None})
            config = config.model_copy(update={"model": model, "warm_start": None})
        folder = create_run(config, "in-process", root / "in-process")
        with in_process_session(folder, config, reporter) as run:
            alone = timed_steps(run, _controller(run, InProcessLearner(config, run.initial)), steps)
        folder = create_run(config, "pipeline", root / "pipeline")
        with run_session(folder, config, 0, reporter, prepare(config, reporter, folder)) as run:
            learner = LearnerGroup(config, run.initial, run.reservation.ranks)
            try:
                run.await_workers()
                pipeline = timed_steps(run, _controller(run, learner), steps)
            finally:
                learner.close()
    return Comparison(
        pipeline=pipeline, in_process=alone, prompts=config.prompts_per_step, samples=config.samples_per_step
    )


def _controller(run: Run, learner: Learner) -> Controller:
    return Controller(run.config, run.pool, learner, run.problems.requests)


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its running children."""
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def timed_steps(
    run: Run,
    controller: Controller,
    steps: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = cpu_seconds,
) -> LoopCost:
    """Runs `steps` steps and measures all but the first `WARM_UP`."""
    controller.begin()
    walls, waits, learns, cpu = [], [], [], 0.0
    with run.reporter.phase(f"{type(run.pool).__name__}", steps) as advance:
        for step in range(steps):
            if step == WARM_UP:
                cpu = cpu_clock()
            began = clock()
            result = controller.run_step()
            run.metrics.write(result.step, result.metrics)
            if step >= WARM_UP:
                walls.append(clock() - began)
                waits.append(result.metrics["time/rollout_wait_s"])
                learns.append(result.metrics["time/learner_s"])
            advance(step + 1)
    return LoopCost(
        wall_s=statistics.median(walls),
        rollout_s=statistics.median(waits),
        learner_s=statistics.median(learns),
        cpu_s=(cpu_clock() - cpu) / len(walls),
        steps=len(walls),
    )


def show(found: Comparison, console: Console | None = None) -> None:
    table = Table(title=f"one step of {found.prompts} prompts, {found.samples} samples")
    for column in ("", "wall s", "rollout s", "learner s", "CPU s", "steps"):
        table.add_column(column, justify="left" if not column else "right")
    for name, cost in (("in one process", found.in_process), ("pipeline", found.pipeline)):
        figures = (cost.wall_s, cost.rollout_s, cost.learner_s, cost.cpu_s)
        table.add_row(name, *(f"{value:.3f}" for value in figures), str(cost.steps))
    table.add_row("pipeline / in one process", f"{found.wall_ratio:.2f}", "", "", f"{found.cpu_ratio:.2f}", "")
    (console or TextConsole()).print(table)


def write_json(found: Comparison, path: Path) -> None:
    ratios = {"wall_ratio": found.wall_ratio, "cpu_ratio": found.cpu_ratio}
    figures.write_json(asdict(found) | ratios, path)
