"""The Arrow schema of a trajectory, which is the wire format, the dump format and the replay format.

One row is one trajectory. Ragged steps are lists: a latent step holds K ids, K scores and K behaviour log-probs
(fixed-size lists of K), a hard step one id and one log-prob; nothing is padded with sentinels. The schema's metadata
hold the version and K (0 for `grpo`, whose rows have no latent steps).

`encode` builds one self-contained record batch, `TrajectoryBatch` is the column view for the learner and the metrics,
and `decode` returns rows for people. All three refuse a batch that is not exactly of the schema: its reader drops and
counts a malformed record, and never repairs it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from latent_grpo.common.errors import LatentGRPOError
from latent_grpo.common.types import SamplingSettings, Trajectory

SCHEMA_VERSION = 2
READABLE = (1, 2)  # version 1 lacks sampling_latent_exit, and its runs left latent mode by `argmax_or_first`
CORRECT = "correct"  # grade_reason of a response that its verifier accepts, whatever reward it gives

_PLAIN_COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
    ("run_id", pa.string()),
    ("purpose", pa.string()),
    ("task", pa.string()),
    ("problem_uid", pa.string()),
    ("group_uid", pa.string()),
    ("sample_index", pa.int32()),
    ("epoch", pa.int32()),
    ("run_seed", pa.int64()),
    ("policy_version_min", pa.int32()),
    ("policy_version_max", pa.int32()),
    ("worker", pa.string()),
    ("engine", pa.string()),
)
_SAMPLING_COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
    ("mode", pa.string()),
    ("max_tokens", pa.int32()),
    ("temperature", pa.float64()),
    ("top_p", pa.float64()),
    ("top_k", pa.int32()),
    ("k", pa.int32()),
    ("tau", pa.float64()),
    ("noise_mode", pa.string()),
    ("noise_scale", pa.float64()),
    ("latent_exit", pa.string()),
)
_GRADE_COLUMNS: tuple[tuple[str, pa.DataType, bool], ...] = (
    ("finish_reason", pa.string(), False),
    ("response_text", pa.string(), False),
    ("gold_answer", pa.string(), False),
    ("parsed_answer", pa.string(), True),
    ("reward", pa.float32(), True),  # null: ungraded
    ("grade_reason", pa.string(), False),
    ("generation_seconds", pa.float32(), False),
    ("grading_seconds", pa.float32(), False),
)
_STEP_COLUMNS = ("latent_ids", "latent_scores", "latent_log_probs")


class SchemaError(LatentGRPOError, ValueError):
    """A batch that does not have the trajectory schema; the message names the column and what was found."""


@cache
def trajectory_schema(k: int) -> pa.Schema:
    """Returns the schema for mixtures of width `k` (0: no latent steps)."""

    def items(kind: pa.DataType) -> pa.Field:
        return pa.field("item", kind, nullable=False)

    def steps(kind: pa.DataType) -> pa.DataType:
        return pa.list_(items(pa.list_(items(kind), max(k, 1))))  # a fixed size of 0 does not survive Parquet

    fields = [pa.field(name, kind, nullable=False) for name, kind in _PLAIN_COLUMNS]
    fields += [pa.field(f"sampling_{name}", kind, nullable=False) for name, kind in _SAMPLING_COLUMNS]
    fields += [
        pa.field("prompt_ids", pa.list_(items(pa.int32())), nullable=False),
        pa.field("num_latent_steps", pa.int32(), nullable=False),
        pa.field("latent_ids", steps(pa.int32()), nullable=False),
        pa.field("latent_scores", steps(pa.float32()), nullable=False),
        pa.field("latent_log_probs", steps(pa.float32()), nullable=False),
        pa.field("hard_ids", pa.list_(items(pa.int32())), nullable=False),
        pa.field("hard_log_probs", pa.list_(items(pa.float32())), nullable=False),
    ]
    fields += [pa.field(name, kind, nullable=nullable) for name, kind, nullable in _GRADE_COLUMNS]
    return pa.schema(fields, metadata={"latent_grpo.schema_version": str(SCHEMA_VERSION), "latent_grpo.k": str(k)})


def schema_k(schema: pa.Schema) -> int:
    """Returns K of a batch's schema. Raises :class:`SchemaError` for foreign data or another version."""
    metadata = schema.metadata or {}
    version = metadata.get(b"latent_grpo.schema_version")
    if version is None:
        raise SchemaError(
            "not a trajectory batch: its schema has no latent_grpo.schema_version, so another program wrote it"
        )
    k = metadata.get(b"latent_grpo.k", b"")
    if version not in [str(known).encode() for known in READABLE]:
        raise SchemaError(
            f"it has trajectory schema version {version.decode(errors='replace')}, this program reads versions "
            f"{' and '.join(map(str, READABLE))}; read it with the program that wrote it (the run's manifest.json "
            "names it)"
        )
    if not k.isdigit():
        raise SchemaError(f"damaged trajectory schema: latent_grpo.k is {k.decode(errors='replace')!r}, not a number")
    return int(k)


