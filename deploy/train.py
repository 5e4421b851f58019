"""A whole training run: model, warm start, self-test, evaluation, the loop of `deploy.controller`, and what it leaves.

    prepare model and problems ─► start workers ─► (Latent-SFT) ─► start learner ─► self-test ─► evaluate
        ─► steps: metrics, dump, checkpoint ─► evaluate ─► export

Nothing is decided here that the loop or the method decides; this is the order of things, and what happens when one
of them ends early: the last checkpoint stays valid, and `train --resume RUN` goes on from it.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from common.config import ConfigError, RunConfig, config_as_json
from common.metrics import MetricsWriter
from common.models import load_tokenizer, make_model, make_tokenizer, output_facts, save_model
from common.prompts import resolve_tokens
from common.schema import concat
from common.store import TrajectoryStore
from common.tasks import load_task
from common.types import TokenFacts
from deploy.controller import Controller, StepResult, TrainingStopped, gather
from deploy.evaluate import TaskResult, results
from deploy.problems import Problems
from deploy.progress import Reporter
from deploy.ray_session import ray_session
from deploy.run_folder import RunFolder, create_run, reopen_run
from deploy.sft import prepare_sft, run_latent_sft
from deploy.workers import WorkerFactory
from learner.checkpoint import latest_checkpoint, write_checkpoint
from learner.learner import LearnerGroup, ReplayReport
from learner.sft_learner import SFTLearner
from rollout_workers.pool import RolloutPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTLE_S = 15.0  # of the 30 s that an interrupt may take
TEXTS_FOR_TOKENIZER = 20_000
TOLERANCE = {"float32": ("max", 1e-3), "bfloat16": ("p99", 0.2)}  # METHOD §6, component log-probs
MEAN_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.02}


class SelfTestFailed(TrainingStopped):
    """The learner does not compute what the engine sampled from; training on it would be wrong in silence."""


@dataclass(slots=True)
class Run:
    """What the parts of a run share, once its workers are there."""

    folder: RunFolder
    config: RunConfig
    lineage: int
    reporter: Reporter
    metrics: MetricsWriter
    initial: str | Path  # folder or hub id of the model that the run starts from
    tokenizer: PreTrainedTokenizerBase
    facts: TokenFacts
    problems: Problems
    pool: RolloutPool
    summary: dict = field(default_factory=dict)

    @property
    def store(self) -> TrajectoryStore:
        return TrajectoryStore(self.folder.trajectories)

    def record(self, **entries) -> None:
        self.summary |= entries
        self.folder.write_json("summary.json", self.summary)


def train(config: RunConfig, profile: str, reporter: Reporter | None = None) -> RunFolder:
    """A new run. Returns its folder; raises what stopped it."""
    return _run(create_run(config, profile), config, 0, reporter or Reporter())


def resume(path: str | Path, overrides: list[str], reporter: Reporter | None = None) -> RunFolder:
    """Goes on with a run from its last complete checkpoint (from the beginning if there is none)."""
    folder, config, lineage = reopen_run(path, overrides)
    return _run(folder, config, lineage, reporter or Reporter())


def sft(config: RunConfig, profile: str, reporter: Reporter | None = None) -> RunFolder:
    """Latent-SFT alone (METHOD §7): its model is in the run's `base/`, for `model.path` of later runs."""
    folder, reporter = create_run(config, profile), reporter or Reporter()
    if config.warm_start is None:
        raise ConfigError(f"profile {profile} has no section warm_start; add it (an empty one takes the defaults)")
    with started(folder, config, 0, reporter) as run:
        model = warm_start(run)
    reporter.say(f"model {model}; train it with model.path={model}")
    return folder


def _run(folder: RunFolder, config: RunConfig, lineage: int, reporter: Reporter) -> RunFolder:
    began = time.monotonic()
    with started(folder, config, lineage, reporter) as run:
        base = run.initial if config.warm_start is None else warm_start(run)
        reporter.say(f"starting {config.learner.ranks} learner rank(s)")
        learner = LearnerGroup(config, base)
        try:
            _train(run, learner)
        finally:
            learner.close()
        run.record(minutes=round((time.monotonic() - began) / 60, 2))
    reporter.console.print(final_table(run))
    reporter.say(f"model {run.folder.model} · dumps, metrics and checkpoints in {run.folder.path}")
    return run.folder


