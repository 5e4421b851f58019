"""Tables of rows as people keep them, read by the columns that somebody needs.

    FILE      .parquet, .arrow, .jsonl, .json, .csv or .tsv; text files also compressed (.gz, .bz2, .zst, .lz4)
    FOLDER    the shards of one set, or what `save_to_disk` of the package datasets has written
    GLOB      files of one format, in the order of their names

Text is UTF-8, or what a byte order mark says. Opening a table reads the names of its columns; `rows` then reads only
the columns that it is asked for, and no more of the file than `limit` rows need.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from latent_grpo.common.config import ConfigError
from latent_grpo.common.tasks.cells import GivenTwice

Row = dict[str, Any]  # the cell of each column
Batches = Callable[[Path, list[str], int], Iterator[Any]]
"""Yields record batches of a file's columns, of at most so many rows."""
T = TypeVar("T")
FORMATS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
}
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
KNOWN = "a .parquet, .arrow, .jsonl, .json, .csv or .tsv file, a folder of one set's shards, or a glob"
FIRST_ROWS = 100  # in which all columns of a text file occur
BATCH_ROWS = 1024
READ_BYTES = 2**20
OF = re.compile(r"\d-of-(\d+)\.")  # in a shard's name
LONGEST_CELL = 2**27  # characters of a CSV file's cell; more are zeros of a damaged disk, or a quote without its end
DISK, DISKS = "state.json", "dataset_dict.json"  # files of `save_to_disk`: of a set, and of several splits
MARK = "\ufeff"  # byte order mark; files that were put together have it within


class TableError(ConfigError):
    """A table that cannot be read. The message says what was found and what to give instead."""


@dataclass(frozen=True, slots=True)
class Table:
    """An opened table."""

    path: str
    columns: tuple[str, ...]
    read: Callable[[list[str], int | None], Iterator[Row]]

    def rows(self, columns: Collection[str], limit: int | None = None) -> Iterator[Row]:
        """Yields the first `limit` rows with those of `columns` that are there; a dotted name is a part of a column.

        Raises :class:`TableError` where the file cannot be read on.
        """
        wanted = {part for name in columns for part in (name, name.partition(".")[0])}
        return self.read([name for name in self.columns if name in wanted], limit)


def source_files(path: str) -> list[Path]:
    """Returns the files of a table, in order. Raises :class:`TableError` where there are none, or of several sets."""
    given = Path(path)
    if given.is_file():
        return [given]
    if given.is_dir():
        return _files_of_folder(given)
    if glob.has_magic(path):
        once: dict[Path, Path] = {}  # a link may lead in a circle
        for name in sorted(glob.glob(path, recursive=True), key=len):
            if (file := Path(name)).is_file():
                once.setdefault(file.resolve(), file)
        found = sorted(once.values(), key=str)
        if not found:
            raise TableError(f"no file matches {path} (looked from {Path.cwd()})")
        return found
    if given.exists():
        raise TableError(f"{path} is a pipe or a device, and a table is read more than once; write it to a file first")
    raise TableError(f"no file {path} (looked in {Path.cwd()})")


def exists(path: str) -> bool:
    """Whether there is a file, a folder, or a file that a glob matches."""
    return Path(path).exists() or (glob.has_magic(path) and any(glob.iglob(path, recursive=True)))


def open_table(path: str) -> Table:
    """Opens a table. Raises :class:`TableError`."""
    if Path(path, DISK).is_file() or Path(path, DISKS).is_file():
        return _saved_to_disk(path)
    files = source_files(path)
    formats = {_format_of(file) for file in files}
    if len(formats) > 1:
        raise TableError(f"{path} has files of several formats ({', '.join(sorted(formats))}); give those of one")
    (name,) = formats
    if name == "parquet":
        return _columnar(path, files, _parquet_columns, _parquet_batches)
    if name == "arrow":
        return _columnar(path, files, _arrow_columns, _arrow_batches)
    reader = {"jsonl": _json_rows, "json": _json_rows, "csv": _csv_rows, "tsv": _tsv_rows}[name]
    return _text(path, files, reader)


# --- files and folders -------------------------------------------------------------------------------------------


