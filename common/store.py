"""The store of dumps: Parquet files that can be read while the run continues.

There are two stores of the same layout: the trajectories (`common.schema`), and their learner records
(`common.learner_record`). Below a store's folder there is one file per write::

    training/step=10/lineage-0000-part-0000.parquet

A file appears whole or not at all (temporary name, fsync, rename), so a reader never needs a lock. The lineage rises
by one with every restart from a checkpoint: steps that a restart repeats get files of their own, and a read without
a lineage follows the run's live history and leaves out abandoned steps.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from latent_grpo.common.errors import LatentGRPOError
from latent_grpo.common.files import check_is_file, write_atomically
from latent_grpo.common.learner_record import LearnerBatch, check_version
from latent_grpo.common.schema import SchemaError, TrajectoryBatch, current, schema_k

_STEP_FOLDER = re.compile(r"step=(\d+)")
_FILE = re.compile(r"lineage-(\d+)-part-(\d+)\.parquet")
_TEMPORARY = ".tmp-"


class DumpError(LatentGRPOError, OSError):
    """A dump that could not be written or read. The message names the file, the reason and what to do."""


@dataclass(frozen=True, slots=True, order=True)
class DumpFile:
    """One file of the store; files sort in the order of the run."""

    step: int
    lineage: int
    part: int
    purpose: str
    path: Path


class DumpStore:
    """Writes and reads one kind of a run's dumps. One process writes, and any number may read meanwhile.

    Example::

        store = TrajectoryStore(run_folder / "trajectories")
        store.write(10, batch, purpose="training", lineage=0)
        store.read(10)  # -> pa.RecordBatch
    """

    what: str
    """The name of the rows in messages."""
    check: Callable[[pa.RecordBatch], object]
    """Raises SchemaError for a batch that is not of the store's schema."""
    check_version: Callable[[pa.Schema], object]
    """Raises SchemaError for the schema of foreign data or of another version."""
    current: Callable[[pa.RecordBatch], pa.RecordBatch]
    """Returns a batch of an earlier version that is still read as one of today's. Raises SchemaError."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    # --- write -----------------------------------------------------------------------------------------------------

    def write(self, step: int, batch: pa.RecordBatch, purpose: str = "training", lineage: int = 0) -> Path:
        """Dumps one batch and returns its file. Raises :class:`DumpError` (disk full, ...) and leaves nothing.

        A second batch of the same step, purpose and lineage becomes the next part; it never overwrites the first.
        """
        if step < 0 or lineage < 0:
            raise ValueError(f"step and lineage must be >= 0, got step {step}, lineage {lineage}")
        self.check(batch)  # a malformed record must fail now, and not when the dump is read
        target = self.folder_of(step, purpose)
        try:
            target.mkdir(parents=True, exist_ok=True)
            path = target / f"lineage-{lineage:04d}-part-{self._next_part(target, lineage):04d}.parquet"
            unseen = f"{_TEMPORARY}{os.getpid()}-{path.stem}"  # no .parquet: `**/*.parquet` must not find it
            write_atomically(path, memoryview(_parquet_bytes(batch)), temporary=unseen)
        except OSError as error:
            raise _explained(error, target, self.what) from error
        return path

    def folder_of(self, step: int, purpose: str) -> Path:
        """Returns the folder of a step's files."""
        if not re.fullmatch(r"[\w-]+", purpose):
            raise ValueError(f"purpose must be one word (it names a folder), got {purpose!r}")
        return self.folder / purpose / f"step={step}"

    @staticmethod
    def _next_part(folder: Path, lineage: int) -> int:
        parts = [int(m[2]) for p in folder.iterdir() if (m := _FILE.fullmatch(p.name)) and int(m[1]) == lineage]
        return max(parts, default=-1) + 1

    # --- read ------------------------------------------------------------------------------------------------------

    def size(self, step: int, purpose: str = "training") -> int:
        """Returns the bytes of a step's files, those of abandoned lineages included."""
        return sum(path.stat().st_size for path in self.folder_of(step, purpose).glob("*.parquet"))

    def sizes(self, purpose: str = "training") -> dict[int, int]:
        """Returns the bytes of every step that has files."""
        return {
            step: self.size(step, purpose) for step in sorted({f.step for f in self._scan() if f.purpose == purpose})
        }

    def remove(self, step: int, purpose: str = "training") -> None:
        """Deletes a step's files, of every lineage. A reader that has one open can continue."""
        shutil.rmtree(self.folder_of(step, purpose), ignore_errors=True)

    def files(
        self, step: int | None = None, purpose: str | None = "training", lineage: int | None = None
    ) -> list[DumpFile]:
        """Returns the complete files, in the order of the run, without a `purpose` those of all purposes.

        Without a `lineage` it returns the live history. A step of a lineage is abandoned once a later lineage has
        written that step or an earlier one of the same purpose, because a restart had rewound the run to before it.
        """
        found = sorted(self._scan())
        if purpose is not None:
            found = [f for f in found if f.purpose == purpose]
        if lineage is not None:
            found = [f for f in found if f.lineage == lineage]
        else:
            first: dict[tuple[str, int], int] = {}  # (purpose, lineage) -> its first step
            for file in found:
                key = (file.purpose, file.lineage)
                first[key] = min(file.step, first.get(key, file.step))
            found = [
                file
                for file in found
                if not any(
                    p == file.purpose and a > file.lineage and start <= file.step for (p, a), start in first.items()
                )
            ]
        return [f for f in found if step is None or f.step == step]

    def steps(self, purpose: str = "training", lineage: int | None = None) -> list[int]:
        """Returns the steps that have a dump, ascending."""
        return sorted({f.step for f in self.files(purpose=purpose, lineage=lineage)})

    def batches(
        self, step: int | None = None, purpose: str | None = "training", lineage: int | None = None
    ) -> Iterator[tuple[DumpFile, pa.RecordBatch]]:
        """Yields the batches file by file, so that a long run need not fit into memory."""
        for file in self.files(step, purpose, lineage):
            yield file, read_dump(file.path, type(self))

    def read(
        self, step: int | None = None, purpose: str | None = "training", lineage: int | None = None
    ) -> pa.RecordBatch:
        """Reads all rows of a step (or of all steps) as one batch. Raises :class:`DumpError` if there are none."""
        batches = [batch for _, batch in self.batches(step, purpose, lineage)]
        if not batches:
            have = self.steps(purpose) if purpose else []
            known = f"steps with dumps: {step_ranges(have)}" if have else "it has no dumps"
            wanted = "any step" if step is None else f"step {step}"
            raise DumpError(
                f"{self.folder}: no {self.what} of {wanted}, purpose {purpose}, lineage "
                f"{'live' if lineage is None else lineage}; {known}. Which steps are dumped, and how "
                "long dumps are kept, is set by the section dump of the run's settings"
            )
        return pa.concat_batches(batches) if len(batches) > 1 else batches[0]

    def _scan(self) -> Iterator[DumpFile]:
        for purpose in (p for p in self.folder.glob("*") if p.is_dir()):
            for step in purpose.iterdir():
                number = _STEP_FOLDER.fullmatch(step.name)
                if number is None:
                    continue
                for path in step.glob("*.parquet"):  # nothing for a step that retention removes meanwhile
                    if name := _FILE.fullmatch(path.name):
                        yield DumpFile(
                            step=int(number[1]),
                            lineage=int(name[1]),
                            part=int(name[2]),
                            purpose=purpose.name,
                            path=path,
                        )


