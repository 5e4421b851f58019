"""A read-only view of a run's folder, of a run that is running, has ended or has failed: settings, metrics and dumps.

Nothing here writes, starts Ray or loads a model. `RunView.rows` reads only the small columns of the dumps, so that
filters are fast on long runs; :mod:`deploy.view.thoughts` then loads the trajectories that are shown.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from latent_grpo.common.metrics import FILE as METRICS_FILE
from latent_grpo.common.metrics import read_metrics
from latent_grpo.common.remote_url import is_url
from latent_grpo.common.store import (
    DumpError,
    DumpFile,
    LearnerStore,
    TrajectoryStore,
    count_rows,
    read_columns,
    step_ranges,
)
from latent_grpo.deploy.run.folder import RunFolder, RunKind
from latent_grpo.deploy.run.health import Alarm, read_alarms
from latent_grpo.deploy.run.manifest import ManifestError, read_manifest
from latent_grpo.deploy.run.manifest_schema import RunManifest
from latent_grpo.deploy.run.storage.copy import RECORDS, local_copy
from latent_grpo.deploy.run.stored import EVALUATION_FILE, IDENTITY, RESTORE, StoredError, stored_object
from latent_grpo.deploy.view.selection import Filters, InspectionError, Row, exact_matches_first, no_match, ordered


@dataclass
class RunView:
    """An open run. `unreadable` collects a sentence for each file, or line of one, that could not be read."""

    folder: RunFolder
    settings: dict[str, Any]  # config.json as it stands: readable whatever version wrote it
    unreadable: list[str] = field(default_factory=list)
    manifest_missing: str = ""
    url: str | None = None  # of a run in an object store, of which `folder` is a copy
    _rows_of: dict[Path, list[Row]] = field(default_factory=dict, init=False, repr=False)

    # --- the run ---------------------------------------------------------------------------------------------------

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`; empty where there is none."""
        return _optional(self.folder.path / "summary.json")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The content of `run.json`; empty where there is none."""
        return _optional(self.folder.path / IDENTITY)

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """The results of an evaluation run; empty for other runs and before its end."""
        return _optional(self.folder.path / EVALUATION_FILE)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """All lines of the live history, of every kind; empty where the run has recorded nothing yet.

        Damaged ones are left out, counted and named in `unreadable`. Raises MetricsError where the file cannot be read.
        """
        if not (self.folder.path / METRICS_FILE).exists():
            return []
        left_out: list[str] = []
        rows = list(read_metrics(self.folder.path, kind=None, left_out=left_out))
        if left_out:
            more = f"; {len(left_out) - 1:,} more of its lines are damaged, too" if left_out[1:] else ""
            self.unreadable.append(left_out[0] + more)
        return rows

    def metric_rows(self, kind: str) -> list[dict[str, Any]]:
        """Returns the rows of `metrics.jsonl` of a kind: train, evaluation, sft, ..."""
        return [row for row in self.metrics if row["kind"] == kind]

    @cached_property
    def alarms(self) -> tuple[Alarm, ...]:
        """The alarms of the live history, oldest first; lines that cannot be read are named in `unreadable`.

        Raises MetricsError where the run's metrics cannot be read.
        """
        record = read_alarms(self.folder.path)
        self.unreadable += record.left_out
        return record.alarms

    @property
    def kind(self) -> RunKind:
        """What the run does. Runs of 0.2.0 and earlier do not say it: an evaluation is told by its results."""
        stated: RunKind | None = self.identity.get("kind")
        return stated or ("evaluate" if (self.folder.path / EVALUATION_FILE).exists() else "train")

    @property
    def wanted_steps(self) -> int:
        """Steps of RL, or of Latent-SFT in a run that does only that; 0 for an evaluation."""
        if self.kind == "sft":
            return int((self.settings.get("warm_start") or {}).get("max_steps", 0))
        return 0 if self.kind == "evaluate" else int(self.settings.get("steps", 0))

    @property
    def done_steps(self) -> int:
        """The last step that is done; 0: none."""
        return max((row["step"] for row in self.metric_rows("sft" if self.kind == "sft" else "train")), default=0)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        if self.kind == "sft" and self.settings.get("warm_start") is None:  # a suite's start that was given
            return "after" in self.summary
        if self.kind == "sft":
            return (self.folder.base_model / "config.json").is_file()
        if self.kind == "evaluate":
            return (self.folder.path / EVALUATION_FILE).is_file()
        return "minutes" in self.summary and self.done_steps >= self.wanted_steps

    @property
    def state(self) -> str:
        """The state of the run in one phrase."""
        if self.kind == "evaluate":
            return "finished evaluation" if self.finished else "unfinished evaluation: no results yet"
        of = " of Latent-SFT" if self.kind == "sft" else ""
        if self.finished:
            return f"finished after {self.done_steps} steps{of}"
        return f"unfinished: {self.done_steps} of {self.wanted_steps} steps{of} recorded so far"

    @cached_property
    def manifest(self) -> RunManifest | None:
        """The run's manifest, or None if it has none (`manifest_missing` then says why)."""
        try:
            return read_manifest(self.folder.path)
        except ManifestError as error:
            self.manifest_missing = str(error)
            return None

    # --- dumps -----------------------------------------------------------------------------------------------------

    @property
    def store(self) -> TrajectoryStore:
        """The run's dumps of trajectories."""
        return TrajectoryStore(self.folder.trajectories)

    def files(self, filters: Filters) -> list[DumpFile]:
        """Returns dump files that can hold matches. Raises InspectionError, which names what exists instead."""
        files = self.store.files(purpose=filters.purpose, lineage=filters.lineage)
        if not files:
            raise InspectionError(self._no_dumps(filters))
        chosen = [file for file in files if filters.has_step(file.step)]
        if not chosen:
            by_purpose: dict[str, set[int]] = {}
            for file in files:
                by_purpose.setdefault(file.purpose, set()).add(file.step)
            have = "; ".join(f"{purpose}: {step_ranges(sorted(steps))}" for purpose, steps in by_purpose.items())
            raise InspectionError(f"{filters}: no trajectory of that step was dumped. Steps with dumps: {have}")
        return chosen

    def _no_dumps(self, filters: Filters) -> str:
        every = self.settings.get("dump", {}).get("every")
        if filters.purpose is not None or filters.lineage is not None:
            other = sorted({file.purpose for file in self.store.files(purpose=None)})
            if other:
                return f"{filters}: no such dumps in {self.folder.path}; it has dumps of {', '.join(other)}"
        if every == 0:
            return f"{self.folder.path} has no trajectory dumps: its setting dump.every is 0, which turns them off"
        if not self.finished:
            return (
                f"{self.folder.path} has no trajectory dumps yet: {self.state}, and dump.every is {every}; "
                "try again after that step"
            )
        return (
            f"{self.folder.path} has no trajectory dumps: none was written by step {self.done_steps} "
            f"(dump.every {every}), or they were deleted"
        )

    def rows(self, filters: Filters) -> list[Row]:
        """Returns matching trajectories in the order of the filters.

        Raises InspectionError if none match, and DumpError if no file is readable; a damaged file among good ones is
        left out and named in `unreadable`.
        """
        files = self.files(filters)
        every: list[Row] = []
        failures: list[DumpError] = []
        for file in files:
            try:
                every += self._file_rows(file)
            except DumpError as error:
                failures.append(error)
        if failures and not every:
            raise failures[0]
        for failure in failures:
            self.leave_out(failure)
        chosen = exact_matches_first([row for row in every if filters.accepts(row)], filters)
        if not chosen:
            raise InspectionError(no_match(filters, every))
        return ordered(chosen, filters.sort)

    def group(self, row: Row) -> list[Row]:
        """Returns the dumped samples of a row's group, the row included, in sample order."""
        rows = [r for r in self._file_rows(row.file) if r.group_uid == row.group_uid]
        return sorted(rows, key=lambda r: r.sample_index)

    def count(self, file: DumpFile) -> int:
        """Returns a file's number of trajectories; 0 if it cannot be read, and it is then named in `unreadable`."""
        try:
            return count_rows(file.path)
        except DumpError as error:
            self.leave_out(error)
            return 0

    def _read_rows(self, file: DumpFile) -> list[Row]:
        """Reads the small columns of a dump, with those of the learner's record if it can be read. Raises DumpError."""
        table = read_columns(file.path, [*_COLUMNS, "hard_ids"])
        hard = pc.list_value_length(table["hard_ids"]).to_pylist()
        columns = {ours: table[theirs].to_pylist() for theirs, ours in _COLUMNS.items()}
        records = self.records_path(file)
        if records.exists():
            try:
                columns |= _learner_columns(records, list(zip(columns["group_uid"], columns["sample_index"])))
            except DumpError as error:
                self.leave_out(error)
        return [
            Row(file=file, index=i, length=columns["latent"][i] + hard[i], **{n: v[i] for n, v in columns.items()})
            for i in range(table.num_rows)
        ]

    def leave_out(self, error: DumpError) -> None:
        """Notes a dump that cannot be read, once."""
        if str(error) not in self.unreadable:
            self.unreadable.append(str(error))

    def records_path(self, file: DumpFile) -> Path:
        """Returns the path of the learner's record of a dump, which need not exist."""
        return self.folder.learner_records / file.path.relative_to(self.folder.trajectories)

    def _file_rows(self, file: DumpFile) -> list[Row]:
        if file.path not in self._rows_of:
            self._rows_of[file.path] = self._read_rows(file)
        return self._rows_of[file.path]