def _format_of(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    packed = bool(suffixes) and suffixes[-1] in COMPRESSED
    last = (suffixes[-2:-1] if packed else suffixes[-1:]) or [""]
    name = FORMATS.get(last[0])
    if name is None:
        raise TableError(f"{file}: expected {KNOWN}")
    if packed and name in ("parquet", "arrow"):
        raise TableError(f"{file}: a {last[0]} file is compressed inside; unpack this one")
    return name


def _is_data(file: Path) -> bool:
    try:
        return file.is_file() and not file.name.startswith((".", "_")) and bool(_format_of(file))
    except TableError:
        return False


def _files_of_folder(folder: Path) -> list[Path]:
    """The shards of one set; files with other names, but for their numbers, are another set's."""
    if (folder / DISKS).is_file() or (folder / DISK).is_file():
        return sorted(file for file in folder.rglob("*.arrow"))
    files = sorted(file for file in folder.iterdir() if _is_data(file))
    files = [file for file in files if _format_of(file) != "json"] or files  # a .json beside shards describes them
    if not files:
        below = sorted(path.name for path in folder.iterdir() if path.is_dir())[:8]
        inside = f"; it has the folders {', '.join(below)}" if below else ""
        raise TableError(f"{folder} is a folder without a file of rows{inside}. Give {KNOWN}")
    sets: dict[str, list[Path]] = {}
    for file in files:
        sets.setdefault(re.sub(r"\d+", "*", file.name), []).append(file)
    if len(sets) > 1:
        named = ", ".join(f"{folder / name}" for name in list(sets)[:6])
        raise TableError(f"{folder} holds the files of several sets; give one of them: {named}")
    if (stated := OF.search(files[0].name)) is not None and int(stated[1]) != len(files):
        raise TableError(
            f"{folder} holds {len(files)} of {int(stated[1])} shards that {files[0].name} counts; fetch the others, "
            f"or give a glob of those that are there, {folder / '*'}{files[0].suffix}"
        )
    return files


def _failed(file: Path | str, what: str, error: Exception) -> TableError:
    return TableError(f"{file} cannot be read as {what}: {str(error).strip() or type(error).__name__}")


# --- columns ---------------------------------------------------------------------------------------------------------


def _columnar(path: str, files: list[Path], columns: Callable[[Path], list[str]], batches: Batches) -> Table:
    """A table of Parquet or Arrow files, by the functions that read the names of a file's columns, and its batches."""
    import pyarrow as pa

    def guarded(file: Path, act: Callable[[], T]) -> T:
        try:
            return act()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _failed(file, file.suffix[1:].lower(), error) from error

    def all_batches(wanted: list[str], rows: int) -> Iterator[Any]:
        for file in files:
            names = guarded(file, partial(columns, file))
            if lost := set(wanted).difference(names):
                raise TableError(f"{file} has no column {min(lost)!r}, which the first file has")
            if twice := [name for name in wanted if names.count(name) > 1]:  # the last one would be taken
                raise TableError(f"{file} has two columns of the name {twice[0]!r}; rename or remove one")
            found = batches(file, wanted, rows)
            while (batch := guarded(file, partial(next, found, None))) is not None:
                yield batch

    def read(wanted: list[str], limit: int | None) -> Iterator[Row]:
        # a batch is no larger than what is still wanted: of a column of images that somebody names, no more is read
        rows = BATCH_ROWS if limit is None else min(limit, BATCH_ROWS)
        return itertools.islice((row for batch in all_batches(wanted, rows) for row in batch.to_pylist()), limit)

    return Table(path, tuple(dict.fromkeys(guarded(files[0], partial(columns, files[0])))), read)


def _parquet_columns(file: Path) -> list[str]:
    import pyarrow.parquet as pq

    return list(pq.read_schema(file).names)


def _parquet_batches(file: Path, columns: list[str], rows: int) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, buffer_size=READ_BYTES) as opened:  # page by page, and not a whole column at once
        yield from opened.iter_batches(batch_size=rows, columns=columns, use_threads=False)


