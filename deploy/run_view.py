"""A run's folder as its readers see it: settings, metrics, dumps; while it goes on, after it ended, or after it failed.

Nothing here writes, starts Ray or loads a model. `RunView.rows` reads only the small columns of the dumps, so that
filters are fast on long runs; :mod:`deploy.thoughts` then loads what is looked at.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from common.config import ConfigError
from common.metrics import FILE as METRICS_FILE
from common.metrics import read_metrics
from common.store import DumpError, DumpFile, LearnerStore, TrajectoryStore, count_rows, read_columns, step_ranges
from deploy.run_folder import RunFolder
from deploy.terminal_text import visible

SORTS = ("step", "length", "latent", "reward", "seconds", "advantage")


class InspectionError(ConfigError):
    """A run or a choice of trajectories that cannot be shown; the message says what is there instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One dumped trajectory without its steps. `outcome`, `why` and `advantage` are the learner's; None: no record."""

    file: DumpFile
    index: int  # row of the file
    task: str
    problem_uid: str
    group_uid: str
    sample_index: int
    version: int  # policy version at the rollout's start
    reward: float | None  # None: ungraded
    grade_reason: str
    finish_reason: str
    gold_answer: str
    parsed_answer: str | None
    response_text: str
    length: int  # T: response steps
    latent: int  # L: latent steps among them
    seconds: float  # of generation
    outcome: str | None = None
    why: str | None = None
    advantage: float | None = None

    @property
    def step(self) -> int:
        return self.file.step

    @property
    def purpose(self) -> str:
        return self.file.purpose

    @property
    def correct(self) -> bool:
        """A positive reward; everything else (wrong, no answer, timeout, ungraded, ...) is a failure."""
        return self.reward is not None and self.reward > 0

    @property
    def reasons(self) -> tuple[str, ...]:
        """Everything that `--reason` finds this row by."""
        return tuple(r for r in (self.grade_reason, self.finish_reason, self.outcome, self.why) if r)

    @property
    def name(self) -> str:
        return f"step {self.step}, {self.group_uid} #{self.sample_index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which trajectories. Empty: all. Numbers of steps are inclusive ranges; texts match a part of the name."""

    steps: tuple[tuple[int, int], ...] = ()
    purpose: str | None = None
    task: str | None = None
    failed: bool = False
    correct: bool = False
    reason: str | None = None
    group: str | None = None
    problem: str | None = None
    sample_index: int | None = None
    min_length: int | None = None
    max_length: int | None = None
    sort: str = "step"  # with a leading "-": descending
    lineage: int | None = None  # None: the live history

    def __post_init__(self) -> None:
        if self.failed and self.correct:
            raise InspectionError("--failed and --correct exclude each other: no trajectory is both")
        low, high = self.min_length, self.max_length
        if low is not None and high is not None and low > high:
            raise InspectionError(f"--min-length {low} is larger than --max-length {high}: nothing can match")
        if self.sort.removeprefix("-") not in SORTS:
            raise InspectionError(
                f"--sort {self.sort!r}: expected one of {', '.join(SORTS)}, with a leading - for descending"
            )

    @property
    def choosing(self) -> bool:
        """Whether anything was asked for (but an order)."""
        return any(value not in ((), None, False) for name, value in self._fields() if name != "sort")

    def _fields(self) -> Iterator[tuple[str, Any]]:
        return ((name, getattr(self, name)) for name in self.__dataclass_fields__)

    def __str__(self) -> str:
        """As the user would type them."""
        words = [f"--step {a}" if a == b else f"--step {a}-{b}" for a, b in self.steps]
        for name, value in self._fields():
            if name in ("steps", "sort") or value in (None, False):
                continue
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
        return " ".join(words) or "no filter"

    def has_step(self, step: int) -> bool:
        return not self.steps or any(a <= step <= b for a, b in self.steps)

    def accepts(self, row: Row) -> bool:
        return (
            (self.task is None or self.task in row.task)
            and not (self.failed and row.correct)
            and not (self.correct and not row.correct)
            and (self.reason is None or self.reason in row.reasons)
            and (self.group is None or self.group in row.group_uid)
            and (self.problem is None or self.problem in row.problem_uid)
            and (self.sample_index is None or self.sample_index == row.sample_index)
            and (self.min_length is None or row.length >= self.min_length)
            and (self.max_length is None or row.length <= self.max_length)
        )


