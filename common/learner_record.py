"""The learner record of a trajectory, with an Arrow schema of its own and one row per trajectory.

A row is joined to its trajectory by (`group_uid`, `sample_index`) within a step; the store keeps the two in files of
the same relative path (`common.store`). Step columns are lists over the T response steps, latent and hard, in the
order of the response. Rows of groups that were not trained on have their reason, and null in every learner column.

`encode_records` builds one self-contained record batch, `LearnerBatch` is the column view, `decode_records` returns
rows for people, and `join` finds the rows of trajectories. Unlike a trajectory's, a log-prob here may be NaN or
infinite, since the record shows the cause of an update that was not applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from latent_grpo.common.schema import Ragged, SchemaError

RECORD_VERSION = 1
_VERSION_KEY = b"latent_grpo.learner_record_version"

CLIPS = ("", "low", "high", "dual")
"""The meaning of a code of `clipped` (METHOD §5): the bound that stopped the step's gradient."""

OUTCOMES = {
    "trained": "entered the update with its own advantage at every step",
    "masked": "was in the update with its advantage set to 0 at some steps or at all",
    "skipped": "was in an update that was not applied",
    "filtered": "its group was not trained on",
}
REASONS = {
    "": "",
    "aborted": "it was interrupted; such samples enter neither statistics nor loss",
    "ungraded": "the verifier failed; such samples enter neither statistics nor loss",
    "invalid": "it did not end by itself (finish reason length): advantage 0 at every step",
    "first_step": "advantage 0 at the first step: the group's most likely sample with an advantage above 0 is another",
    "non_finite": "a loss or gradient of its update was not a number; no parameter was changed",
    "all_equal": "all rewards of its group are equal: nothing to compare",
    "too_few_valid": "fewer than two samples of its group enter the statistics",
    "no_advantage": "rewards of its group differ only among samples whose advantage is masked",
}
"""The reasons in words. The last four and `ungraded` are also reasons of whole groups (METHOD §4.3)."""

