"""A whole training run: model, warm start, self-test, evaluation, the loop of `deploy.controller`, and its results.

    prepare model and problems ─► start workers ─► (Latent-SFT) ─► start learner ─► self-test ─► evaluate
        ─► steps: metrics, dump, checkpoint ─► evaluate ─► export

This module holds the order of a run's parts, and what happens when one of them ends early: the last checkpoint stays
valid, and `train --resume RUN` continues from it. The loop and the method are decided elsewhere.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from latent_grpo.common.config import RunConfig
from latent_grpo.common.figure_names import by_label, protocol_of, task_of
from latent_grpo.common.interrupts import Interrupted
from latent_grpo.common.remote_url import is_url
from latent_grpo.deploy.controller import Controller
from latent_grpo.deploy.evaluation.evaluate import evaluate
from latent_grpo.deploy.evaluation.interim import InterimEvaluations, make_up, owed
from latent_grpo.deploy.evaluation.scores import TaskResult
from latent_grpo.deploy.run import link
from latent_grpo.deploy.run.background import BackgroundWork
from latent_grpo.deploy.run.control import Scaling
from latent_grpo.deploy.run.folder import RunFolder, check_named, create_run, has_begun, named_run, reopen_run
from latent_grpo.deploy.run.foreign_code import check_origin
from latent_grpo.deploy.run.manifest import record_model
from latent_grpo.deploy.run.milestones import Milestones
from latent_grpo.deploy.run.observer import StepObserver
from latent_grpo.deploy.run.preparation import Prepared, prepare
from latent_grpo.deploy.run.progress import Reporter, StepShare, first_step_line
from latent_grpo.deploy.run.recovery import recovered, recovering
from latent_grpo.deploy.run.self_test import self_test
from latent_grpo.deploy.run.session import Run, run_session
from latent_grpo.deploy.run.stepping import StateKeeper, interruptible
from latent_grpo.deploy.run.storage.copy import named_copy, working_copy
from latent_grpo.deploy.run.storage.upload import push
from latent_grpo.deploy.run.versions import bits_may_differ
from latent_grpo.deploy.sft.loop import warm_start
from latent_grpo.deploy.view.report.build import report_note
from latent_grpo.learner.checkpoint import latest_checkpoint, write_checkpoint
from latent_grpo.learner.learner import LearnerGroup
from latent_grpo.learner.state import read_facts

STEP_PARTS = {"rollout": "rollout_wait", "learner": "learner", "publish": "publish"}  # name -> metric of its seconds


def train(config: RunConfig, profile: str, reporter: Reporter | None = None, path: Path | None = None) -> RunFolder:
    """Trains a new run (in the folder `path` if given) and returns its folder. Raises the error that stopped it.

    A run of the name `run_name` that has begun goes on, and one that has ended is left as it is.
    """
    reporter = reporter or Reporter()
    named = named_run(config) if path is None else None
    if named is not None:
        named_copy(config, named, reporter.say)
    if named is not None and has_begun(named):
        check_named(named, config, ["train", "sft"])
        if RunFolder(named).model.is_dir():
            reporter.say(f"run {config.run_name} has ended: model {RunFolder(named).model}")
            if is_url(config.runs_folder):
                push(named, reporter.say)
            return RunFolder(named)
        folder, config, lineage = reopen_run(named, [], "train", config)
        return _run(folder, config, lineage, reporter, prepare(config, reporter, folder))
    prepared = prepare(config, reporter)
    return _run(create_run(config, profile, path or named), config, 0, reporter, prepared)


def resume(
    path: str | Path, overrides: list[str], reporter: Reporter | None = None, allowed: Sequence[str] = ()
) -> RunFolder:
    """Resumes a run from its last complete checkpoint, or from the beginning if there is none.

    `path` is its folder, or the URL of its copy in an object store, which is brought to this machine. `allowed`
    are modules or import paths that may be imported for a run of another user (`deploy.run.foreign_code`);
    its own supervisor has been allowed them when it began.
    """

    def check(folder: Path, config: RunConfig) -> None:
        if link.recovery_here(folder) is None:
            check_origin(folder, config, overrides, allowed)

    reporter = reporter or Reporter()
    if is_url(str(path)):
        path, overrides = working_copy(str(path), overrides, reporter.say, allowed)
    folder, config, lineage = reopen_run(path, overrides, "train", check=check)
    return _run(folder, config, lineage, reporter, prepare(config, reporter, folder))


def _run(folder: RunFolder, config: RunConfig, lineage: int, reporter: Reporter, prepared: Prepared) -> RunFolder:
    link.tell(run=str(folder.path.resolve()), driver_s=config.deadlines.driver_s)
    link.expect_progress(config.deadlines.loop_s)
    with run_session(folder, config, lineage, reporter, prepared) as run, timed(run):
        base, run.recovery = run.initial, link.recovery_here(folder.path)
        if config.warm_start is not None:
            base = recovering(run, lambda: warm_start(run), kind="sft")
            record_model(folder, "base", base)
        recovering(run, lambda: _reinforce(run, base))
        run.record(dropped=run.problems.dropped)
    if {"before", "after"} & run.summary.keys():
        reporter.console.print(final_table(run))
    else:
        reporter.say(unmeasured(run))
    for line in run.problems.dropped:
        reporter.say(f"[yellow]{line}[/]")
    reporter.say(f"model {run.folder.model} · dumps, metrics and checkpoints in {run.folder.path}")
    reporter.say(report_note(run.folder))
    return run.folder


@contextlib.contextmanager
def timed(run: Run) -> Iterator[None]:
    """Records the minutes of this session in `sessions`, however it ends, and at the run's end those of all together.

    A session that was killed is not among them.
    """
    before = run.summary.get("sessions") or [m for m in [run.summary.get("minutes")] if m is not None]
    run.summary.pop("minutes", None)  # of a run that had ended and goes on
    began = time.monotonic()

    def sessions() -> list[float]:
        return [*before, round((time.monotonic() - began) / 60, 2)]

    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk may be what ended the session
            run.record(sessions=sessions())
        raise
    run.record(sessions=sessions(), minutes=round(sum(sessions()), 2))


# --- the loop ------------------------------------------------------------------------------------------------------


def _reinforce(run: Run, base: str | Path) -> None:
    """RL with ranks of its own, from the last checkpoint or from `base`."""
    run.reporter.say(f"starting {run.config.learner.ranks} learner rank(s)")
    learner, background = LearnerGroup(run.config, base, run.reservation.ranks), BackgroundWork()
    try:
        _train(run, learner, background)
    finally:
        learner.close()
        background.close()  # what waits for a rank has failed now


def _train(run: Run, learner: LearnerGroup, background: BackgroundWork) -> None:
    config, checkpoint = run.config, latest_checkpoint(run.folder.checkpoints)
    position: dict[str, Any] = {"step": 0, "next_ordinal": 0}
    unfinished = None
    if checkpoint is not None:
        for skipped in checkpoint.skipped:
            run.reporter.say(f"[yellow]checkpoint {skipped.path.name} skipped: {skipped.reason}[/]")
        learner.load(checkpoint.path / "learner")
        position = {key: checkpoint.state[key] for key in position} | {"ahead": checkpoint.state.get("ahead", ())}
        run.reporter.say(f"resuming from {checkpoint.path.name}, lineage {run.lineage}")
        if (before := read_facts(checkpoint.path / "learner").dtype) != config.model.dtype:
            run.reporter.say(
                f"[yellow]forward passes are in {config.model.dtype} from here on; the steps before this checkpoint "
                f"were taken in {before}. Master weights and moments are float32 in both[/]"
            )
        if config.deterministic and (line := bits_may_differ(run.folder.identity()["arithmetic"])):
            run.reporter.say(f"[yellow]{line}[/]")
    run.await_workers()
    controller = Controller(config, run.pool, learner, run.problems.requests, **position)
    milestones = Milestones(run.folder, config, controller.step, run.reporter)
    if controller.step < config.steps and milestones.stopped is None:
        run.record(after=None, stopped=None)  # of the model that goes on
    if checkpoint is not None:
        unfinished = owed(run, checkpoint.state)
        if unfinished not in (None, controller.step):
            make_up(run, learner, unfinished, checkpoint, partial(milestones.evaluated, keep=lambda step: None))
    controller.begin()
    self_test(run, learner)
    recovered(run, controller.step)
    if config.evaluation.at_start and "before" not in run.summary:
        evaluate(run, controller.gather, controller.step, "before")
    with StepObserver(run.folder, config, run.lineage, run.metrics, run.reporter) as observer:
        _steps(run, controller, learner, observer, milestones, background, unfinished == controller.step)
    run.record(stopped=milestones.stopped)
    if config.evaluation.at_end:
        milestones.evaluated_at_end(controller.step, evaluate(run, controller.gather, controller.step, "after"))
    run.export(run.folder.model, learner.export)
    record_model(run.folder, "trained", run.folder.model)


def _steps(
    run: Run,
    controller: Controller,
    learner: LearnerGroup,
    observer: StepObserver,
    milestones: Milestones,
    background: BackgroundWork,
    evaluation_first: bool,
) -> None:
    """Takes the steps that are left; `evaluation_first` says that the state's own evaluation was not finished."""
    config = run.config

    def record(done: int, values: dict[str, float]) -> None:
        run.metrics.write(done, values, kind="checkpoint", lineage=run.lineage)

    def write(done: int) -> Callable[[], None] | None:
        return save(run, controller, learner, observer, (*milestones.protected, *interim.protected), interim.state)

    keeper = StateKeeper("training", controller.step, write, record, config.deadlines, run.reporter, background)

    def settle(interrupt: Interrupted) -> str:
        if controller.learning:
            result = keeper.finish_step(interrupt, controller.settle)
            if result is not None:
                observer.observe(result, learner.last_report if result.batch is not None else None)
        interim.look()
        if not controller.learning:
            keeper.keep(controller.step)
        keeper.finish()
        return keeper.report(controller.step)

    def evaluated(step: int, found: list[TaskResult]) -> None:
        def keep(of: int) -> None:
            if of == controller.step:  # the checkpoint of an earlier step is there already, if there is one
                keeper.keep(of)
            keeper.finish()

        keeper.finish()  # scores are of checkpoints that are there
        milestones.evaluated(step, found, keep)
        if milestones.stopped:
            keeper.keep(controller.step)

    interim = InterimEvaluations(run, controller, evaluated, keeper.keep)
    scaling = None if run.workers is None else Scaling(config, run.workers, run.reporter.say)
    with interruptible(settle, run.reporter), run.reporter.phase(config.algorithm, config.steps) as advance:
        advance(controller.step)
        rewards: list[float] = []
        before, share, curve = controller.step, StepShare(), ""

        def waiting(part: str, of_part: float | None) -> None:
            done, note = share.at(part, of_part)
            advance(before + len(rewards) + done, f"{curve}{note}")

        if evaluation_first and milestones.stopped is None:
            interim.begin(controller.step)
        while controller.step < config.steps and milestones.stopped is None:
            if scaling is not None:
                scaling.begins()
            result = controller.run_step(waiting)
            if scaling is not None:
                result.metrics.update(
                    scaling.after(result.metrics["time/step_s"], result.metrics["time/rollout_wait_s"])
                )
            observer.observe(result, learner.last_report if result.batch is not None else None)
            rewards.append(result.metrics["rollout/reward"])
            keeper.took(result.metrics["time/learner_s"])
            keeper.look()
            milestones.took(result.step, result.metrics)
            parts = {name: result.metrics[f"time/{key}_s"] for name, key in STEP_PARTS.items()}
            share.learn(**parts)
            if len(rewards) == 1:
                left = config.steps - result.step
                run.reporter.say(first_step_line("training", result.metrics["time/step_s"], left, parts))
            if _due(config.checkpoint.every, result.step) or result.step == config.steps or milestones.stopped:
                keeper.keep(result.step)
            keeper.keep_ahead(result.step)
            interim.look()
            if _due(config.evaluation.every, result.step) and result.step < config.steps:
                interim.finish()  # one at a time
                if not milestones.stopped:
                    interim.begin(result.step)
            curve = f"reward {rewards[-1]:.3f} {sparkline(rewards)} "
            advance(result.step, curve)
        interim.finish()
        keeper.finish()


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def save(
    run: Run,
    controller: Controller,
    learner: LearnerGroup,
    observer: StepObserver,
    protected: Collection[str],
    more: Mapping[str, Any],
) -> Callable[[], None] | None:
    """Writes a checkpoint between two steps, or copies what is in it and returns what writes it (`background`).

    It becomes whole once the dumps of its steps are on the disk. `more` is added to its state; checkpoints whose names
    are `protected` stay, however old they are.
    """
    step = controller.step
    state: dict[str, Any] = {"step": step, "next_ordinal": controller.next_ordinal, "lineage": run.lineage, **more}
    if controller.ahead:
        state["ahead"] = list(controller.ahead)

    def write(learner_state: Callable[[Path], None]) -> None:
        observer.flush()
        keep = run.config.checkpoint.keep
        write_checkpoint(run.folder.checkpoints, step, lambda at: learner_state(at / "learner"), state, keep, protected)

    if not run.config.checkpoint.background:
        write(learner.save)
        return None
    return partial(write, learner.copy_state())