def parse_steps(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """`["10", "20-40"]` -> ((10, 10), (20, 40)). Raises InspectionError."""
    spans = []
    for text in texts:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
        if found is None or (found[2] and int(found[2]) < int(found[1])):
            raise InspectionError(f"--step {text!r}: expected a step such as 10, or a range such as 10-40")
        spans.append((int(found[1]), int(found[2] or found[1])))
    return tuple(spans)


@dataclass
class RunView:
    """An open run. `unreadable` collects a sentence for each file that a reading had to leave out."""

    folder: RunFolder
    settings: dict[str, Any]  # config.json as it stands: readable whatever version wrote it
    unreadable: list[str] = field(default_factory=list)
    _rows_of: dict[Path, list[Row]] = field(default_factory=dict, init=False, repr=False)

    # --- the run ---------------------------------------------------------------------------------------------------

    @cached_property
    def summary(self) -> dict[str, Any]:
        return _optional_json(self.folder.path / "summary.json")

    @cached_property
    def identity(self) -> dict[str, Any]:
        return _optional_json(self.folder.path / "run.json")

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """All lines of the live history, of every kind; empty where the run has recorded nothing yet."""
        path = self.folder.path / METRICS_FILE
        return list(read_metrics(path, kind=None)) if path.is_file() else []

    def metric_rows(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.metrics if row["kind"] == kind]

    @property
    def wanted_steps(self) -> int:
        return int(self.settings.get("steps", 0))

    @property
    def done_steps(self) -> int:
        return max((row["step"] for row in self.metric_rows("train")), default=0)

    @property
    def finished(self) -> bool:
        return "minutes" in self.summary and self.done_steps >= self.wanted_steps

    @property
    def state(self) -> str:
        """One phrase."""
        if self.finished:
            return f"finished after {self.done_steps} steps"
        return f"unfinished: {self.done_steps} of {self.wanted_steps} steps recorded so far"

    def facts(self) -> list[tuple[str, str]]:
        """What the run is, in words, for people: (name, value)."""
        settings, identity = self.settings, self.identity
        noise = settings.get("noise", {})
        facts = [
            ("state", self.state + (f", {self.summary['minutes']:g} minutes" if "minutes" in self.summary else "")),
            ("algorithm", f"{settings.get('algorithm')}, {settings.get('component_weighting')} weighting"),
            ("tasks", ", ".join(task["name"] for task in settings.get("tasks", []))),
            ("batch", f"{settings.get('prompts_per_step')} prompts x {settings.get('group_size')} samples"),
            (
                "mixtures",
                f"K {settings.get('k')}, tau {settings.get('tau')}, noise {noise.get('mode')} x {noise.get('scale')}",
            ),
            ("model", str((settings.get("model") or {}).get("path") or "made by the run")),
            ("started", str(identity.get("started", "unknown"))),
            ("lineage", f"{identity.get('lineage', 0)} (resumed that many times)"),
            ("versions", ", ".join(f"{name} {version}" for name, version in identity.get("versions", {}).items())),
        ]
        for tag in ("before", "after"):
            scores = {
                k.removesuffix("/pass_at_1"): v
                for k, v in self.summary.get(tag, {}).items()
                if k.endswith("/pass_at_1")
            }
            if scores:
                facts.insert(
                    1 + (tag == "after"), (f"pass@1 {tag}", ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
                )
        return facts

    # --- dumps -----------------------------------------------------------------------------------------------------

    @property
    def store(self) -> TrajectoryStore:
        return TrajectoryStore(self.folder.trajectories)

    def files(self, filters: Filters) -> list[DumpFile]:
        """Dump files that can hold what is asked for. Raises InspectionError naming what is there instead."""
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
                "look again after that step"
            )
        return (
            f"{self.folder.path} has no trajectory dumps: none was written by step {self.done_steps} "
            f"(dump.every {every}), or they were deleted"
        )

    def rows(self, filters: Filters) -> list[Row]:
        """Matching trajectories in the asked order. Raises InspectionError if none match, DumpError if nothing is
        readable; a damaged file among good ones is left out and named in `unreadable`."""
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
        for error in failures:
            self._leave_out(error)
        chosen = [row for row in every if filters.accepts(row)]
        if not chosen:
            raise InspectionError(no_match(filters, every))
        return _ordered(chosen, filters.sort)

    def group(self, row: Row) -> list[Row]:
        """The dumped samples of a row's group, the row included, in sample order."""
        rows = [r for r in self._file_rows(row.file) if r.group_uid == row.group_uid]
        return sorted(rows, key=lambda r: r.sample_index)

    def count(self, file: DumpFile) -> int:
        """Its trajectories; 0 for a file that cannot be read, which is then named in `unreadable`."""
        try:
            return count_rows(file.path)
        except DumpError as error:
            self._leave_out(error)
            return 0

    def _leave_out(self, error: DumpError) -> None:
        if str(error) not in self.unreadable:
            self.unreadable.append(str(error))

    def records_path(self, file: DumpFile) -> Path:
        """Where the learner's record of a dump is, if there is one."""
        return self.folder.learner_records / file.path.relative_to(self.folder.trajectories)

    def _file_rows(self, file: DumpFile) -> list[Row]:
        if file.path not in self._rows_of:
            self._rows_of[file.path] = _read_rows(file, self.records_path(file))
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
    "response_text": "response_text",
    "num_latent_steps": "latent",
    "generation_seconds": "seconds",
}
"""Columns of the dump that a :class:`Row` holds, by the row's names."""