class TrajectoryStore(DumpStore):
    """The dumps of trajectories, in the schema of `common/schema.py`."""

    what = "trajectories"
    check = TrajectoryBatch
    check_version = staticmethod(schema_k)
    current = staticmethod(current)


class LearnerStore(DumpStore):
    """The learner records of the trajectories in the :class:`TrajectoryStore`'s file of the same relative path."""

    what = "learner records"
    check = LearnerBatch
    check_version = staticmethod(check_version)
    current = staticmethod(lambda batch: batch)


def read_dump(path: str | Path, kind: type[DumpStore] = TrajectoryStore) -> pa.RecordBatch:
    """Reads the batch of one dump file and checks its store's schema and the pages' checksums.

    Raises :class:`DumpError` for a file that is missing, truncated, damaged or of another program.
    """
    path = Path(path)
    table = _read_table(path, None, kind)
    try:
        batches = table.to_batches()
        batch = batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
        batch = kind.current(batch)
        kind.check(batch)
    except SchemaError as error:
        raise DumpError(f"{path}: a Parquet file, but no {kind.what} that can be read: {error}") from error
    return batch


def read_columns(path: str | Path, names: Sequence[str], kind: type[DumpStore] = TrajectoryStore) -> pa.Table:
    """Reads some columns of a dump, for a search over a long run. It checks the schema's version, but not the rows.

    Raises :class:`DumpError` as :func:`read_dump` does.
    """
    path = Path(path)
    try:
        return _read_table(path, names, kind)
    except SchemaError as error:
        raise DumpError(f"{path}: a Parquet file, but no {kind.what} that can be read: {error}") from error


def count_rows(path: str | Path, kind: type[DumpStore] = TrajectoryStore) -> int:
    """Returns the number of rows of a dump, from its footer. Raises :class:`DumpError` as :func:`read_columns` does."""
    return read_columns(path, [], kind).num_rows


def _read_table(path: Path, names: Sequence[str] | None, kind: type[DumpStore]) -> pa.Table:
    """Reads columns; without `names` every column, unchecked."""
    try:
        check_is_file(path)
        # ParquetFile, not read_table: the latter adds columns for the `purpose=` and `step=` folders
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if names is not None:
                kind.check_version(file.schema_arrow)
                if missing := [name for name in names if name not in file.schema_arrow.names]:
                    raise SchemaError(f"it has no column {', '.join(missing)}")
            return file.read(columns=names, use_threads=False).combine_chunks()
    except FileNotFoundError as error:
        raise DumpError(f"{path}: no such dump") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a column's name is damaged
        size = path.stat().st_size if path.exists() else 0
        said = next(iter(str(error).splitlines()), type(error).__name__)  # Arrow adds what it calls its context
        raise DumpError(
            f"{path}: not a readable Parquet file ({size} bytes): it is truncated, damaged or foreign; delete it, or "
            f"copy it again from the run's machine ({said})"
        ) from error


def _parquet_bytes(batch: pa.RecordBatch) -> pa.Buffer:
    # In memory first: the file system then sees plain writes, whose errors carry their errno.
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_batches([batch]), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _explained(error: OSError, folder: Path, what: str) -> DumpError:
    reason = {
        errno.ENOSPC: "the disk is full; free some space, keep fewer (dump.keep_bytes) or dump less often (dump.every)",
        errno.EDQUOT: "the disk quota is used up; free some space, or dump less often (dump.every)",
        errno.EACCES: "no permission to write there; choose another runs_folder",
        errno.EROFS: "the file system is read-only; choose another runs_folder",
    }.get(error.errno or 0, str(error))
    return DumpError(error.errno, f"{what} not dumped: {reason}", str(folder))


def step_ranges(steps: list[int]) -> str:
    """Formats `[1, 2, 3, 7]` as `1-3, 7`."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