def current(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Returns a batch of an earlier schema version as one of today's; today's are returned unchanged.

    Raises :class:`SchemaError` for foreign data or an unknown version.
    """
    k = schema_k(batch.schema)
    if batch.schema.metadata[b"latent_grpo.schema_version"] != b"1" or "sampling_latent_exit" in batch.schema.names:
        return batch
    schema = trajectory_schema(k)
    place = schema.get_field_index("sampling_latent_exit")
    rule = pa.array(["argmax_or_first"] * batch.num_rows, pa.string())
    columns = [*batch.columns[:place], rule, *batch.columns[place:]]
    names = [*batch.schema.names[:place], "sampling_latent_exit", *batch.schema.names[place:]]
    if names != schema.names:
        return batch  # its columns are named by the check that follows
    return pa.RecordBatch.from_arrays(columns, schema=schema)


# --- encode ------------------------------------------------------------------------------------------------------


def encode(trajectories: Sequence[Trajectory], k: int) -> pa.RecordBatch:
    """Encodes the given rows as one record batch. Raises :class:`SchemaError` if a mixture is not [L, k]."""
    schema = trajectory_schema(k)
    columns: dict[str, pa.Array] = {}
    for name, kind in _PLAIN_COLUMNS:
        columns[name] = pa.array([getattr(t, name) for t in trajectories], kind)
    for name, kind in _SAMPLING_COLUMNS:
        columns[f"sampling_{name}"] = pa.array([getattr(t.sampling, name) for t in trajectories], kind)
    for name, kind, _ in _GRADE_COLUMNS:
        columns[name] = pa.array([getattr(t, name) for t in trajectories], kind)
    columns["num_latent_steps"] = pa.array([len(t.latent_ids) for t in trajectories], pa.int32())
    for name in ("prompt_ids", "hard_ids", "hard_log_probs"):
        columns[name] = _lists([getattr(t, name) for t in trajectories], schema.field(name).type)
    for name in _STEP_COLUMNS:
        columns[name] = _mixtures(name, [getattr(t, name) for t in trajectories], schema.field(name).type, k)
    return pa.RecordBatch.from_arrays([columns[field.name] for field in schema], schema=schema)


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32))


def _lists(rows: list[np.ndarray], kind: pa.ListType) -> pa.Array:
    dtype = kind.value_type.to_pandas_dtype()
    flat = np.concatenate(rows).astype(dtype, copy=False) if rows else np.empty(0, dtype)
    return pa.ListArray.from_arrays(_offsets([len(r) for r in rows]), pa.array(flat), type=kind)


def _mixtures(name: str, rows: list[np.ndarray], kind: pa.ListType, k: int) -> pa.Array:
    for index, row in enumerate(rows):
        if row.ndim != 2 or (len(row) and row.shape[1] != k):
            raise SchemaError(f"{name} of row {index}: expected shape [L, {k}], got {list(row.shape)}")
    step = kind.value_type
    dtype = step.value_type.to_pandas_dtype()
    filled = [row for row in rows if len(row)]
    flat = np.concatenate(filled).astype(dtype, copy=False).reshape(-1) if filled else np.empty(0, dtype)
    steps = pa.FixedSizeListArray.from_arrays(pa.array(flat), type=step)
    return pa.ListArray.from_arrays(_offsets([len(r) for r in rows]), steps, type=kind)


# --- read --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of different length in one flat array: row i is `values[offsets[i] : offsets[i + 1]]`. Read-only."""

    values: np.ndarray  # [sum(lengths), ...]
    offsets: np.ndarray  # [rows + 1] int32

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """The number of values of each row, [rows] int32."""
        return np.diff(self.offsets)


class TrajectoryBatch:
    """A column view of a record batch as NumPy arrays, zero-copy where Arrow allows it.

    Raises :class:`SchemaError` at once if the batch is foreign, of another version, or its step columns disagree.
    """

    def __init__(self, batch: pa.RecordBatch):
        batch = current(batch)
        self.k = schema_k(batch.schema)
        if not batch.schema.equals(trajectory_schema(self.k)):
            expected, got = set(trajectory_schema(self.k).names), set(batch.schema.names)
            raise SchemaError(
                f"columns or types differ from schema version {SCHEMA_VERSION}: "
                f"missing {sorted(expected - got)}, unknown {sorted(got - expected)}"
            )
        self.batch = batch
        self._validate()

    def __len__(self) -> int:
        return self.batch.num_rows

    def strings(self, name: str) -> list[str]:
        """Returns a column of texts, which has no nulls."""
        return self.batch.column(name).to_pylist()

    def values(self, name: str) -> list[Any]:
        """Returns any plain column as Python values; null is None."""
        return self.batch.column(name).to_pylist()

    def numbers(self, name: str) -> np.ndarray:
        """Returns a column of numbers, [rows]; a null reward reads as NaN."""
        return self.batch.column(name).to_numpy(zero_copy_only=False)

    @cached_property
    def prompt_ids(self) -> Ragged:
        """The prompt's token ids of each row, [P] int32."""
        return self._ragged("prompt_ids")

    @cached_property
    def hard_ids(self) -> Ragged:
        """The hard token ids of each row, [H] int32: from the latent-end token on."""
        return self._ragged("hard_ids")

    @cached_property
    def hard_log_probs(self) -> Ragged:
        """The behaviour log-probs of the hard steps of each row, [H] float32 (METHOD §2.4)."""
        return self._ragged("hard_log_probs")

    @cached_property
    def latent_ids(self) -> Ragged:
        """Ids of latent steps; a row is [L, K] int32."""
        return self._ragged("latent_ids")

    @cached_property
    def latent_scores(self) -> Ragged:
        """The scores of the latent steps of each row, [L, K] float32, descending (METHOD §2.1)."""
        return self._ragged("latent_scores")

    @cached_property
    def latent_log_probs(self) -> Ragged:
        """The behaviour log-probs of the components of each row, [L, K] float32."""
        return self._ragged("latent_log_probs")

    @cached_property
    def num_latent_steps(self) -> np.ndarray:
        """The number of latent steps of each row, [rows]."""
        return self.numbers("num_latent_steps")

    @cached_property
    def num_steps(self) -> np.ndarray:
        """T, the number of response steps, latent and hard: [rows]."""
        return self.num_latent_steps + self.hard_ids.lengths

    @cached_property
    def rewards(self) -> np.ndarray:
        """Rewards, [rows] float32; NaN where ungraded."""
        return self.numbers("reward").astype(np.float32)

    @cached_property
    def valid(self) -> np.ndarray:
        """Whether the finish reason is `stop` (METHOD §4.1), [rows] bool."""
        return np.array([reason == "stop" for reason in self.strings("finish_reason")], dtype=bool)

    def sampling(self, row: int) -> SamplingSettings:
        """Returns the sampling settings of a row."""
        values = {name: self.batch.column(f"sampling_{name}")[row].as_py() for name, _ in _SAMPLING_COLUMNS}
        return SamplingSettings(**values)

    def _ragged(self, name: str) -> Ragged:
        column = self.batch.column(name)
        values = column.flatten()  # `.flatten()` respects a slice, `.values` does not
        offsets = column.offsets.to_numpy()
        if pa.types.is_fixed_size_list(values.type):
            width = values.type.list_size
            values = values.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
            values = values[:, : self.k] if self.k else values.reshape(0, 0)
        else:
            values = values.to_numpy(zero_copy_only=False)
        return Ragged(values, offsets - offsets[0])

    def _lengths(self, name: str) -> np.ndarray:
        """The lengths of a list column, [rows], without its values: every group of a run is checked as it arrives."""
        return np.diff(self.batch.column(name).offsets.to_numpy())

    def _validate(self) -> None:
        try:
            self.batch.validate(full=True)
        except pa.ArrowInvalid as error:
            raise SchemaError(f"corrupt Arrow data: {error}") from error
        for field in self.batch.schema:
            column = self.batch.column(field.name)
            if not field.nullable and column.null_count:
                raise SchemaError(f"{field.name}: {column.null_count} null(s) in a column that has none")
            if pa.types.is_list(column.type):
                values = column.flatten()
                inner = values.flatten() if pa.types.is_fixed_size_list(values.type) else values
                if values.null_count or inner.null_count:
                    raise SchemaError(f"{field.name}: nulls inside a list of steps")
                if pa.types.is_floating(inner.type) and not np.isfinite(inner.to_numpy()).all():
                    raise SchemaError(f"{field.name}: non-finite values")
        for name in _STEP_COLUMNS:
            if not np.array_equal(self._lengths(name), self.num_latent_steps):
                raise SchemaError(f"{name}: number of latent steps differs from num_latent_steps")
        if not np.array_equal(self._lengths("hard_ids"), self._lengths("hard_log_probs")):
            raise SchemaError("hard_ids and hard_log_probs differ in length")


def decode(batch: pa.RecordBatch) -> list[Trajectory]:
    """Decodes rows for people and for tests; the hot path reads a :class:`TrajectoryBatch` instead."""
    view = TrajectoryBatch(batch)
    names = [name for name, _ in _PLAIN_COLUMNS] + [name for name, _, _ in _GRADE_COLUMNS]
    columns: dict[str, Any] = {name: view.values(name) for name in names}
    for name in ("prompt_ids", "hard_ids", "hard_log_probs", *_STEP_COLUMNS):
        columns[name] = getattr(view, name)
    return [
        Trajectory(**{name: column[row] for name, column in columns.items()}, sampling=view.sampling(row))
        for row in range(len(view))
    ]


def take_rows(batch: pa.RecordBatch, rows: Sequence[int] | np.ndarray) -> pa.RecordBatch:
    """Copies some rows into a self-contained batch; a slice would ship its whole parent through the object store."""
    return batch.take(pa.array(np.asarray(rows, dtype=np.int64)))


def groups_of(batch: pa.RecordBatch) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Yields (group's uid, its rows) of a batch of whole groups, which share the batch's memory."""
    start = 0
    for uid, rows in itertools.groupby(batch.column("group_uid").to_pylist()):
        count = sum(1 for _ in rows)
        yield uid, batch.slice(start, count)
        start += count


def concat(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Joins all rows, in order, into one self-contained record batch."""
    return pa.concat_batches(list(batches)) if len(batches) > 1 else take_rows(batches[0], range(len(batches[0])))