_LEARNER_COLUMNS = {"outcome": "outcome", "reason": "why", "advantage": "advantage"}


def _read_rows(file: DumpFile, records: Path) -> list[Row]:
    """The small columns of a dump, joined with those of the learner's file `records` if it exists. Raises DumpError."""
    table = read_columns(file.path, [*_COLUMNS, "hard_ids"])
    hard = pc.list_value_length(table["hard_ids"]).to_pylist()
    columns = {ours: table[theirs].to_pylist() for theirs, ours in _COLUMNS.items()}
    if records.is_file():
        columns |= _learner_columns(records, list(zip(columns["group_uid"], columns["sample_index"])))
    return [
        Row(file=file, index=i, length=columns["latent"][i] + hard[i], **{n: v[i] for n, v in columns.items()})
        for i in range(table.num_rows)
    ]


def _learner_columns(path: Path, keys: list[tuple[str, int]]) -> dict[str, list]:
    table = read_columns(path, ["group_uid", "sample_index", *_LEARNER_COLUMNS], LearnerStore)
    found = zip(table["group_uid"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
    place = {key: row for row, key in enumerate(found)}
    columns = {ours: table[theirs].to_pylist() for theirs, ours in _LEARNER_COLUMNS.items()}
    return {name: [values[place[key]] if key in place else None for key in keys] for name, values in columns.items()}


def _ordered(rows: list[Row], sort: str) -> list[Row]:
    name = sort.removeprefix("-")
    if name == "step":
        return rows[::-1] if sort.startswith("-") else rows
    values = {id(row): getattr(row, name) for row in rows}
    known = [row for row in rows if values[id(row)] is not None and not math.isnan(values[id(row)])]
    if not known:
        raise InspectionError(f"--sort {name}: none of the {len(rows)} trajectories has one; {WITHOUT_RECORDS}")
    held = set(map(id, known))
    ordered = sorted(known, key=lambda row: values[id(row)], reverse=sort.startswith("-"))
    return ordered + [row for row in rows if id(row) not in held]


WITHOUT_RECORDS = (
    "this run has no learner records for them (it was made before they existed, or the dump is not of training)"
)


def no_match(filters: Filters, every: Sequence[Row]) -> str:
    """Why nothing was found: what the dumps of the chosen steps hold."""
    parts = [f"no trajectory matches {filters}; {len(every)} were searched"]
    if filters.reason is not None:
        found = Counter(reason for row in every for reason in row.reasons)
        parts.append("reasons there: " + ", ".join(f"{name} ({n})" for name, n in found.most_common()))
    if filters.task is not None:
        parts.append("tasks: " + ", ".join(sorted({row.task for row in every})))
    if (filters.min_length, filters.max_length) != (None, None) and every:
        lengths = [row.length for row in every]
        parts.append(f"lengths: {min(lengths)} to {max(lengths)} response steps")
    if filters.group is not None or filters.problem is not None:
        parts.append(
            f"a group there is called {every[0].group_uid}, its problem {every[0].problem_uid}" if every else ""
        )
    return visible(". ".join(part for part in parts if part))


def open_run(path: str | Path) -> RunView:
    """Raises InspectionError for a folder that is not there or not a run's."""
    path = Path(path)
    if not path.is_dir():
        around = path.parent if path.parent.is_dir() else Path()
        raise InspectionError(f"{path}: no such run folder{_runs_in(around)}")
    config = path / "config.json"
    if not config.is_file():
        raise InspectionError(f"{path} is not a run folder: it has no config.json{_runs_in(path)}")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InspectionError(f"{config}: not readable JSON ({error}); the run cannot be shown without it") from error
    return RunView(RunFolder(path), settings)


def _runs_in(folder: Path) -> str:
    found = sorted((p.parent for p in folder.glob("*/config.json")), key=lambda p: p.stat().st_mtime, reverse=True)
    return f"; runs in {folder.resolve()}: {', '.join(p.name for p in found[:5])}" if found else ""


def _optional_json(path: Path) -> dict[str, Any]:
    """What a run writes later than its other files; absent: empty. Raises InspectionError if damaged."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InspectionError(f"{path}: not readable JSON ({error}); delete it to go on without") from error
