"""The loop of Latent-SFT (METHOD §7): it trains on chains, measures held-out pass@1, and stops where RL can begin.

rows of the next step are made here ──► ranks train ──► every `evaluate_every` steps: publish, generate, grade

A step is a function of its number: rows, perturbation and self-feeding come from (seed, step). The state of a stopped
Latent-SFT is therefore the learner's and a :class:`Progress`, and a resume repeats and skips nothing.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.common.errors import RunError
from latent_grpo.common.interrupts import deferred_interrupts
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.remote_url import is_url
from latent_grpo.common.schema import concat
from latent_grpo.deploy.controller import Pool, gather
from latent_grpo.deploy.evaluation.scores import TaskResult, failure_shares, results
from latent_grpo.deploy.run.folder import (
    FAILED,
    SFT_PURPOSE,
    RunFolder,
    check_named,
    create_run,
    has_begun,
    named_run,
    reopen_run,
)
from latent_grpo.deploy.run.foreign_code import check_origin
from latent_grpo.deploy.run.preparation import Prepared, prepare
from latent_grpo.deploy.run.problems import group_request
from latent_grpo.deploy.run.progress import Advance, Reporter, first_step_line
from latent_grpo.deploy.run.recovery import recovered, recovering
from latent_grpo.deploy.run.session import Run, run_session
from latent_grpo.deploy.run.sft_data import SFTData
from latent_grpo.deploy.run.stepping import LearnerSteps, StateKeeper, StepLearner
from latent_grpo.deploy.run.storage.copy import named_copy, working_copy
from latent_grpo.deploy.run.storage.upload import push
from latent_grpo.deploy.sft.induction import induce
from latent_grpo.learner.checkpoint import latest_checkpoint, write_checkpoint
from latent_grpo.learner.sft.learner import SFTLearner


class SFTRanks(StepLearner, Protocol):
    """The learner of the loop: :class:`SFTLearner`, or one with its interface."""

    def publish(self, version: int) -> Any:
        """Returns a publication of the weights for the rollout pool."""

    def save(self, folder: str | Path) -> None:
        """Writes every rank's state below a folder."""

    def load(self, folder: str | Path) -> None:
        """Reads every rank's state from below a folder."""

    def export(self, folder: str | Path) -> None:
        """Writes the model as a Hugging Face folder."""

    def close(self) -> None:
        """Ends the ranks; may be called twice."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a Latent-SFT, as its checkpoints store it."""

    steps: int = 0
    evaluated_at: int = 0
    held_out_pass_at_1: float | None = None  # of the last evaluation
    reached: bool = False  # whether pass@1 has reached stop_at


# --- the loop ------------------------------------------------------------------------------------------------------


def run_latent_sft(
    config: RunConfig,
    data: SFTData,
    learner: SFTRanks,
    pool: Pool,
    metrics: MetricsWriter,
    reporter: Reporter,
    *,
    lineage: int = 0,
    progress: Progress = Progress(),
    keep: Callable[[Progress], None] = lambda progress: None,
    dump: Callable[[int, pa.RecordBatch], None] = lambda step, samples: None,
) -> Progress:
    """Trains until the held-out pass@1 reaches `stop_at`, or for `max_steps`. The learner holds the result.

    `keep` saves the learner's state with the progress: every `checkpoint.every` steps, at an interrupt, and where
    :class:`StateKeeper` says so. `dump` stores the held-out samples of each evaluation.
    """
    settings = config.latent_sft

    def record(done: int, values: dict[str, float]) -> None:
        nonlocal progress
        progress = dataclasses.replace(progress, steps=done)
        metrics.write(done, values, kind="sft", lineage=lineage)

    def record_state(done: int, values: dict[str, float]) -> None:
        metrics.write(done, values, kind="sft_checkpoint", lineage=lineage)

    def write(done: int) -> None:
        keep(progress)

    keeper = StateKeeper("Latent-SFT", progress.steps, write, record_state, config.deadlines, reporter)
    steps = LearnerSteps(learner, progress.steps, record, keeper)
    with (
        steps.interruptible(reporter),
        reporter.phase("Latent-SFT", settings.max_steps) as advance,
    ):
        advance(progress.steps)
        rows = data.rows(progress.steps, settings.batch_size)
        first, note, curve = progress.steps, "", ""

        def waiting(completed: float, what: str = "") -> None:
            advance(completed, f"{curve}{what}")

        while True:
            due = progress.steps % settings.evaluate_every == 0 or progress.steps >= settings.max_steps
            if progress.steps and due and progress.evaluated_at != progress.steps:
                sampled = partial(_show_sampled, advance, progress.steps, len(data.held_out))
                groups = _held_out(config, data, learner, pool, progress.steps, sampled)
                dump(progress.steps, concat(groups))
                (result,), failures = results(groups, together="held-out"), failure_shares(groups)
                reached = settings.stop_at is not None and result.pass_at_1 >= settings.stop_at
                progress = Progress(progress.steps, progress.steps, result.pass_at_1, reached)
                metrics.write(progress.steps, _figures(result, failures), kind="sft_evaluation", lineage=lineage)
                note = held_out_line(result, failures)
                advance(progress.steps, note)
            if progress.reached or progress.steps >= settings.max_steps:
                if note:
                    reporter.say(f"Latent-SFT, step {progress.steps}: {note}")
                return progress
            if _due(config.checkpoint.every, progress.steps):
                steps.keep()
            steps.start(rows, progress.steps)
            rows = data.rows(progress.steps + 1, settings.batch_size)  # while the ranks train
            values = steps.finish(waiting)
            shown = _losses(values) + (f" · {note}" if note else "")
            advance(progress.steps, shown)
            curve = f"{shown} · "
            if progress.steps == first + 1:
                ends = "" if settings.stop_at is None else f", which ends earlier at pass@1 {settings.stop_at:g}"
                left = settings.max_steps - progress.steps
                reporter.say(first_step_line(f"Latent-SFT{ends}", steps.took, left, {}))


