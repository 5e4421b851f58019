"""The loop of Latent-SFT (METHOD §7): train on chains, watch held-out pass@1, stop where RL can begin.

rows of the next step are made here ──► ranks train ──► every `evaluate_every` steps: publish, generate, grade

A step is a function of its number: rows, perturbation and self-feeding come from (seed, step). So the state of a
stopped Latent-SFT is the learner's and a :class:`Progress`, and going on repeats nothing and skips nothing.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from latent_grpo.common.config import ConfigError, LatentSFTConfig, RunConfig
from latent_grpo.common.interrupts import Interrupted, awaited, check_interrupt, deferred_interrupts, settled
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.tasks.sources import PromptStream, StoredTask, TaskError, TaskSource, load_task
from latent_grpo.common.types import Problem, TokenFacts
from latent_grpo.deploy.controller import Pool, gather
from latent_grpo.deploy.evaluation.scores import TaskResult, results
from latent_grpo.deploy.run.folder import RunFolder, create_run, reopen_run
from latent_grpo.deploy.run.preparation import Parts, ready
from latent_grpo.deploy.run.problems import PreparedTask, group_request
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.session import Run, started
from latent_grpo.deploy.sft.induction import induce
from latent_grpo.learner.checkpoint import latest_checkpoint, write_checkpoint
from latent_grpo.learner.sft.learner import SFTLearner
from latent_grpo.learner.sft.rows import ChainTooShort, SFTRow, make_row

HELD_OUT_SEED = 7919  # added to the run's: other problems than the evaluation's, which must not choose anything
HELD_OUT_SHARE = 0.1
NO_CHAIN = "no chain of thought"
TOO_SHORT = "chain of thought under warm_start.compression"
TOO_LONG = "chain over max_response_tokens"
HELD_OUT = "held out"
MOST_DROPPED = 0.5  # of a task's chains, for their length: beyond it training would be on another data set


class NoChain(ConfigError):
    """A problem without a chain of thought."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a Latent-SFT is."""

    steps: int = 0
    evaluated_at: int = 0
    held_out_pass_at_1: float | None = None  # of the last evaluation
    reached: bool = False  # stop_at


@dataclass(frozen=True, slots=True)
class SFTData:
    """Rows to learn from, and problems to be judged on that are never among them."""

    stream: PromptStream
    tasks: list[PreparedTask]
    held_out: list[tuple[PreparedTask, Problem]]
    row: Callable[[PreparedTask, Problem], SFTRow]
    without_chain: list[PreparedTask]

    @property
    def dropped(self) -> dict[str, dict[str, int | None]]:
        """Task -> reason -> how many of its rows are not used (None: of a task that never ends, all)."""
        found = {
            task.name: {why: len(rows) for why, rows in task.source.dropped.items() if why != HELD_OUT}
            for task in self.tasks
        }
        found |= {task.name: {NO_CHAIN: task.source.size} for task in self.without_chain}
        return {name: reasons for name, reasons in found.items() if reasons}

    @property
    def summaries(self) -> list[str]:
        """A line a task; in yellow where rows are not used."""
        dropped = self.dropped
        lines = {task.name: f"Latent-SFT on {task.summary}" for task in self.tasks}
        lines |= {task.name: f"Latent-SFT leaves out {task.name}: {NO_CHAIN}" for task in self.without_chain}
        return [f"[yellow]{escape(line)}[/]" if name in dropped else escape(line) for name, line in lines.items()]

    def rows(self, step: int, count: int) -> list[SFTRow]:
        draws = [self.stream[step * count + i] for i in range(count)]
        return [self.row(self.tasks[draw.task], draw.problem) for draw in draws]


# --- data ----------------------------------------------------------------------------------------------------------


