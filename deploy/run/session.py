"""The session of a run: it starts Ray, the workers and the metrics, and ends all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from latent_grpo.common.config import ConfigError, RunConfig, config_as_json
from latent_grpo.common.errors import MetricsError
from latent_grpo.common.files import save_whole
from latent_grpo.common.interrupts import sigterm_as_interrupt
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.model_chain import exported_chain, write_chain
from latent_grpo.common.ray_calls import alive_nodes
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.common.transport import choose_transport
from latent_grpo.deploy.controller import Pool
from latent_grpo.deploy.run import link
from latent_grpo.deploy.run.control import Control
from latent_grpo.deploy.run.folder import FolderInUse, RunFolder, discard, is_unused, run_lock, write_identity
from latent_grpo.deploy.run.manifest import data_facts, write_manifest
from latent_grpo.deploy.run.preparation import Prepared
from latent_grpo.deploy.run.problems import Problems
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.ray_session import grows, ray_session, room_for_workers
from latent_grpo.deploy.run.recoveries import Recovery
from latent_grpo.deploy.run.reservation import Reservation, Services
from latent_grpo.deploy.run.storage.store import StorageError
from latent_grpo.deploy.run.storage.upload import uploading
from latent_grpo.deploy.run.versions import differences
from latent_grpo.learner.publication import published_bytes
from latent_grpo.rollout_workers.engine_choice import choose_engine
from latent_grpo.rollout_workers.factory import WorkerFactory
from latent_grpo.rollout_workers.pool import RolloutPool


@dataclass(slots=True)
class Run:
    """What the parts of a run share once its workers have started."""

    folder: RunFolder
    config: RunConfig
    lineage: int
    reporter: Reporter
    metrics: MetricsWriter
    prepared: Prepared
    pool: Pool
    reservation: Reservation = field(default_factory=Reservation)
    summary: dict[str, Any] = field(default_factory=dict)
    recovery: Recovery | None = None  # that is not over
    workers: RolloutPool | None = None  # the pool, where it has workers of its own

    @property
    def initial(self) -> str | Path:
        """The folder or hub id of the model that the run starts from."""
        return self.prepared.initial

    @property
    def problems(self) -> Problems:
        """The run's tasks with their encoded prompts."""
        return self.prepared.problems

    @property
    def store(self) -> TrajectoryStore:
        """The run's dumps of trajectories."""
        return TrajectoryStore(self.folder.trajectories)

    def export(self, target: Path, write: Callable[[Path], None]) -> None:
        """Writes a model folder that appears whole, with the chain's settings in it (`common.model_chain`)."""

        def all_of_it(folder: Path) -> None:
            write(folder)
            write_chain(folder, exported_chain(self.config, self.prepared.model.tokenizer, self.prepared.model.chain))

        save_whole(target, all_of_it)

    def await_workers(self) -> None:
        """Waits until `rollout.min_workers` serve; they have been starting since the session began.

        Raises what `RolloutPool.begin` raises.
        """
        if self.workers is not None:
            self.workers.begin()

    def next_lineage(self) -> None:
        """Ends the run's lineage, as a resume does: what follows goes on from an earlier state."""
        self.lineage += 1
        stored = self.folder.config()  # its number of workers may have changed since (deploy.run.control)
        write_identity(self.folder, stored, self.lineage, self.folder.read_json("run.json")["kind"])
        write_manifest(self.folder, self.config, self.lineage, self.initial, data_facts(self.problems))

    def record(self, **entries: Any) -> None:
        """Adds entries to `summary.json`; one of None is taken out."""
        self.summary = {name: value for name, value in (self.summary | entries).items() if value is not None}
        self.folder.write_json("summary.json", self.summary)


@contextlib.contextmanager
def nothing_left(folder: RunFolder, lineage: int) -> Iterator[Callable[[], None]]:
    """Removes the folder of a new run that cannot begin; the run calls what this yields once it does.

    A worker or a rank that refuses what it was given before the first step, such as damaged weights, counts too.
    """
    begun = lineage > 0

    def begins() -> None:
        nonlocal begun
        begun = True

    try:
        yield begins
    except (ConfigError, MetricsError, StorageError, OSError) as error:
        refused = begun and lineage == 0 and isinstance(error, ConfigError) and is_unused(folder)
        if (not begun or refused) and not isinstance(error, FolderInUse):  # whose folder is another process's
            discard(folder)
        raise


@contextlib.contextmanager
def run_session(
    folder: RunFolder,
    config: RunConfig,
    lineage: int,
    reporter: Reporter,
    prepared: Prepared,
    services: Services = "both",
) -> Iterator[Run]:
    """Starts Ray and the workers of a run, and ends them with the block.

    `services` says which of the two the cluster must have room for. With both, the block begins while the workers
    start, so that the learner starts beside them (:meth:`Run.await_workers`).
    """
    folder = RunFolder(folder.path.resolve())
    reporter.say(f"run folder {folder.path}")
    for difference in differences():
        reporter.say(f"[yellow]{difference}[/]")
    with nothing_left(folder, lineage) as begins, contextlib.ExitStack() as stack:
        stack.enter_context(run_lock(folder.path))
        begin_upload = stack.enter_context(
            uploading(
                folder,
                config,
                reporter.say,
                made=lineage == 0,
                recovering=link.recovery_here(folder.path) is not None,
            )
        )
        prepared = prepared.placed(folder, config, reporter)
        metrics = stack.enter_context(MetricsWriter(folder.path, config.metrics.sinks))
        published = published_bytes(prepared.initial, config.model.dtype)
        reservation = stack.enter_context(ray_session(config, reporter, services, published))
        if services == "both":
            reporter.say(choose_transport(config.weights, alive_nodes()).sentence)
        stack.enter_context(sigterm_as_interrupt())
        write_manifest(folder, config, lineage, prepared.initial, data_facts(prepared.problems))
        reporter.say(f"starting {config.rollout.workers} rollout worker(s), engine {choose_engine(config).sentence}")
        factory = WorkerFactory(config_as_json(config), str(prepared.initial), folder.name)
        control = Control(folder, config, reporter.say, room=partial(room_for_workers, config, services), grows=grows())
        begins()
        begin_upload()
        summary = folder.read_json("summary.json") if lineage and (folder.path / "summary.json").exists() else {}
        pool = stack.enter_context(
            RolloutPool(
                factory,
                config.rollout,
                config.deadlines,
                places=reservation.workers,
                env_vars=config.weights.environment,
                on_poll=control.serve,
                wait=services != "both",  # a learner starts beside them
            )
        )
        yield Run(folder, config, lineage, reporter, metrics, prepared, pool, reservation, summary, workers=pool)