def _due(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _figures(result: TaskResult, failures: Mapping[str, float]) -> dict[str, float]:
    names = ("pass_at_1", "standard_error", "chain_length", "latent_length", "invalid_rate")
    figures = {name: getattr(result, name) for name in names}
    return figures | {f"{FAILED}{reason}": share for reason, share in failures.items()}


def held_out_line(result: TaskResult, failures: Mapping[str, float]) -> str:
    """`held-out pass@1 0.450, length 17.0 (12.0 latent), invalid 0%, wrong 50%, no_answer 5%`."""
    parts = [
        f"held-out pass@1 {result.pass_at_1:.3f}",
        f"length {result.chain_length:.1f} ({result.latent_length:.1f} latent)",
        f"invalid {result.invalid_rate:.0%}",
        *(f"{reason} {share:.0%}" for reason, share in failures.items()),
    ]
    return ", ".join(parts)


def _losses(values: Mapping[str, float]) -> str:
    return f"loss {values['loss']:.3f} (KL {values['kl']:.3f}, cross-entropy {values['cross_entropy']:.3f})"


def _show_sampled(advance: Advance, steps: int, total: int, done: int) -> None:
    advance(steps, f"held-out samples {done:,}/{total:,}")


def _held_out(
    config: RunConfig, data: SFTData, learner: SFTRanks, pool: Pool, step: int, sampled: Callable[[int], None]
) -> list[pa.RecordBatch]:
    """Generates a sample, noise off, of each held-out problem with the learner's weights.

    `sampled` is called with the number of those so far.
    """
    pool.publish(learner.publish(step))
    requests = [
        group_request(
            config,
            task,
            problem,
            samples=1,
            purpose="evaluation",
            uid=f"sft/{step}/{i}/{problem.uid}",
            noise="off",
            prompt_ids=data.held_out_prompts[i],
        )
        for i, (task, problem) in enumerate(data.held_out)
    ]
    return gather(pool, requests, sampled)


# --- as a command, and as the start of a run -----------------------------------------------------------------------


def sft(config: RunConfig, profile: str, reporter: Reporter | None = None) -> RunFolder:
    """Runs Latent-SFT alone (METHOD §7). Its model is in the run's `base/`, for `model.path` of later runs.

    One of the name `run_name` that has begun goes on, and one that has ended is left as it is.
    """
    if config.warm_start is None:
        raise ConfigError(f"profile {profile} has no section warm_start; add it (an empty section uses the defaults)")
    reporter = reporter or Reporter()
    named = named_run(config)
    if named is not None:
        named_copy(config, named, reporter.say)
    if named is not None and has_begun(named):
        check_named(named, config, ["sft"])
        if (ended := _ended(named, reporter)) is not None:
            if is_url(config.runs_folder):
                push(named, reporter.say)
            return ended
        folder, config, lineage = reopen_run(named, [], "sft", config)
        return _alone(folder, config, lineage, reporter, prepare(config, reporter, folder))
    prepared = prepare(config, reporter)
    return _alone(create_run(config, profile, named, kind="sft"), config, 0, reporter, prepared)


def resume_sft(
    path: str | Path, overrides: list[str], reporter: Reporter | None = None, allowed: Sequence[str] = ()
) -> RunFolder:
    """Resumes a stopped `sft` from its last complete state; a finished one is only reported.

    `allowed` are modules or import paths that may be imported for a run of another user (`deploy.run.foreign_code`).
    """
    reporter = reporter or Reporter()
    if is_url(str(path)):
        path, overrides = working_copy(str(path), overrides, reporter.say, allowed)
    if (ended := _ended(Path(path), reporter)) is not None:
        return ended
    check = partial(check_origin, overrides=overrides, allowed=allowed)
    folder, config, lineage = reopen_run(path, overrides, "sft", check=check)
    if config.warm_start is None:
        raise ConfigError(
            f"{folder.path} has no warm_start, so it is not a Latent-SFT; resume it with `latent-grpo train --resume`"
        )
    return _alone(folder, config, lineage, reporter, prepare(config, reporter, folder))


def _ended(path: Path, reporter: Reporter) -> RunFolder | None:
    """Returns a Latent-SFT that has ended, and says so; None: it has not."""
    folder = RunFolder(path)
    if not ((folder.base_model / "config.json").is_file() and (folder.path / "config.json").is_file()):
        return None
    reporter.say(f"{folder.path} is finished: model {folder.base_model}")
    return folder


def _alone(folder: RunFolder, config: RunConfig, lineage: int, reporter: Reporter, prepared: Prepared) -> RunFolder:
    with run_session(folder, config, lineage, reporter, prepared) as run:
        model = recovering(run, lambda: warm_start(run), kind="sft")
    reporter.say(f"model {model}; to train it, give model.path={model} model.new=null warm_start=null")
    return folder


def warm_start(run: Run, make_learner: Callable[[RunConfig, str | Path], SFTRanks] | None = None) -> Path:
    """Runs Latent-SFT on the initial model and returns its folder, `base/` (METHOD §7).

    A resumed run continues its Latent-SFT, or finds it finished. `make_learner(config, model)` makes a learner with the
    interface of :class:`SFTLearner`, in whose place it is used.
    """
    make_learner = make_learner or partial(SFTLearner, places=run.reservation.ranks)
    config, base, data = run.config, run.folder.base_model, run.prepared.sft
    if (base / "config.json").is_file():
        return base
    if data is None:
        raise RunError(
            f"{run.folder.path}: its Latent-SFT was not prepared and base/ holds no model; resume the run again"
        )
    for line in data.summaries:
        run.reporter.say(line)
    initial = induce(run, data) if config.latent_sft.source == "induced" else run.initial
    run.reporter.say(f"starting {config.learner.ranks} learner rank(s) for Latent-SFT")
    learner = make_learner(config, initial)
    try:
        run.await_workers()
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
            dump=partial(_dump, run),
        )
        with deferred_interrupts():  # the trained model is saved before an interrupt ends the run
            run.export(base, learner.export)
            pass_at_1 = outcome.held_out_pass_at_1
            run.record(sft={"steps": outcome.steps, "held_out_pass_at_1": pass_at_1, "dropped": data.dropped})
    finally:
        learner.close()
    shutil.rmtree(run.folder.sft, ignore_errors=True)
    run.prepared = dataclasses.replace(run.prepared, sft=None)  # its encoded chains are not needed again
    stop_at = config.latent_sft.stop_at
    if stop_at is not None and not outcome.reached:
        run.reporter.say(
            f"[yellow]Latent-SFT stopped at warm_start.max_steps ({outcome.steps}) with a held-out pass@1 of "
            f"{outcome.held_out_pass_at_1:.3f}, below stop_at {stop_at}; RL starts from this model[/]"
        )
    return base


def _dump(run: Run, step: int, samples: pa.RecordBatch) -> None:
    if run.config.dump.every or run.config.dump.evaluation:
        run.store.write(step, samples, SFT_PURPOSE, run.lineage)


def _restored(run: Run, learner: SFTRanks) -> Progress:
    checkpoint = latest_checkpoint(run.folder.sft)
    progress = Progress()
    if checkpoint is not None:
        for skipped in checkpoint.skipped:
            run.reporter.say(f"[yellow]state {skipped.path.name} of Latent-SFT skipped: {skipped.reason}[/]")
        learner.load(checkpoint.path / "learner")
        run.reporter.say(f"resuming Latent-SFT from {checkpoint.path.name}, lineage {run.lineage}")
        progress = Progress(**checkpoint.state)
    recovered(run, progress.steps)
    return progress


def _keep(run: Run, learner: SFTRanks, progress: Progress) -> None:
    write_checkpoint(
        run.folder.sft,
        progress.steps,
        lambda folder: learner.save(folder / "learner"),
        dataclasses.asdict(progress),
        run.config.checkpoint.keep,
    )