def prepare_sft(config: RunConfig, tasks: list[PreparedTask], tokenizer, facts: TokenFacts) -> SFTData:
    """Splits the tasks that have a chain of thought. Raises ConfigError if none has."""
    settings = _settings(config)

    def row(task: PreparedTask, problem: Problem) -> SFTRow:
        think_end = (task.source.config.prompt or config.model.prompt).think_end
        try:
            return make_row(
                tokenizer,
                task.prompt_ids(problem),
                _chain_text(problem, think_end),
                problem.answer,
                c=settings.compression,
                k=config.k,
                latent_end_id=facts.latent_end_id,
                think_end=think_end,
                explicit=settings.chain == "explicit",
            )
        except ConfigError as error:
            raise type(error)(f"problem {problem.uid}: {error}") from error

    found: list[PreparedTask] = []
    without: list[PreparedTask] = []
    for task in tasks:
        (found if _has_chain(task.source) else without).append(task)
    if not found:
        raise ConfigError(
            "warm_start needs an explicit chain of thought and no training task has one; set the task's columns.cot, "
            "or start from a model that thinks in latent steps already (model.path, no warm_start)"
        )
    share = -(-settings.evaluation_problems // len(found))
    training, held_out = [], []
    for task in found:
        rest, problems = _split(task, share, config, row)
        training.append(rest)
        held_out += [(task, problem) for problem in problems]
    stream = PromptStream(
        [task.source for task in training], [task.source.config.weight for task in training], config.seed
    )
    return SFTData(stream, training, held_out, row, without)


def _chain_text(problem: Problem, think_end: str) -> str:
    """Without the end of thinking: the row puts one behind the chain, and one inside would end it early.

    Raises :class:`NoChain` where nothing else is there.
    """
    text = problem.cot.replace(think_end, "") if think_end else problem.cot
    if not text.strip():
        raise NoChain(
            f"Latent-SFT needs an explicit chain of thought, got {problem.cot!r}; set the task's columns.cot or leave "
            "the problem out"
        )
    return text


def _has_chain(source: TaskSource) -> bool:
    stored = isinstance(source, StoredTask)
    return any(source.problem(i).cot.strip() for i in range(source.size if stored else 1))


def _split(
    task: PreparedTask, count: int, config: RunConfig, row: Callable[[PreparedTask, Problem], SFTRow]
) -> tuple[PreparedTask, list[Problem]]:
    """What to train on, and up to `count` held-out problems: of a generated task the other split, of a stored one
    its last problems. A stored task's unusable problems are dropped and counted; a generated one cannot drop any."""
    source = task.source
    if not isinstance(source, StoredTask):
        options = {**source.config.options, "split": "evaluation", "seed": config.seed + HELD_OUT_SEED, "size": count}
        other = load_task(source.config.model_copy(update={"options": options}), config.seed)
        return task, [other.problem(i) for i in range(count)]
    problems = (source.problem(i) for i in range(source.size))
    faults = {problem.uid: _fault(task, problem, row) for problem in problems}
    for reason in (NO_CHAIN, TOO_SHORT, TOO_LONG):
        source = source.filtered(lambda p, reason=reason: faults[p.uid] != reason, reason)
    _check_lengths(source, _settings(config).compression)
    count = min(count, max(int(source.size * HELD_OUT_SHARE), 1))
    if source.size <= count:
        raise TaskError(
            f"task {task.name}: {source.size} usable problem(s) are too few for Latent-SFT, which keeps {count} "
            "apart to be judged on; give it more"
        )
    held_out = [source.problem(i) for i in range(source.size - count, source.size)]
    names = {problem.uid for problem in held_out}
    rest = source.filtered(lambda p: p.uid not in names, HELD_OUT)
    return dataclasses.replace(task, source=rest), held_out


def _check_lengths(source: StoredTask, compression: int) -> None:
    """Raises TaskError where most of a task's chains were dropped for their length."""
    short, long = (len(source.dropped.get(reason, ())) for reason in (TOO_SHORT, TOO_LONG))
    chains, budget = source.size + short + long, source.config.max_response_tokens
    if short + long > MOST_DROPPED * chains:
        raise TaskError(
            f"task {source.config.name}: {short + long:,} of {chains:,} rows with a chain of thought would be dropped "
            f"for its length, allowed is half: {short:,} are shorter than warm_start.compression ({compression} "
            f"tokens), {long:,} do not fit into max_response_tokens ({budget}). Lower warm_start.compression for "
            "short chains, raise the task's max_response_tokens for long ones, or give a file of the rows that fit"
        )


def _fault(task: PreparedTask, problem: Problem, row: Callable[[PreparedTask, Problem], SFTRow]) -> str | None:
    """Why a stored problem cannot be learned from."""
    try:
        made = row(task, problem)
    except NoChain:
        return NO_CHAIN
    except ChainTooShort:
        return TOO_SHORT
    return TOO_LONG if len(made.chain.ids) + len(made.hard_ids) > task.source.config.max_response_tokens else None


def _settings(config: RunConfig) -> LatentSFTConfig:
    if config.warm_start is None:
        raise ConfigError("Latent-SFT needs the section warm_start; add it (an empty one takes the defaults)")
    return config.warm_start


# --- the loop ------------------------------------------------------------------------------------------------------


def run_latent_sft(
    config: RunConfig,
    data: SFTData,
    learner: SFTLearner,
    pool: Pool,
    metrics: MetricsWriter,
    reporter: Reporter,
    *,
    lineage: int = 0,
    progress: Progress = Progress(),
    keep: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Trains until the held-out pass@1 is `stop_at`, or for `max_steps`. The learner holds the result.

    `keep` writes the learner's state with the progress: every `checkpoint.every` steps, and at an interrupt.
    """
    settings, saved, running = _settings(config), progress.steps, False

    def trained(values: dict[str, float]) -> None:
        nonlocal running, progress
        running, progress = False, dataclasses.replace(progress, steps=progress.steps + 1)
        metrics.write(progress.steps, values, kind="sft", lineage=lineage)

    try:
        with deferred_interrupts(), reporter.phase("Latent-SFT", settings.max_steps) as advance:
            advance(progress.steps)
            rows = data.rows(progress.steps, settings.batch_size)
            while True:
                due = progress.steps % settings.evaluate_every == 0 or progress.steps == settings.max_steps
                if progress.steps and due and progress.evaluated_at != progress.steps:
                    result = _evaluate(config, data, learner, pool, progress.steps)
                    reached = settings.stop_at is not None and result.pass_at_1 >= settings.stop_at
                    progress = Progress(progress.steps, progress.steps, result.pass_at_1, reached)
                    metrics.write(progress.steps, _figures(result), kind="sft_evaluation", lineage=lineage)
                    advance(progress.steps, f"held-out pass@1 {result.pass_at_1:.3f}")
                if progress.reached or progress.steps >= settings.max_steps:
                    return progress
                if _due(config.checkpoint.every, progress.steps) and progress.steps != saved:
                    keep(progress)
                    saved = progress.steps
                check_interrupt()
                learner.start_step(rows, progress.steps)
                running = True
                rows = data.rows(progress.steps + 1, settings.batch_size)  # while the ranks train
                values = awaited(learner)
                trained(values)
                advance(progress.steps, _note(values["loss"], progress))
    except Interrupted:
        if running and (values := settled(learner)) is not None:
            trained(values)
        if not running and progress.steps != saved:
            keep(progress)
            saved = progress.steps
        reporter.say(f"interrupted; the state of Latent-SFT step {saved} is complete" if saved else "interrupted")
        raise


def _due(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _figures(result: TaskResult) -> dict[str, float]:
    names = ("pass_at_1", "standard_error", "chain_length", "latent_length", "invalid_rate")
    return {name: getattr(result, name) for name in names}


def _note(loss: float, progress: Progress) -> str:
    held_out = progress.held_out_pass_at_1
    return f"loss {loss:.3f}" + ("" if held_out is None else f" · held-out pass@1 {held_out:.3f}")


def _evaluate(config: RunConfig, data: SFTData, learner: SFTLearner, pool: Pool, step: int) -> TaskResult:
    pool.publish(learner.publish(step))
    requests = [
        group_request(
            config, task, problem, samples=1, purpose="evaluation", uid=f"sft/{step}/{i}/{problem.uid}", noise="off"
        )
        for i, (task, problem) in enumerate(data.held_out)
    ]
    return results(gather(pool, requests), together="held-out")[0]


# --- as a command, and as the start of a run -----------------------------------------------------------------------


def sft(config: RunConfig, profile: str, reporter: Reporter | None = None) -> RunFolder:
    """Latent-SFT alone (METHOD §7): its model is in the run's `base/`, for `model.path` of later runs."""
    if config.warm_start is None:
        raise ConfigError(f"profile {profile} has no section warm_start; add it (an empty one takes the defaults)")
    reporter = reporter or Reporter()
    parts = ready(config, reporter)
    data = ready_sft(config, parts)
    return _alone(create_run(config, profile), config, 0, reporter, parts, data)


def resume_sft(path: str | Path, overrides: list[str], reporter: Reporter | None = None) -> RunFolder:
    """Goes on with a stopped `sft` from its last complete state; a finished one is only reported."""
    reporter = reporter or Reporter()
    folder = RunFolder(Path(path))
    if (folder.base_model / "config.json").is_file() and (folder.path / "config.json").is_file():
        reporter.say(f"{folder.path} is finished: model {folder.base_model}")
        return folder
    folder, config, lineage = reopen_run(path, overrides)
    if config.warm_start is None:
        raise ConfigError(f"{folder.path} has no warm_start: it is not a Latent-SFT; use `latent-grpo train --resume`")
    return _alone(folder, config, lineage, reporter)


def _alone(
    folder: RunFolder,
    config: RunConfig,
    lineage: int,
    reporter: Reporter,
    parts: Parts | None = None,
    data: SFTData | None = None,
) -> RunFolder:
    with started(folder, config, lineage, reporter, parts=parts) as run:
        model = warm_start(run, data=data)
    reporter.say(f"model {model}; train it with model.path={model} model.new=null warm_start=null")
    return folder


def ready_sft(config: RunConfig, parts: Parts) -> SFTData:
    """What a new run with a Latent-SFT learns from, checked before anything is started for it."""
    data = prepare_sft(config, parts.problems.training, parts.tokenizer, parts.facts)
    data.rows(0, _settings(config).batch_size)  # a generated task drops nothing: a chain that is too short is said now
    return data


def warm_start(run: Run, make_learner: Callable[..., SFTLearner] = SFTLearner, data: SFTData | None = None) -> Path:
    """Latent-SFT of the initial model into `base/` (METHOD §7); a resumed run goes on with it, or has it already.

    `make_learner(config, model)`: what trains, with the face of :class:`SFTLearner`. `data`: of :func:`ready_sft`.
    """
    config, base = run.config, run.folder.base_model
    if (base / "config.json").is_file():
        return base
    data = data or prepare_sft(config, run.problems.training, run.tokenizer, run.facts)
    for line in data.summaries:
        run.reporter.say(line)
    initial = induce(run, data) if config.warm_start.source == "induced" else run.initial
    learner = make_learner(config, initial)
    try:
        outcome = run_latent_sft(
            config,
            data,
            learner,
            run.pool,
            run.metrics,
            run.reporter,
            lineage=run.lineage,
            progress=_restored(run, learner),
            keep=lambda progress: _keep(run, learner, progress),
        )
        with deferred_interrupts():  # what was trained is there before an interrupt ends the run
            run.export(base, learner.export)
            pass_at_1 = outcome.held_out_pass_at_1
            run.record(sft={"steps": outcome.steps, "held_out_pass_at_1": pass_at_1, "dropped": data.dropped})
    finally:
        learner.close()
    shutil.rmtree(run.folder.sft, ignore_errors=True)
    run.reporter.say(f"Latent-SFT: {outcome.steps} steps, held-out pass@1 {outcome.held_out_pass_at_1:.3f}")
    stop_at = config.warm_start.stop_at
    if stop_at is not None and not outcome.reached:
        run.reporter.say(
            f"[yellow]Latent-SFT stopped at warm_start.max_steps ({outcome.steps}) with a held-out pass@1 of "
            f"{outcome.held_out_pass_at_1:.3f}, below stop_at {stop_at}; RL begins from there[/]"
        )
    return base


def _restored(run: Run, learner: SFTLearner) -> Progress:
    checkpoint = latest_checkpoint(run.folder.sft)
    if checkpoint is None:
        return Progress()
    for skipped in checkpoint.skipped:
        run.reporter.say(f"[yellow]state {skipped.path.name} of Latent-SFT skipped: {skipped.reason}[/]")
    learner.load(checkpoint.path / "learner")
    run.reporter.say(f"Latent-SFT goes on from {checkpoint.path.name}, lineage {run.lineage}")
    return Progress(**checkpoint.state)


def _keep(run: Run, learner: SFTLearner, progress: Progress) -> None:
    write_checkpoint(
        run.folder.sft,
        progress.steps,
        lambda folder: learner.save(folder / "learner"),
        dataclasses.asdict(progress),
        run.config.checkpoint.keep,
    )
