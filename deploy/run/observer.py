"""The observer of finished steps: it writes each step's dump, alarms and metrics."""

from __future__ import annotations

from pathlib import Path

from latent_grpo.common.config import RunConfig
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.store import LearnerStore, TrajectoryStore
from latent_grpo.deploy.controller import StepResult, TrainingStopped
from latent_grpo.deploy.run.dumps import DumpWriter, StepDump
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.run.health import HealthMonitor
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.learner.learner import LearnerReport

COLOURS = {"raised": "yellow", "lasting": "yellow", "over": "green"}


class StepObserver:
    """Records each finished step of a run. When its block ends, everything is on the disk, or DumpError is raised."""

    def __init__(self, folder: RunFolder, config: RunConfig, lineage: int, metrics: MetricsWriter, reporter: Reporter):
        self._config, self._lineage, self._metrics, self._reporter = config, lineage, metrics, reporter
        self._monitor = HealthMonitor(folder.path, config, lineage)
        stores = TrajectoryStore(folder.trajectories), LearnerStore(folder.learner_records)
        self._dumps = DumpWriter(*stores, config.dump, lineage, config.deadlines.dump_s)

    def __enter__(self) -> StepObserver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._monitor.close()
        self._dumps.__exit__(kind, *rest)

    def flush(self, seconds: float | None = None) -> None:
        """Waits until the dumps of all observed steps are on the disk. Raises DumpError."""
        self._dumps.flush(seconds)

    def observe(self, result: StepResult, report: LearnerReport | None) -> None:
        """Records a step. `report` is the learner's, or None if it took no part in the step.

        Raises DumpError, and TrainingStopped after `optimizer.max_bad_updates` non-finite updates in a row.
        """
        metrics = dict(result.metrics)
        if self._config.dump_due(result.step):
            records = None if report is None else report.records
            dump = StepDump(step=result.step, groups=result.generated, reasons=result.reasons, records=records)
            metrics["time/dump_wait_s"] = self._dumps.submit(dump)
        if metrics.get("learner/skipped_updates"):
            self._dump_bad(result, report)
        for alarm in self._monitor.judge(result.step, metrics):
            colour = COLOURS[alarm.state]
            self._reporter.say(f"[{colour}]alarm, step {alarm.step}: {alarm.sentence}[/]")
        metrics["health/alarms"] = len(self._monitor.active)
        self._metrics.write(result.step, metrics, lineage=self._lineage)
        in_a_row, limit = metrics.get("learner/bad_updates_in_a_row", 0), self._config.optimizer.max_bad_updates
        if in_a_row >= limit:
            self.flush()  # the batch that shows the cause is on the disk before the run ends
            raise TrainingStopped(
                f"step {result.step}: {in_a_row:g} non-finite updates in a row (optimizer.max_bad_updates {limit}); "
                f"samples: {self._named(result, report)}; their batch: {self._bad_folder(result)}. None of them was "
                "applied: look at the samples, lower optimizer.lr, or resume from an earlier checkpoint"
            )

    def _dump_bad(self, result: StepResult, report: LearnerReport | None) -> None:
        """Dumps the batch of an update that was not applied, whatever the section `dump` says."""
        self._dumps.submit(
            StepDump(step=result.step, groups=(result.batch,), reasons=(None,), records=None, purpose="non_finite")
        )
        self._reporter.say(
            f"[red]step {result.step}: non-finite update not applied; samples: "
            f"{self._named(result, report)}; batch: {self._bad_folder(result)!s}[/]"
        )

    @staticmethod
    def _named(result: StepResult, report: LearnerReport | None) -> str:
        if result.batch is None or report is None:
            return "none identified"
        uids, indices = (result.batch.column(name) for name in ("group_uid", "sample_index"))
        return ", ".join(f"{uids[row]} #{indices[row]}" for row in report.bad_rows) or "none identified"

    def _bad_folder(self, result: StepResult) -> Path:
        return self._dumps.trajectories.folder_of(result.step, "non_finite")
