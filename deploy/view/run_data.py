"""A run's records as Arrow tables: `latent_grpo.open_run(path)`, for notebooks and scripts.

Example::

    import latent_grpo

    run = latent_grpo.open_run("runs/quickstart-20260102-030405")
    reward = run.metrics()["rollout/reward"].to_pylist()
    wrong = run.trajectories(steps=[160]).filter(pc.field("grade_reason") == "wrong").to_pandas()

Nothing is written, and no Ray or model is needed. A run that goes on can be read too: metrics are whole lines and
dumps are whole files, so a table has what was complete when it was asked for, and asking again gives what came since.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from latent_grpo.common.errors import MetricsError
from latent_grpo.common.learner_record import record_schema
from latent_grpo.common.schema import trajectory_schema
from latent_grpo.common.store import (
    DumpError,
    DumpFile,
    DumpStore,
    LearnerStore,
    TrajectoryStore,
    read_columns,
    read_dump,
)
from latent_grpo.deploy.run.health import Alarm
from latent_grpo.deploy.view.run_view import RunView
from latent_grpo.deploy.view.run_view import open_run as open_view
from latent_grpo.deploy.view.status import Status, status_of

TIME = pa.timestamp("ms", tz="UTC")
PLACE = (("step", pa.int64()), ("lineage", pa.int64()), ("purpose", pa.string()))
"""Columns that a dump's file knows and its rows do not; they come first. With group_uid and sample_index they are the
key that trajectories and learner records share."""


class Run:
    """A run's folder, opened for reading. Each method reads the files anew.

    `path` is the folder (for a run in an object store its copy here, which each method brings up to date), `settings`
    the resolved configuration as it was stored.
    """

    def __init__(self, path: str | Path):
        self._place, self._view = path, open_view(path)
        self.path = self._view.folder.path
        self.settings: dict[str, Any] = self._view.settings

    def __repr__(self) -> str:
        return f"Run({str(self._place)!r})"

    def status(self) -> Status:
        """Returns what the run does now: its state, step, pace, time left and alarms that last."""
        return status_of(self._now())

    def summary(self) -> dict[str, Any]:
        """Returns `summary.json`, the run's results; empty before its first evaluation."""
        return self._now().summary

    def metrics(self, kind: str | None = "train") -> pa.Table:
        """Returns a row per record of the live history, oldest first: step, kind, lineage, time, and a column a metric.

        `kind` is `train` (the steps of RL), `evaluation`, `sft`, `sft_evaluation`, ...; None: all of them. A metric is
        null where a record lacks it or it was not finite. Raises MetricsError where a line is damaged.
        """
        view = self._now()
        rows = view.metrics if kind is None else view.metric_rows(kind)
        if view.unreadable:
            raise MetricsError(view.unreadable[0])
        columns: dict[str, pa.Array] = {
            "step": pa.array([row["step"] for row in rows], pa.int64()),
            "kind": pa.array([row["kind"] for row in rows], pa.string()),
            "lineage": pa.array([row["lineage"] for row in rows], pa.int64()),
            "time": pa.array([round(row["time"] * 1000) for row in rows], pa.int64()).cast(TIME),
        }
        for name in dict.fromkeys(name for row in rows for name in row["metrics"]):
            found = (row["metrics"].get(name) for row in rows)
            columns[name] = pa.array([None if value is None else float(value) for value in found], pa.float64())
        return pa.table(columns)

    def trajectories(
        self,
        steps: int | Collection[int] | None = None,
        *,
        purpose: str | None = "training",
        columns: str | Sequence[str] = (),
    ) -> pa.Table:
        """Returns the dumped trajectories of the live history: `step`, `lineage`, `purpose`, and those of the schema.

        `steps`: one, several, or (None) every step with a dump; `purpose` None: evaluations and others too. `columns`,
        one or several, limits which are read, which a long run needs: all of a step of 1,024 rollouts take some hundred
        MB. Raises DumpError for a damaged file and for a column that does not exist.
        """
        schema = trajectory_schema(int(self.settings.get("k") or 0))
        return self._dumps(TrajectoryStore(self._now().folder.trajectories), schema, steps, purpose, columns)

    def learner_records(
        self,
        steps: int | Collection[int] | None = None,
        *,
        purpose: str | None = "training",
        columns: str | Sequence[str] = (),
    ) -> pa.Table:
        """Returns what the learner made of the trajectories: advantage, outcome, log-probs and clips of each step.

        Arguments and errors are those of :meth:`trajectories`.
        """
        store = LearnerStore(self._now().folder.learner_records)
        return self._dumps(store, record_schema(), steps, purpose, columns)

    def alarms(self) -> pa.Table:
        """Returns the alarms of the live history, oldest first: a row each time one is raised, lasts or is over."""
        found = self._now().alarms
        names = [field.name for field in fields(Alarm)]
        kinds = {"step": pa.int64(), "lineage": pa.int64(), "value": pa.float64(), "limit": pa.float64(), "time": TIME}
        rows = [asdict(alarm) | {"time": round(alarm.time * 1000)} for alarm in found]
        return pa.table({n: pa.array([row[n] for row in rows], kinds.get(n, pa.string())) for n in names})

    def _now(self) -> RunView:
        """The folder as it stands: a view keeps what it has read."""
        return open_view(self._place)

    def _dumps(
        self,
        store: DumpStore,
        schema: pa.Schema,
        steps: int | Collection[int] | None,
        purpose: str | None,
        columns: str | Sequence[str],
    ) -> pa.Table:
        columns = [columns] if isinstance(columns, str) else columns
        steps = [steps] if isinstance(steps, int) else steps
        if unknown := [name for name in columns if name not in schema.names]:
            raise DumpError(f"there is no column {', '.join(unknown)}; columns: {', '.join(schema.names)}")
        tables = [
            table
            for file in store.files(purpose=purpose)
            if (steps is None or file.step in steps) and (table := _complete(file, type(store), columns)) is not None
        ]
        if not tables:
            return pa.schema([*map(pa.field, *zip(*PLACE)), *map(schema.field, columns or schema.names)]).empty_table()
        return pa.concat_tables(tables)


def _complete(file: DumpFile, kind: type[DumpStore], columns: Sequence[str]) -> pa.Table | None:
    """Reads a dump; None where the run has removed it since it was listed (dump.keep_bytes)."""
    try:
        if columns:
            table = read_columns(file.path, columns, kind)
        else:
            table = pa.Table.from_batches([read_dump(file.path, kind)])
    except DumpError:
        if file.path.exists():
            raise
        return None
    place = {"step": file.step, "lineage": file.lineage, "purpose": file.purpose}
    for number, (name, kind_of_column) in enumerate(PLACE):
        table = table.add_column(number, name, pa.array([place[name]] * table.num_rows, kind_of_column))
    return table.replace_schema_metadata(None)


open_run: Callable[[str | Path], Run] = Run
"""Opens a run by its folder or its URL. Raises InspectionError for one that does not exist or is not a run's, and
StorageError where an object store cannot be read."""