@contextlib.contextmanager
def started(folder: RunFolder, config: RunConfig, lineage: int, reporter: Reporter) -> Iterator[Run]:
    """Ray, the model, the problems and the workers of a run; all of it gone afterwards."""
    folder = RunFolder(folder.path.resolve())
    reporter.say(f"run folder {folder.path}")
    with (
        MetricsWriter(folder.path, config.metrics.sinks) as metrics,
        ray_session(config),
        terminated_is_interrupted(),
    ):
        initial = initial_model(config, folder, reporter)
        tokenizer = load_tokenizer(initial)
        facts = token_facts(config, initial, tokenizer)
        problems = Problems(config, tokenizer)
        for line in problems.summaries:
            reporter.say(line)
        reporter.say(f"starting {config.rollout.workers} rollout worker(s)")
        factory = WorkerFactory(config_as_json(config), str(initial), folder.name)
        with RolloutPool(factory, config.rollout, config.deadlines) as pool:
            run = Run(folder, config, lineage, reporter, metrics, initial, tokenizer, facts, problems, pool)
            if lineage and (folder.path / "summary.json").is_file():
                run.summary = folder.read_json("summary.json")
            yield run


# --- before the loop -----------------------------------------------------------------------------------------------


def initial_model(config: RunConfig, folder: RunFolder, reporter: Reporter) -> str | Path:
    """The folder or hub id that the run starts from; a `model.new` is made once, below the run's folder."""
    if config.model.new is None:
        return config.model.path
    target = folder.base_model if config.warm_start is None else folder.path / "initial"
    if (target / "config.json").is_file():
        return target
    tokenizer = make_tokenizer(config.model.new, _texts(config))
    model = make_model(config.model.new, tokenizer, config.seed)
    reporter.say(f"made a new {config.model.new.architecture} of {model.num_parameters():,} parameters")
    _save_whole(target, lambda unfinished: save_model(unfinished, model, tokenizer))
    return target


def _texts(config: RunConfig) -> Iterator[str]:
    """What a new model's tokenizer is trained on: the first task's problems, chains and answers."""
    if config.model.new.tokenizer == "arithmetic":
        return
    source = load_task(config.tasks[0], config.seed)
    for index in range(min(source.size or TEXTS_FOR_TOKENIZER, TEXTS_FOR_TOKENIZER)):
        problem = source.problem(index)
        yield from (content for _, content in problem.messages)
        yield problem.cot
        yield f"\\boxed{{{problem.answer}}}"


def token_facts(config: RunConfig, model: str | Path, tokenizer) -> TokenFacts:
    vocab_size, eos_ids = output_facts(model)
    if config.latent and config.k > vocab_size:
        raise ConfigError(f"k ({config.k}) is larger than the model's vocabulary of {vocab_size}; lower k")
    return resolve_tokens(tokenizer, vocab_size, config.latent, config.model.prompt.think_end, eos_ids)


def warm_start(run: Run) -> Path:
    """Latent-SFT of the initial model into `base/` (METHOD §7); a resumed run has it already."""
    config, base = run.config, run.folder.base_model
    if (base / "config.json").is_file():
        return base
    stage = min(config.learner.zero_stage, 2)
    if stage != config.learner.zero_stage:
        run.reporter.say(f"Latent-SFT runs at ZeRO stage {stage}; the RL steps at {config.learner.zero_stage}")
    sft_config = config.model_copy(update={"learner": config.learner.model_copy(update={"zero_stage": stage})})
    data = prepare_sft(sft_config, run.problems.training, run.tokenizer, run.facts)
    learner = SFTLearner(sft_config, run.initial)
    try:
        outcome = run_latent_sft(sft_config, data, learner, run.pool, run.metrics, run.reporter)
        _save_whole(base, learner.export)
    finally:
        learner.close()
    run.record(sft={"steps": outcome.steps, "held_out_pass_at_1": outcome.held_out.pass_at_1})
    if not outcome.reached:
        run.reporter.say(
            f"[yellow]Latent-SFT stopped at warm_start.max_steps ({outcome.steps}) with a held-out pass@1 of "
            f"{outcome.held_out.pass_at_1:.3f}, below stop_at {config.warm_start.stop_at}; RL begins from there[/]"
        )
    return base