_ROW_COLUMNS: tuple[tuple[str, pa.DataType, bool], ...] = (
    ("group_uid", pa.string(), False),
    ("sample_index", pa.int32(), False),
    ("outcome", pa.string(), False),
    ("reason", pa.string(), False),
    ("advantage", pa.float32(), True),  # METHOD §4.1, before first-token selection
    ("winner", pa.bool_(), True),  # METHOD §4.2; false everywhere with first_token: false
    ("mean_old_log_prob", pa.float64(), True),
    ("update_index", pa.int32(), True),  # which update of the step, from 0
    ("update_applied", pa.bool_(), True),
    ("update_loss", pa.float64(), True),  # of all ranks
    ("update_grad_norm", pa.float64(), True),  # of all ranks, before clipping; NaN if not applied
)
STEP_COLUMNS: dict[str, pa.DataType] = {
    "behaviour_log_probs": pa.float32(),  # the recorded log-probs as the learner scores them (METHOD §6)
    "old_log_probs": pa.float32(),  # before the step's first update (METHOD §5)
    "new_log_probs": pa.float32(),  # when the row's update was computed
    "step_advantages": pa.float32(),  # after first-token selection
    "ratios": pa.float32(),  # exp(new - old), of centered log-probs with `centering_draws`
    "clipped": pa.int8(),  # index into CLIPS
    "flip_shares": pa.float32(),  # share of the K components whose gradient was turned (METHOD §3.2); 0 for hard steps
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerRecord:
    """One row for people; the learner's fields are None (arrays empty) if the group was not trained on."""

    group_uid: str
    sample_index: int
    outcome: str
    reason: str
    advantage: float | None
    winner: bool | None
    mean_old_log_prob: float | None
    update_index: int | None
    update_applied: bool | None
    update_loss: float | None
    update_grad_norm: float | None
    behaviour_log_probs: np.ndarray  # [T] float32
    old_log_probs: np.ndarray  # [T] float32
    new_log_probs: np.ndarray  # [T] float32
    step_advantages: np.ndarray  # [T] float32
    ratios: np.ndarray  # [T] float32
    clipped: np.ndarray  # [T] int8
    flip_shares: np.ndarray  # [T] float32


def record_schema() -> pa.Schema:
    """Returns the Arrow schema of a learner record: a row per trajectory, a list per response step."""
    fields = [pa.field(name, kind, nullable=nullable) for name, kind, nullable in _ROW_COLUMNS]
    fields += [
        pa.field(name, pa.list_(pa.field("item", kind, nullable=False)), nullable=True)
        for name, kind in STEP_COLUMNS.items()
    ]
    return pa.schema(fields, metadata={_VERSION_KEY: str(RECORD_VERSION)})


def encode_records(rows: Mapping[str, Sequence[object] | np.ndarray], steps: Mapping[str, Ragged]) -> pa.RecordBatch:
    """Encodes one record batch. `rows` are the row columns, [B] each; `steps` are the step columns, B rows each.

    Raises :class:`SchemaError` where columns are missing, unknown or of different length.
    """
    schema = record_schema()
    given = {*rows, *steps}
    if given != set(schema.names):
        raise SchemaError(
            f"learner record: missing {sorted(set(schema.names) - given)}, unknown {sorted(given - set(schema.names))}"
        )
    columns: dict[str, pa.Array] = {name: pa.array(rows[name], kind) for name, kind, _ in _ROW_COLUMNS}
    for name, kind in STEP_COLUMNS.items():
        values = pa.array(np.asarray(steps[name].values).astype(kind.to_pandas_dtype(), copy=False))
        offsets = pa.array(np.asarray(steps[name].offsets, dtype=np.int32))
        columns[name] = pa.ListArray.from_arrays(offsets, values, type=schema.field(name).type)
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise SchemaError(f"learner record: columns of different length: {lengths}")
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def filtered_records(group: pa.RecordBatch, reason: str) -> pa.RecordBatch:
    """Makes the records of a group that was not trained on, with null learner columns."""
    count, schema = group.num_rows, record_schema()
    known = {
        "group_uid": group.column("group_uid"),
        "sample_index": group.column("sample_index"),
        "outcome": pa.array(["filtered"] * count, pa.string()),
        "reason": pa.array([reason] * count, pa.string()),
    }
    columns = [known[f.name] if f.name in known else pa.nulls(count, f.type) for f in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


# --- read --------------------------------------------------------------------------------------------------------


class LearnerBatch:
    """A column view of a batch of learner records.

    Raises :class:`SchemaError` at once if the batch is foreign, of another version, or its step columns disagree.
    """

    def __init__(self, batch: pa.RecordBatch):
        check_version(batch.schema)
        if not batch.schema.equals(record_schema()):
            expected, got = set(record_schema().names), set(batch.schema.names)
            raise SchemaError(
                f"columns or types differ from learner-record version {RECORD_VERSION}: "
                f"missing {sorted(expected - got)}, unknown {sorted(got - expected)}"
            )
        self.batch = batch
        self._validate()

    def __len__(self) -> int:
        return self.batch.num_rows

    def strings(self, name: str) -> list[str]:
        """Returns a column of texts, one per row."""
        return self.batch.column(name).to_pylist()

    def numbers(self, name: str) -> np.ndarray:
        """Returns a column, [rows]; null reads as NaN (None in a column of booleans)."""
        return self.batch.column(name).to_numpy(zero_copy_only=False)

    def steps(self, name: str) -> Ragged:
        """Returns a step column; a row that was not trained on is empty."""
        column = self.batch.column(name)
        filled = column.fill_null([]) if column.null_count else column
        offsets = filled.offsets.to_numpy()
        return Ragged(filled.flatten().to_numpy(zero_copy_only=False), offsets - offsets[0])

    @cached_property
    def taught(self) -> np.ndarray:
        """Whether a row was in an update and has learner columns, [rows] bool."""
        return self.batch.column("old_log_probs").is_valid().to_numpy(zero_copy_only=False)

    def _validate(self) -> None:
        try:
            self.batch.validate(full=True)
        except pa.ArrowInvalid as error:
            raise SchemaError(f"corrupt Arrow data: {error}") from error
        for field in self.batch.schema:
            column = self.batch.column(field.name)
            if not field.nullable and column.null_count:
                raise SchemaError(f"{field.name}: {column.null_count} null(s) in a column that has none")
            if pa.types.is_list(column.type) and column.flatten().null_count:
                raise SchemaError(f"{field.name}: nulls inside a list of steps")
        lengths = self.batch.column("old_log_probs").value_lengths()
        for name in STEP_COLUMNS:
            if not self.batch.column(name).value_lengths().equals(lengths):
                raise SchemaError(f"{name}: number of steps differs from old_log_probs")
        unknown = sorted({*self.strings("outcome")} - OUTCOMES.keys())
        if unknown:
            raise SchemaError(f"outcome: unknown {unknown}; known: {', '.join(OUTCOMES)}")


def check_version(schema: pa.Schema) -> None:
    """Raises :class:`SchemaError` for foreign data or another version."""
    version = (schema.metadata or {}).get(_VERSION_KEY)
    if version is None:
        raise SchemaError("not a batch of learner records: its schema has no latent_grpo.learner_record_version")
    if version != str(RECORD_VERSION).encode():
        raise SchemaError(
            f"learner-record version {version.decode(errors='replace')}, this program reads version {RECORD_VERSION}; "
            "read it with the program that wrote it (the run's manifest.json names it)"
        )


def decode_records(batch: pa.RecordBatch) -> list[LearnerRecord]:
    """Returns the rows of a batch as records, whose arrays are [T], one value per response step."""
    view = LearnerBatch(batch)
    rows: list[dict[str, Any]] = batch.select([name for name, *_ in _ROW_COLUMNS]).to_pylist()
    for name in STEP_COLUMNS:
        steps = view.steps(name)
        for index, row in enumerate(rows):
            row[name] = steps[index]
    return [LearnerRecord(**row) for row in rows]


def join(trajectories: pa.RecordBatch, records: pa.RecordBatch) -> np.ndarray:
    """Returns each trajectory's row of `records`, [rows of `trajectories`] int64, or -1. Both are of one step."""
    place = {key: row for row, key in enumerate(_keys(records))}
    return np.array([place.get(key, -1) for key in _keys(trajectories)], dtype=np.int64)


def _keys(batch: pa.RecordBatch) -> list[tuple[str, int]]:
    return list(zip(batch.column("group_uid").to_pylist(), batch.column("sample_index").to_pylist(), strict=True))
