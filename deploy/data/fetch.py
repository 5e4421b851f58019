"""`latent-grpo data fetch`: a data set from the hub, or from the authors' own files, becomes a file of the data folder.

Every set that is fetched is written with the product's columns and an entry in the folder's `manifest.json`: where it
came from, the revision and the hashes. They are recorded at the first fetch and compared at every later one, so that a
set that its publisher has changed does not pass for the same.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from latent_grpo.common.config import ConfigError
from latent_grpo.common.files import FULL, file_hash, unwritable, write_atomically
from latent_grpo.common.tasks.gpqa import COLUMNS as GPQA_COLUMNS
from latent_grpo.common.tasks.tables import TableError, open_table
from latent_grpo.deploy.data.layouts import COLUMNS, READ, IncompleteRow, UnknownLayout, is_known, product_row
from latent_grpo.deploy.data.sets import DataSet
from latent_grpo.deploy.run.progress import Reporter

MANIFEST = "manifest.json"
Rows = Iterable[dict[str, Any]]


class FetchError(ConfigError):
    """A data set that cannot be fetched as requested; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a set's rows come from."""

    repository: str  # of the hub, or the folder of local files
    revision: str | None  # the commit; None for local files
    files: tuple[str, ...]
    xxh3_128: str | None  # of a local file


@dataclass(frozen=True, slots=True)
class Fetched:
    """An entry of the manifest."""

    file: str
    rows: int
    xxh3_128: str  # of the written file, which shows whether it is still that one
    content: str  # hash of the rows, whatever file format and version they are written with
    dropped: int  # rows without a problem or an answer
    licence: str
    source: dict[str, Any]
    at: str


def fetch(
    sets: Iterable[DataSet],
    folder: Path,
    reporter: Reporter,
    *,
    local: Path | None = None,
    hub: Callable[[DataSet, str | None], tuple[Source, int | None, Rows]] | None = None,
) -> None:
    """Fetches sets into `folder`; of `local`, a folder of the authors' files, where that is given, else from the hub.

    A file that is there and unchanged is left alone. `hub(set, revision)` opens a set of the hub (:func:`open_hub`) at
    the revision that the manifest has, None where it has none. Raises :class:`FetchError`; files that were complete
    before stay.
    """
    sets = list(sets)
    if local is not None:
        _check_complete(sets, local)
    _make_target(folder)
    known = read_manifest(folder)
    for data in sets:
        target = folder / data.file
        entry = known.get(data.name)
        if data.refused:
            made = _taken_as_it_lies(data, folder, local, reporter, entry)
            _record(folder, known, data, made)
            continue
        if entry is not None and target.is_file():
            _check_unchanged(data, target, entry)
            if local is None:
                reporter.say(f"{data.name}: {target} is there and unchanged ({entry['rows']:,} rows)")
                continue
        elif target.is_file():
            raise FetchError(
                f"{data.name}: {target} is there, but not from this command (no entry in {folder / MANIFEST}); move it "
                "away, or give another folder with --to"
            )
        if local is not None:
            source, total, rows = open_local(data, local)
        else:
            source, total, rows = (hub or open_hub)(data, entry["source"]["revision"] if entry else None)
        made = _written(data, target, source, total, rows, reporter, entry)
        _record(folder, known, data, made)
        reporter.say(f"{data.name}: {made.rows:,} rows in {target}, from {source.repository}")