@contextlib.contextmanager
def _arrow_file(file: Path) -> Iterator[tuple[Any, Iterable[Any]]]:
    """Opens either of Arrow's formats, of a file or, as `datasets` writes it, of a stream: its schema and batches."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as mapped:
        try:
            reader = pa.ipc.open_file(mapped)
        except pa.ArrowInvalid:
            mapped.seek(0)
            stream = pa.ipc.open_stream(mapped)
            yield stream.schema, stream
        else:
            yield reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))


def _arrow_columns(file: Path) -> list[str]:
    with _arrow_file(file) as (schema, _):
        return list(schema.names)


def _arrow_batches(file: Path, columns: list[str], rows: int) -> Iterator[Any]:
    with _arrow_file(file) as (_, batches):
        for batch in batches:
            chosen = batch.select(columns)
            yield from (chosen.slice(start, rows) for start in range(0, chosen.num_rows, rows))


def _saved_to_disk(path: str) -> Table:
    """What `save_to_disk` has written: a set, or a folder of splits with one in it."""
    folder = Path(path)
    if (folder / DISKS).is_file():
        splits = json.loads((folder / DISKS).read_text(encoding="utf-8")).get("splits", [])
        if len(splits) != 1:
            raise TableError(f"{path} has the splits {', '.join(splits)}; give one of them, such as {folder / 'SPLIT'}")
        folder = folder / splits[0]
    import datasets

    try:
        return of_dataset(path, datasets.load_from_disk(str(folder)))
    except (OSError, ValueError) as error:
        raise _failed(path, "a dataset that was saved to disk", error) from error


def of_dataset(path: str, data: Any) -> Table:
    """The table of a `datasets.Dataset`, or of an `IterableDataset`, which is read no further than it is asked for."""
    import datasets

    def read(columns: list[str], limit: int | None) -> Iterator[Row]:
        try:
            yield from itertools.islice(data.select_columns(columns), limit)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # of shards that it reads now
            raise _failed(path, "a dataset", error) from error

    return Table(path, tuple(data.column_names or next(iter(data), ())), read)


# --- text ------------------------------------------------------------------------------------------------------------


def _text(path: str, files: list[Path], of_file: Callable[[Path], Iterator[Row]]) -> Table:
    def every() -> Iterator[Row]:
        for file in files:
            try:
                yield from of_file(file)
            except (OSError, EOFError, UnicodeError) as error:
                raise _failed(file, "text", error) from error

    def read(columns: list[str], limit: int | None) -> Iterator[Row]:
        for row in itertools.islice(every(), limit):
            yield {name: row[name] for name in columns if name in row}

    names = dict.fromkeys(name for row in itertools.islice(every(), FIRST_ROWS) for name in row)
    return Table(path, tuple(names), read)


def _opened(file: Path) -> BinaryIO:
    """Opens a file, through its decompression where its first bytes say that it is compressed."""
    with file.open("rb") as found:
        head = found.read(4)
    packed = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
    if packed is None:
        return file.open("rb")
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), packed))


def _encoding(file: Path) -> str:
    """The encoding that the first bytes show."""
    with _opened(file) as found:
        return json.detect_encoding(found.read(4))


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields each line that holds something, with its number from 1."""
    encoding = _encoding(file)
    with _opened(file) as found:
        if encoding.startswith("utf-8"):
            lines: Iterable[bytes | str] = found
        else:
            lines = io.TextIOWrapper(found, encoding=encoding, newline="\n")
        number = 0
        try:
            for number, raw in enumerate(lines, start=1):
                line = (raw if isinstance(raw, str) else raw.decode("utf-8")).lstrip(MARK)
                if line.strip():
                    yield number, line
        except UnicodeDecodeError as error:
            place = number if encoding.startswith("utf-8") else number + 1
            raise TableError(f"{file}, line {place} is not {encoding.removesuffix('-sig').upper()}: {error}") from error


def _json_rows(file: Path) -> Iterator[Row]:
    """The objects of a file with one a line, or with one list of all."""
    lines = _lines(file)
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        yield from _json_list(file, "".join([first[1], *(line for _, line in lines)]))
        return
    for number, line in itertools.chain([first], lines):
        row = _json(line, f"{file}, line {number}")
        if not isinstance(row, dict):
            raise TableError(f"{file}, line {number}: expected an object, got {line.strip()[:40]!r}")
        yield row


def _json_list(file: Path, text: str) -> Iterator[Row]:
    rows = _json(text, str(file))
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise TableError(f"{file}, element {number} of its list: expected an object, got {row!r:.40}")
        yield row


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, or lists in lists without end
        hint = "is the file complete?"
        if text.strip() == "{":
            hint = "objects over several lines are read where they are in one list, [{...}, {...}]"
        raise TableError(f"{where} is not valid JSON ({error}); {hint}") from error


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of names and values; a name that is given twice holds neither value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        count = Counter(name for name, _ in pairs)
        found.update((name, GivenTwice()) for name in found if count[name] > 1)
    return found


def _csv_rows(file: Path, separator: str = ",") -> Iterator[Row]:
    csv.field_size_limit(LONGEST_CELL)  # a chain of thought may be longer than the default
    encoding = _encoding(file)
    with _opened(file) as found, io.TextIOWrapper(found, encoding=encoding, newline="") as text:
        try:
            rows = csv.reader(_without_mark(text), delimiter=separator)
            header = next(rows, [])
            for number, cells in enumerate(filter(None, rows)):
                if len(cells) != len(header):
                    raise TableError(
                        f"{file}, row {number} has more or fewer cells than the header; is it a CSV file with a comma "
                        "between cells and quotes around texts with commas, and is it complete?"
                    )
                yield _object(list(zip(header, cells, strict=True)))
        except (csv.Error, UnicodeDecodeError) as error:
            raise _failed(file, "CSV", error) from error


def _tsv_rows(file: Path) -> Iterator[Row]:
    return _csv_rows(file, "\t")


def _without_mark(lines: Iterable[str]) -> Iterator[str]:
    return (line.lstrip(MARK) for line in lines)
