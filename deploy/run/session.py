"""What every command that generates needs: Ray, a model with its tokenizer, problems, and workers; and their end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from latent_grpo.common.config import RunConfig, config_as_json
from latent_grpo.common.files import save_whole
from latent_grpo.common.interrupts import terminated_is_interrupted
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.model_chain import ChainSettings, chain_of, write_chain
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.common.types import TokenFacts
from latent_grpo.deploy.run.folder import RunFolder, run_lock
from latent_grpo.deploy.run.manifest import data_facts, write_manifest
from latent_grpo.deploy.run.preparation import Parts, engine_rows, prepare
from latent_grpo.deploy.run.problems import Problems
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.ray_session import Services, ray_session
from latent_grpo.deploy.run.versions import differences
from latent_grpo.rollout_workers.factory import WorkerFactory
from latent_grpo.rollout_workers.pool import RolloutPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    chain: ChainSettings | None = None  # of the initial model, where it says so
    summary: dict = field(default_factory=dict)

    @property
    def store(self) -> TrajectoryStore:
        return TrajectoryStore(self.folder.trajectories)

    def export(self, target: Path, write: Callable[[Path], None]) -> None:
        """A model folder that appears whole, with the chain's settings in it (`common.model_chain`)."""

        def all_of_it(folder: Path) -> None:
            write(folder)
            write_chain(folder, chain_of(self.config, self.tokenizer, self.chain))

        save_whole(target, all_of_it)

    def record(self, **entries) -> None:
        self.summary |= entries
        self.folder.write_json("summary.json", self.summary)


def run_of(parts: Parts, folder: RunFolder, config: RunConfig, lineage: int, reporter: Reporter, metrics, pool) -> Run:
    """The run of these parts, with the workers in `pool`."""
    initial, tokenizer, facts, problems = parts.initial, parts.tokenizer, parts.facts, parts.problems
    return Run(folder, config, lineage, reporter, metrics, initial, tokenizer, facts, problems, pool, parts.chain)


@contextlib.contextmanager
def started(
    folder: RunFolder,
    config: RunConfig,
    lineage: int,
    reporter: Reporter,
    services: Services = "both",
    parts: Parts | None = None,
) -> Iterator[Run]:
    """Ray and the workers of a run; all of it gone afterwards.

    `services`: which of the two the cluster must have room for. `parts`: of :func:`ready`, where the run is a new one.
    """
    engine_rows(config)  # raises before anything is started
    folder = RunFolder(folder.path.resolve())
    reporter.say(f"run folder {folder.path}")
    for difference in differences():
        reporter.say(f"[yellow]{difference}[/]")
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_lock(folder.path))
        parts = (parts or prepare(config, reporter, folder)).placed(folder, config, reporter)
        metrics = stack.enter_context(MetricsWriter(folder.path, config.metrics.sinks))
        stack.enter_context(ray_session(config, services))
        stack.enter_context(terminated_is_interrupted())
        write_manifest(folder, config, lineage, parts.initial, data_facts(parts.problems))
        reporter.say(f"starting {config.rollout.workers} rollout worker(s)")
        factory = WorkerFactory(config_as_json(config), str(parts.initial), folder.name)
        pool = stack.enter_context(RolloutPool(factory, config.rollout, config.deadlines))
        run = run_of(parts, folder, config, lineage, reporter, metrics, pool)
        if lineage and (folder.path / "summary.json").is_file():
            run.summary = folder.read_json("summary.json")
        yield run