_COLUMNS = {
    "task": "task",
    "problem_uid": "problem_uid",
    "group_uid": "group_uid",
    "sample_index": "sample_index",
    "policy_version_min": "version",
    "reward": "reward",
    "grade_reason": "grade_reason",
    "finish_reason": "finish_reason",
    "gold_answer": "gold_answer",
    "parsed_answer": "parsed_answer",
    "num_latent_steps": "latent",
    "generation_seconds": "seconds",
}
"""Columns of the dump that a :class:`Row` holds, by the row's names."""
_LEARNER_COLUMNS = {"outcome": "outcome", "reason": "why", "advantage": "advantage"}


def _learner_columns(path: Path, keys: list[tuple[str, int]]) -> dict[str, list[Any]]:
    table = read_columns(path, ["group_uid", "sample_index", *_LEARNER_COLUMNS], LearnerStore)
    found = zip(table["group_uid"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
    place = {key: row for row, key in enumerate(found)}
    columns = {ours: table[theirs].to_pylist() for theirs, ours in _LEARNER_COLUMNS.items()}
    return {name: [values[place[key]] if key in place else None for key in keys] for name, values in columns.items()}


def open_run(path: str | Path, parts: Collection[str] = RECORDS) -> RunView:
    """Opens a run. Raises InspectionError for a folder that does not exist or is not a run's.

    `path` may be the URL of a run in an object store: of that its small files are copied, and `parts` of the others.
    """
    if is_url(url := str(path)):
        view = open_run(local_copy(url, parts))
        view.url = url
        return view
    path = Path(os.path.expanduser(path))  # in Python no shell has done it
    if not path.is_dir():
        around = path.parent if path.parent.is_dir() else Path()
        raise InspectionError(f"{path}: no such run folder{_runs_in(around)}")
    config = path / "config.json"
    try:
        is_run = config.exists()
    except OSError as error:
        raise InspectionError(f"{path} cannot be entered: {error.strerror}; ask its owner for the right to") from error
    if not is_run:
        raise InspectionError(f"{path} is not a run folder: it has no config.json{_runs_in(path)}")
    return RunView(RunFolder(path), _stored(config, RESTORE))


def _runs_in(folder: Path) -> str:
    found = sorted((p.parent for p in folder.glob("*/config.json")), key=lambda p: p.stat().st_mtime, reverse=True)
    return f"; runs in {folder.resolve()}: {', '.join(p.name for p in found[:5])}" if found else ""


def _optional(path: Path) -> dict[str, Any]:
    """Reads a file that a run writes late; empty if absent. Raises InspectionError if it is damaged."""
    return _stored(path, "delete it to continue without it") if path.exists() else {}


def _stored(path: Path, remedy: str) -> dict[str, Any]:
    try:
        return stored_object(path, remedy)
    except StoredError as error:
        raise InspectionError(str(error)) from error