def _save_whole(target: Path, write) -> None:
    """`write(folder)`, and only then the name: a killed run leaves no half a model under it."""
    unfinished = target.with_name(f".unfinished-{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    write(unfinished)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)


# --- the loop ------------------------------------------------------------------------------------------------------


def _train(run: Run, learner: LearnerGroup) -> None:
    config, checkpoint = run.config, latest_checkpoint(run.folder.checkpoints)
    position = {"step": 0, "next_ordinal": 0}
    if checkpoint is not None:
        for skipped in checkpoint.skipped:
            run.reporter.say(f"[yellow]checkpoint {skipped.path.name} skipped: {skipped.reason}[/]")
        learner.load(checkpoint.path / "learner")
        position = {key: checkpoint.state[key] for key in position}
        run.reporter.say(f"going on from {checkpoint.path.name}, lineage {run.lineage}")
    controller = Controller(config, run.pool, learner, run.problems.request, **position)
    controller.begin()
    self_test(run, learner)
    if config.evaluation.at_start and "before" not in run.summary:
        evaluate(run, controller, "before")
    saved = controller.step
    try:
        with run.reporter.phase(config.algorithm, config.steps) as advance:
            advance(controller.step)
            rewards: list[float] = []
            while controller.step < config.steps:
                result = controller.run_step()
                observe(run, learner, result)
                rewards.append(result.metrics.get("rollout/reward", float("nan")))
                if _due(config.checkpoint.every, result.step) or result.step == config.steps:
                    saved = save(run, controller, learner)
                if _due(config.evaluation.every, result.step) and result.step < config.steps:
                    evaluate(run, controller, f"step-{result.step}")
                advance(result.step, f"reward {rewards[-1]:.3f} {sparkline(rewards)}")
    except KeyboardInterrupt:
        controller.settle(SETTLE_S)
        if controller.step > saved:
            saved = save(run, controller, learner)
        run.reporter.say(f"interrupted; the checkpoint of step {saved} is complete")
        raise
    if config.evaluation.at_end:
        evaluate(run, controller, "after")
    _save_whole(run.folder.model, learner.export)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def self_test(run: Run, learner: LearnerGroup) -> None:
    """Replays a few rollouts in the learner; refuses to train on log-probs that differ (METHOD §6)."""
    if not run.config.self_test_groups:
        return
    requests = [run.problems.request(i, "self_test") for i in range(run.config.self_test_groups)]
    report = learner.replay(concat(gather(run.pool, requests)))
    run.metrics.write(0, _gaps(report), kind="self_test", lineage=run.lineage)
    dtype = run.config.model.dtype
    statistic, limit = TOLERANCE[dtype]
    for name, gap in (("latent", report.latent), ("hard", report.hard)):
        found = getattr(gap, statistic)
        if not (found <= limit and gap.mean <= MEAN_TOLERANCE[dtype]):  # a NaN fails too
            raise SelfTestFailed(
                f"self-test: the learner's log-probs of {gap.count} {name} components differ from the engine's by "
                f"{found:.3g} ({statistic}; mean {gap.mean:.3g}), allowed in {dtype}: {limit:g} (mean "
                f"{MEAN_TOLERANCE[dtype]:g}). The two would not optimise the same policy; check that both load the "
                "same model, and run `latent-grpo doctor`"
            )
    run.reporter.say(
        f"self-test: learner and engine agree (max gap latent {report.latent.max:.1e}, hard {report.hard.max:.1e})"
    )


def _gaps(report: ReplayReport) -> dict[str, float]:
    pairs = (("latent", report.latent), ("hard", report.hard))
    return {f"{kind}_{s}": getattr(gap, s) for kind, gap in pairs for s in ("mean", "p99", "max", "count")}


def evaluate(run: Run, controller: Controller, tag: str) -> list[TaskResult]:
    """Every evaluation task on the current weights; into the metrics and the summary."""
    requests = list(run.problems.evaluation_requests(tag))
    if not requests:
        return []
    with run.reporter.phase(f"evaluate {tag}", len(requests), "problems") as advance:
        groups = controller.gather(requests, advance)
    found = results(groups)
    values = {name: value for result in found for name, value in result.metrics().items()}
    run.metrics.write(controller.step, values, kind="evaluation", lineage=run.lineage)
    if run.config.dump.evaluation:
        run.store.write(controller.step, concat(groups), "evaluation", run.lineage)
    if tag in ("before", "after"):
        run.record(**{tag: values})
    for result in found:
        run.reporter.say(
            f"{result.task}: pass@1 {result.pass_at_1:.3f} ± {result.standard_error:.3f}, chain length "
            f"{result.chain_length:.1f} ({result.latent_length:.1f} latent), invalid {result.invalid_rate:.1%}"
        )
    return found


def observe(run: Run, learner: LearnerGroup, result: StepResult) -> None:
    """A step's metrics and dump."""
    run.metrics.write(result.step, result.metrics, lineage=run.lineage)
    if _due(run.config.dump.every, result.step) and result.arrived:
        run.store.write(result.step, concat(result.arrived), "training", run.lineage)
    if result.metrics.get("learner/skipped_updates"):
        path = run.store.write(result.step, result.batch, "non_finite", run.lineage)
        uids, indices = (result.batch.column(name) for name in ("group_uid", "sample_index"))
        named = ", ".join(f"{uids[row]} #{indices[row]}" for row in learner.last_report.bad_rows) or "no single one"
        run.reporter.say(f"[red]step {result.step}: non-finite update not applied; samples: {named}; batch: {path}[/]")


def save(run: Run, controller: Controller, learner: LearnerGroup) -> int:
    """A checkpoint of the state between two steps; returns its step."""
    state = {"step": controller.step, "next_ordinal": controller.next_ordinal, "lineage": run.lineage}
    write_checkpoint(
        run.folder.checkpoints,
        controller.step,
        lambda folder: learner.save(folder / "learner"),
        state,
        run.config.checkpoint.keep,
    )
    return controller.step


# --- what the user sees --------------------------------------------------------------------------------------------


def sparkline(values: list[float], width: int = 24) -> str:
    """The curve so far in one line of block characters."""
    finite = [v for v in values if v == v]
    if len(finite) < 2:
        return ""
    size = -(-len(finite) // width)
    means = [sum(chunk) / len(chunk) for chunk in (finite[i : i + size] for i in range(0, len(finite), size))]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(int((m - low) / span * 8), 7)] for m in means)


def final_table(run: Run) -> Table:
    """Before and after, per task."""
    before, after = run.summary.get("before", {}), run.summary.get("after", {})
    table = Table(title=f"{run.folder.name}: {run.config.algorithm}, {run.summary['minutes']:g} minutes")
    for column in ("task", "", "before", "after"):
        table.add_column(column, justify="left" if column in ("task", "") else "right")
    rows = (
        ("pass_at_1", "pass@1", "{:.3f}"),
        ("chain_length", "chain length", "{:.1f}"),
        ("latent_length", "of it latent", "{:.1f}"),
        ("invalid_rate", "invalid rate", "{:.1%}"),
    )
    for task in run.config.evaluation.tasks:
        for name, title, form in rows:
            key = f"{task.name}/{name}"
            shown = [form.format(values[key]) if key in values else "-" for values in (before, after)]
            table.add_row(task.name if name == "pass_at_1" else "", title, *shown)
    return table


@contextlib.contextmanager
def terminated_is_interrupted() -> Iterator[None]:
    """SIGTERM (a job that is stopped, a pod that is evicted) ends a run as Ctrl-C does: with a checkpoint."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