# --- what the user sees --------------------------------------------------------------------------------------------


def sparkline(values: list[float], width: int = 24) -> str:
    """Draws the curve so far as one line of block characters."""
    if len(values) < 2:
        return ""
    size = -(-len(values) // width)
    means = [sum(chunk) / len(chunk) for chunk in (values[i : i + size] for i in range(0, len(values), size))]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(int((m - low) / span * 8), 7)] for m in means)


def unmeasured(run: Run) -> str:
    """Says how to measure the model of a run that was not evaluated."""
    return (
        f"{run.folder.name}: {run.config.algorithm}, {run.summary['minutes']:g} minutes; pass@1 was not measured "
        f"(evaluation.tasks, evaluation.at_start, evaluation.at_end): latent-grpo evaluate --model {run.folder.model}"
    )


def final_table(run: Run) -> Table:
    """Returns a table of the figures before and after training, per task."""
    before, after = run.summary.get("before", {}), run.summary.get("after", {})
    table = Table(title=f"{run.folder.name}: {run.config.algorithm}, {run.summary['minutes']:g} minutes")
    for column in ("task", "protocol", "", "before", "after"):
        table.add_column(column, justify="right" if column in ("before", "after") else "left")
    rows = [
        ("pass_at_1", "pass@1", "{:.3f}"),
        ("chain_length", "chain length", "{:.1f}"),
        ("latent_length", "of it latent", "{:.1f}"),
        ("invalid_rate", "invalid rate", "{:.1%}"),
    ]
    rows += [(f"sampled_pass_at_{k}", f"pass@{k}, noise on", "{:.3f}") for k in run.config.evaluation.ks]
    for of in dict.fromkeys([*by_label(before), *by_label(after)]):
        for name, title, form in rows:
            key = f"{of}/{name}"
            shown = [form.format(values[key]) if key in values else "-" for values in (before, after)]
            first = (task_of(of), protocol_of(of)) if name == "pass_at_1" else ("", "")
            table.add_row(*first, title, *shown)
    return table