def _record(folder: Path, known: dict[str, Any], data: DataSet, made: Fetched) -> None:
    known[data.name] = asdict(made)
    _write(folder / MANIFEST, data, json.dumps(known, indent=2, sort_keys=True) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the folder's manifest, by set; empty if there is none. Raises :class:`FetchError` for a damaged one."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FetchError(f"{path} is damaged ({error}); move it away to fetch the sets again") from error
    return dict(found)


def _check_unchanged(data: DataSet, target: Path, entry: dict[str, Any]) -> None:
    if file_hash(target) != entry["xxh3_128"]:
        raise FetchError(
            f"{data.name}: {target} is not the file that was fetched on {entry['at']}: its hash is another than in "
            f"{MANIFEST}. Delete it to fetch it again, or keep your own under another name, as a task's path"
        )


def _written(
    data: DataSet,
    target: Path,
    source: Source,
    total: int | None,
    rows: Rows,
    reporter: Reporter,
    entry: dict[str, Any] | None,
) -> Fetched:
    """Writes the file. Raises :class:`FetchError` where it is not what `entry` says that it was at the first fetch."""
    columns: dict[str, list[str]] = {name: [] for name in COLUMNS}
    content, dropped = xxhash.xxh3_128(), 0
    with reporter.phase(f"read {data.name}", total or data.rows or 0, "rows") as advance:
        advance(0)
        for number, row in enumerate(rows):
            try:
                found = product_row(row)
            except IncompleteRow as error:
                if data.use == "benchmark":  # without the row it would be another benchmark
                    raise FetchError(f"{data.name}: row {number} of {source.repository}: {error}") from error
                dropped += 1
                continue
            except UnknownLayout as error:
                raise FetchError(f"{data.name}: row {number} of {source.repository}: {error}") from error
            content.update(json.dumps(found).encode())
            for name in COLUMNS:
                columns[name].append(found[name])
            if number % 1000 == 999:
                advance(number + 1)
    count = len(columns["problem"])
    if not count:
        raise FetchError(f"{data.name}: {source.repository} has no rows for it")
    if dropped:
        reporter.say(f"[yellow]{data.name}: {dropped:,} rows without a problem or an answer are left out[/]")
    if data.rows is not None and count + dropped != data.rows:
        reporter.say(f"[yellow]{data.name}: {count + dropped:,} rows, where {data.rows:,} were published[/]")
    _check_content(data, target, source, content.hexdigest(), entry)
    kept = {name: texts for name, texts in columns.items() if name in COLUMNS[:2] or any(texts)}
    file = pa.BufferOutputStream()
    pq.write_table(pa.table(kept), file, compression="zstd")
    _write(target, data, memoryview(file.getvalue()))
    at = time.strftime("%FT%T%z")
    return Fetched(
        file=data.file,
        rows=count,
        xxh3_128=file_hash(target),
        content=content.hexdigest(),
        dropped=dropped,
        licence=data.licence,
        source=asdict(source),
        at=at,
    )


def _check_content(data: DataSet, target: Path, source: Source, content: str, entry: dict[str, Any] | None) -> None:
    if entry is not None and content != entry["content"]:
        raise FetchError(
            f"{data.name}: its rows are not those of the first fetch. Then ({entry['at']}): {_named(entry['source'])}; "
            f"now: {_named(asdict(source))}. Delete its entry in {target.parent / MANIFEST}, and {target} if it is "
            "there, to take the new rows"
        )


def _named(source: dict[str, Any]) -> str:
    """A source of the manifest in words: a local file with its hash, or a repository with its revision."""
    files = ", ".join(source["files"])
    if source["revision"] is None:
        return f"{Path(source['repository'], files)} (xxh3_128 {source['xxh3_128']})"
    return f"{source['repository']} at revision {source['revision']}" + (f" ({files})" if files else "")


def _write(target: Path, data: DataSet, content: str | bytes | memoryview) -> None:
    try:
        write_atomically(target, content)
    except OSError as error:
        raise FetchError(f"{data.name}: {target} {unwritable(error)}; {remedy(error)}") from error


def remedy(error: OSError) -> str:
    """Says what helps against an error of writing."""
    return "make room, or give another folder with --to" if error.errno in FULL else "give another folder with --to"


def _make_target(folder: Path) -> None:
    """Makes the data folder. Raises :class:`FetchError` where it cannot be one, before any row is read."""
    present = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not present.is_dir():
        raise FetchError(f"--to {folder}: {present} is a file; give another folder with --to")
    if not os.access(present, os.W_OK | os.X_OK):
        raise FetchError(f"--to {folder}: this user may not write in {present}; give another folder with --to")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(f"--to {folder} cannot be made ({error.strerror}); {remedy(error)}") from error


# --- where rows come from ------------------------------------------------------------------------------------------


def _check_complete(sets: Iterable[DataSet], folder: Path) -> None:
    """Raises :class:`FetchError` for a folder that lacks a set's file, before anything is written."""
    if not folder.is_dir():
        found = "it is a file; give its folder" if folder.is_file() else "there is no such folder"
        raise FetchError(f"--from {folder}: {found} (looked in {Path.cwd()})")
    lacking = [data for data in sets if _local_file(data, folder) is None]
    for data in lacking:
        if not data.authors_files:
            raise FetchError(f"{data.name} is none of the authors' sets; fetch it without --from ({data.repository})")
    if lacking:
        wanted = ", ".join(f"{data.name} needs {' or '.join(data.authors_files)}" for data in lacking)
        have = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        more = "".join(f". {data.refused}" for data in lacking if data.refused)
        raise FetchError(
            f"--from {folder}: {wanted}; the folder has {have}. Complete it, or leave these names out{more}"
        )


def _local_file(data: DataSet, folder: Path) -> Path | None:
    """The set's file in a folder; of a set that is copied as it lies, the one with the raw columns if there is any."""
    there = [path for name in data.authors_files if (path := folder / name).is_file()]
    if data.refused and len(there) > 1:
        raw = [path for path in there if next(_rows_of(data, path), {}).keys() >= GPQA_COLUMNS]
        there = raw or there
    return there[0] if there else None


def open_local(data: DataSet, folder: Path) -> tuple[Source, int | None, Rows]:
    """Opens the authors' own file of a set in `folder`. Raises :class:`FetchError`."""
    file = _local_file(data, folder)
    if file is None:
        raise FetchError(f"--from {folder}: {data.name} needs {' or '.join(data.authors_files)}")
    return Source(str(folder.resolve()), None, (file.name,), file_hash(file)), None, _rows_of(data, file)


def _rows_of(data: DataSet, file: Path) -> Iterator[dict[str, Any]]:
    try:
        table = open_table(str(file))
        known = is_known(table.columns) and not data.refused  # one that is copied as it lies is compared as a whole
        yield from table.rows(READ if known else table.columns)
    except TableError as error:
        raise FetchError(f"{data.name}: {error}") from error


def open_hub(data: DataSet, revision: str | None = None) -> tuple[Source, int | None, Rows]:
    """Opens a set of the hub through `datasets` at a commit, else at the newest one, which the manifest records.

    A download that was stopped is continued by the hub's own cache. Raises :class:`FetchError`.
    """
    import datasets
    from huggingface_hub import HfApi

    at = f" at revision {revision}, that of the first fetch," if revision else ""
    try:
        revision = revision or HfApi().dataset_info(data.repository).sha
        files = _hub_files(data, HfApi().list_repo_files(data.repository, repo_type="dataset", revision=revision))
        parts = [
            datasets.load_dataset(data.repository, part, revision=revision, **_what(data, files)) for part in data.parts
        ]
    except Exception as error:  # the hub's client, requests, datasets: each has errors of its own
        raise FetchError(
            f"{data.name}: {data.repository}{at} cannot be read from the hub ({type(error).__name__}: {error!s:.300}). "
            "Without a network, download the authors' files elsewhere, copy their folder here, and give it with --from"
            "; without room for it, let HF_HOME name a folder on a larger disk"
        ) from error
    rows = (row for part in parts for row in part)
    names = files or tuple(part for part in data.parts if part)
    return Source(data.repository, revision, tuple(names), None), sum(len(part) for part in parts), rows


def _what(data: DataSet, files: tuple[str, ...]) -> dict[str, Any]:
    """Which rows of the repository: those of the set's own file, or of its split."""
    if not files:
        return {"split": data.split}
    return {"split": "rows", "data_files": {"rows": list(files)}}  # files have no split but the one that they are given


def _hub_files(data: DataSet, present: Iterable[str]) -> tuple[str, ...]:
    """The set's file among those of its repository; empty where the repository is the set itself."""
    if data.stem is None:
        return ()
    by_name = {Path(path).name: path for path in present}
    found = [by_name[name] for name in data.authors_files if name in by_name]
    if not found:
        raise FetchError(f"{data.repository} has no {' or '.join(data.authors_files)}")
    return (found[0],)


def _taken_as_it_lies(
    data: DataSet, folder: Path, local: Path | None, reporter: Reporter, entry: dict[str, Any] | None
) -> Fetched:
    """Copies the authors' file of a set that is not published in plain text.

    Raises :class:`FetchError` without such a file, for one of other columns, and for another than `entry` says.
    """
    file = None if local is None else _local_file(data, local)
    if file is None:
        raise FetchError(f"{data.name}: {data.refused}")
    rows = list(_rows_of(data, file))
    first = rows[0] if rows else {}
    if not first.keys() >= GPQA_COLUMNS:
        raise FetchError(
            f"{data.name}: {file} has the columns {', '.join(sorted(first)) or '(none)'}; expected the raw ones, "
            f"{', '.join(sorted(GPQA_COLUMNS))}. {data.refused}"
        )
    target = folder / file.name
    if target.is_file() and file_hash(target) != file_hash(file):
        raise FetchError(f"{data.name}: {target} is another file; move it away, or give another folder with --to")
    source = Source(str(file.parent.resolve()), None, (file.name,), file_hash(file))
    content = xxhash.xxh3_128_hexdigest(json.dumps(rows, sort_keys=True, default=str).encode())
    _check_content(data, target, source, content, entry)
    if len(rows) != data.rows:
        reporter.say(f"[yellow]{data.name}: {len(rows):,} rows, where {data.rows:,} were published[/]")
    _write(target, data, file.read_bytes())
    reporter.say(f"{data.name}: {target}, copied as it is (its options get their letters when it is read)")
    return Fetched(
        file=target.name,
        rows=len(rows),
        xxh3_128=file_hash(target),
        content=content,
        dropped=0,
        licence=data.licence,
        source=asdict(source),
        at=time.strftime("%FT%T%z"),
    )
