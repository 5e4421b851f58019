"""One of the two services alone, for debugging: rollouts with fixed weights, or training on dumps.

rollout_only:  problems ─► workers ─► controller ─► dumps, metrics, alarms          (no learner)
train_only:    dumps of a run ─► learner ─► metrics, learner records, model         (no worker)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from latent_grpo.common.config import ConfigError, RunConfig, load_config
from latent_grpo.common.files import save_whole
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.model_chain import read_chain, write_chain
from latent_grpo.common.store import step_ranges
from latent_grpo.common.weights import Publication
from latent_grpo.deploy.controller import Controller, StepResult
from latent_grpo.deploy.replay.recorded import RecordedRun, Start
from latent_grpo.deploy.replay.replay import recorded_learner
from latent_grpo.deploy.run.folder import RunFolder, create_run, run_lock
from latent_grpo.deploy.run.foreign_code import announced, check_origin
from latent_grpo.deploy.run.manifest import record_model, write_manifest
from latent_grpo.deploy.run.manifest_schema import DataFacts
from latent_grpo.deploy.run.observer import StepObserver
from latent_grpo.deploy.run.preparation import prepare
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.session import run_session
from latent_grpo.deploy.run.storage.copy import local_copy
from latent_grpo.deploy.run.storage.upload import uploading
from latent_grpo.learner.learner import LearnerGroup
from latent_grpo.learner.publication import publish_model
from latent_grpo.rollout_workers.metrics import rollout_metrics


class FrozenLearner:
    """A `Learner` for the controller that does not train: every version has the weights of the first."""

    last_report = None

    def __init__(self, model: str | Path, config: RunConfig):
        self._publication: Publication = publish_model(model, 0, config)

    def start_step(self, batch: pa.RecordBatch, step: int) -> None:
        pass

    def finished(self) -> bool:
        return True

    def finish_step(self) -> dict[str, float]:
        return {}

    def publish(self, version: int) -> Publication:
        return self._publication.of_version(version)


def rollout_only(config: RunConfig, profile: str, reporter: Reporter | None = None) -> RunFolder:
    """Runs `config.steps` steps of rollouts with the initial weights: dumps, metrics and alarms, and no learner."""
    if config.warm_start is not None:
        raise ConfigError(
            "--rollout-only starts no learner, so it cannot run the warm start: give a finished model with "
            "model.path=... model.new=null warm_start=null, or leave the warm start out with warm_start=null"
        )
    if config.stop_on is not None:
        raise ConfigError("stop_on has no effect with --rollout-only, which takes all its steps; remove it")
    if config.run_name is not None:
        raise ConfigError(
            "run_name has no effect with --rollout-only, which does not go on with a run; remove it: the folder is "
            "called rollout-, then the profile and the time"
        )
    reporter = reporter or Reporter()
    prepared = prepare(config, reporter)
    folder = create_run(config, f"rollout-{Path(profile).stem}")
    with run_session(folder, config, 0, reporter, prepared, "rollout") as run:
        learner = FrozenLearner(run.initial, config)
        controller = Controller(config, run.pool, learner, run.problems.requests)
        controller.begin()
        with (
            StepObserver(run.folder, config, 0, run.metrics, reporter) as observer,
            reporter.phase("rollouts", config.steps) as advance,
        ):
            while controller.step < config.steps:
                result = controller.run_step()
                observer.observe(result, None)
                advance(result.step, f"reward {result.metrics['rollout/reward']:.3f}")
    reporter.say(f"dumps and metrics in {folder.path}")
    return folder


def train_only(
    source: str | Path, overrides: list[str], reporter: Reporter | None = None, allowed: Sequence[str] = ()
) -> RunFolder:
    """Trains on the dumped batches of run `source`, step by step, from the model that it started from.

    Settings are the run's with `overrides` (any but `k` may change). Metrics, dumps and the model go into a new run
    folder. Steps that were not dumped are left out, and the others are numbered from 1; `steps` limits their number.
    `allowed` are modules or import paths that may be imported for a run of another user (`deploy.run.foreign_code`).
    """
    reporter = reporter or Reporter()
    origin = RunFolder(local_copy(source).resolve())
    if not (origin.path / "config.json").is_file():
        raise ConfigError(
            f"--train-only {source}: it has no config.json; give a run folder such as runs/quickstart-..."
        )
    recorded = RecordedRun(origin, origin.placed_config())
    model = [f"model.path={recorded.base}", "model.new=null", "warm_start=null"]  # the new run's start is finished
    config = load_config(recorded.config.model_dump(mode="json"), [*overrides, *model])
    check_origin(origin.path, config, overrides, allowed)
    for line in announced(config):
        reporter.say(line)
    dumped = recorded.dumped[: config.steps]
    if not dumped:
        every = recorded.config.dump.every
        raise ConfigError(f"--train-only {source}: the run has no dumped trajectories; its dump.every was {every}")
    if config.schema_k != recorded.config.schema_k:
        raise ConfigError(
            f"k ({config.schema_k}) differs from that of the dumps ({recorded.config.schema_k}); do not change k or "
            "algorithm"
        )
    folder = create_run(config, f"train-{origin.name}")
    reporter.say(f"run folder {folder.path}; {len(dumped)} dumped steps of {origin.path}")
    source_facts = DataFacts(task="dumps", use="training", source=str(origin.path), steps=step_ranges(dumped))
    write_manifest(folder, config, 0, recorded.base, [source_facts])
    with (
        run_lock(folder.path),
        uploading(folder, config, reporter.say, made=True) as begin_upload,
        MetricsWriter(folder.path, config.metrics.sinks) as metrics,
        recorded_learner(config, recorded.base, Start(step=0, checkpoint=None), reporter) as learner,
        StepObserver(folder, config, 0, metrics, reporter) as observer,
        reporter.phase("learner", len(dumped)) as advance,
    ):
        begin_upload()
        for number, step in enumerate(dumped, start=1):
            batch = recorded.step(step).batch
            if batch is not None:
                report = learner.train(batch, number - 1)
                found = report.metrics | rollout_metrics(batch) | {"batch/source_step": step}
                observer.observe(StepResult(number, batch, (batch,), (None,), found), report)
            advance(number)
        save_whole(folder.model, lambda unfinished: _export(learner, recorded.base, unfinished))
        record_model(folder, "trained", folder.model)
    reporter.say(f"model {folder.model}; metrics and learner records in {folder.path}")
    return folder


def _export(learner: LearnerGroup, base: str | Path, target: Path) -> None:
    """Exports the model with its base's latent_chain.json, if there is one."""
    learner.export(target)
    chain = read_chain(base)
    if chain is not None:
        write_chain(target, chain)
