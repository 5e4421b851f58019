"""Copies of a remote run on this machine: to read it (a cache), and to go on with it (the folder that it works in).

A copy is one snapshot: what the index names and nothing else, each file compared with its hash. It is brought up to
date by what has changed. While a run goes on, an object may be gone that an index just read still names; then the
index is read again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import xxhash
from filelock import FileLock

from latent_grpo.common.config import ConfigError, RunConfig, load_config, parse_config
from latent_grpo.common.files import file_hash, write_atomically
from latent_grpo.common.remote_url import checked_url, is_url, joined
from latent_grpo.deploy.run.folder import check_changes, local_root, run_lock, stored_settings
from latent_grpo.deploy.run.foreign_code import check_code
from latent_grpo.deploy.run.start_folder import placed
from latent_grpo.deploy.run.storage.index import Index, read_index
from latent_grpo.deploy.run.storage.snapshot import is_dump
from latent_grpo.deploy.run.storage.store import NotThere, StorageError, Store, Stored
from latent_grpo.deploy.run.storage.twin import Twin, read_twin, write_twin

THREADS = 8  # downloads at the same time
TRIES = 5  # at a run that changes while it is copied
RECORDS = ("trajectories", "learner_records")
"""The parts that `inspect` and `report` read, beside the files at the top, which are always copied."""


def local_copy(place: str | Path, parts: Collection[str] | None = None, cache: Path | None = None) -> Path:
    """Returns a folder of this machine with the run, or the folder in one, that a URL names; a path as it is.

    `parts` are the names at the top of the run's folder that are needed; None: all of them. The copy is in `cache`, by
    default below the user's own, and is brought up to date by each call. Raises StorageError, and ConfigError for a URL
    that cannot be one.
    """
    if not is_url(str(place)):
        return Path(place)
    store, index, inside = _found(Store(checked_url(str(place))))
    folder = (cache or _cache()) / xxhash.xxh3_64_hexdigest(store.url.rpartition("/")[0].encode()) / store.name
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    wanted = {inside.split("/")[0]} if inside else None if parts is None else set(parts)
    with FileLock(folder.parent / f".{store.name}.lock"):
        _bring(store, index, folder, lambda name: wanted is None or "/" not in name or name.split("/")[0] in wanted)
        write_twin(folder, Twin(store.url, (), brought=True))  # its settings are of whoever can write there
    if inside and not (folder / inside).is_dir():
        raise ConfigError(f"{place}: {store.url} has no {inside}")
    return folder / inside if inside else folder


def model_copy(model: str) -> str:
    """Returns a folder of this machine with the model in a remote run that a URL names; any other text as it is."""
    if not is_url(model):
        return model
    folder = local_copy(model, ())
    if (folder / "run.json").is_file():
        raise ConfigError(f"model {model!r}: this is a run; give its trained model, {model.rstrip('/')}/model")
    return str(folder)


def remote_runs(url: str) -> list[str]:
    """Returns the URLs of the runs in a folder of an object store. Raises StorageError and ConfigError."""
    store = Store(checked_url(url))
    if not (found := [name for name in store.folders() if read_index(store.below(name)) is not None]):
        store.check_bucket()
    return [joined(store.url, name) for name in found]


def working_copy(
    url: str, overrides: list[str], say: Callable[[str], None], allowed: Sequence[str] = ()
) -> tuple[Path, list[str]]:
    """Returns the folder in which a remote run goes on here, with all of it, and the overrides with which it does.

    It is the run's name below `work_folder`. One that is there already is used as it is where nobody else has written
    into the run since, and brought up to the copy's state otherwise. What the run refuses is refused before it is
    copied: other settings, and code that neither `overrides` nor `allowed` name (`deploy.run.foreign_code`). Raises
    StorageError, ConfigError and FolderInUse.
    """
    store = Store(checked_url(url))
    index = _index_of(store)
    overrides = [*overrides, f"runs_folder={store.url.rpartition('/')[0]}"]
    stored = parse_config(placed(stored_settings(index.texts["config.json"]), json.loads(index.texts["run.json"])))
    config = load_config(stored.model_dump(mode="json"), overrides)
    check_changes(store.url, stored, config)
    folder = local_root(config) / store.name
    if not _is_in_step(store, index, folder):
        check_code(f"{store.url} may be written by others", config, overrides, allowed)
        brought_up_to_date(store, folder, say)
    return folder, overrides


def named_copy(config: RunConfig, folder: Path, say: Callable[[str], None]) -> None:
    """Brings a run of the name `run_name` here if it has begun in the store, so that this machine goes on with it."""
    if not is_url(config.runs_folder):
        return
    store = Store(joined(config.runs_folder, folder.name))
    index = read_index(store)
    if index is not None and not _is_in_step(store, index, folder):
        brought_up_to_date(store, folder, say)


def brought_up_to_date(store: Store, folder: Path, say: Callable[[str], None]) -> None:
    """Makes a folder that is not there, or is behind, the run's remote state. Raises FolderInUse where one is locked.

    What is there is looked at again under the folder's lock: another process may have brought the run meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder):
        index = _index_of(store)
        if _is_in_step(store, index, folder):
            return
        twin = read_twin(folder)
        if twin is not None and twin.snapshots:
            say(f"[yellow]{folder} is behind {store.url}, which another machine has continued: it becomes its copy[/]")
        else:
            size = sum(stored.size for stored in index.files.values())
            say(f"copying {store.url} to {folder} ({size / 2**20:,.1f} MiB)")
        write_twin(folder, Twin(store.url, (), brought=True))  # until it is whole it is behind
        whole = _bring(store, index, folder, lambda name: True)
        write_twin(folder, Twin(store.url, (whole.snapshot,), brought=True, written_at=time.time()))


def _is_in_step(store: Store, index: Index, folder: Path) -> bool:
    """Whether a folder is the run's remote state or ahead of it. Raises ConfigError for one of anything else."""
    twin = read_twin(folder)
    if twin is None and not (folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())):
        return False
    if twin is None or twin.url != store.url:
        raise ConfigError(
            f"{folder} holds something else than {store.url}, which would take its place; give another work_folder, or "
            "move that folder away"
        )
    return index.snapshot in twin.snapshots


def _index_of(store: Store) -> Index:
    if (index := read_index(store)) is None:
        store.check_bucket()
        raise ConfigError(f"{store.url}: no run has begun there; `latent-grpo runs {store.url}` lists those below it")
    return index


def _found(store: Store) -> tuple[Store, Index, str]:
    """Returns the run that a URL lies in, its index, and the rest of the URL."""
    at, inside = store, ""
    for _ in range(4):
        if (index := read_index(at)) is not None:
            return at, index, inside
        above, _, name = at.url.rpartition("/")
        if above.count("/") < 3:
            break
        at, inside = Store(above), f"{name}/{inside}".rstrip("/")
    return store, _index_of(store), ""


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "latent-grpo" / "runs"


def _bring(store: Store, index: Index, folder: Path, wanted: Callable[[str], bool]) -> Index:
    """Makes the wanted part of a folder a snapshot of the run, and returns that: a newer one where the run goes on."""
    for _ in range(TRIES):
        try:
            _mirror(store, index, folder, wanted)
            return index
        except NotThere:
            index = _index_of(store)
    raise StorageError(f"{store.url} changes faster than it can be copied, or lacks a file of its index; try again")


def _mirror(store: Store, index: Index, folder: Path, wanted: Callable[[str], bool]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: stored for name, stored in index.files.items() if wanted(name)}
    _remove_others(folder, {*files, *index.lines, *index.texts}, wanted)
    missing = [(name, stored) for name, stored in files.items() if not _is_there(folder / name, name, stored)]
    missing += [(name, stored) for name, stored in index.lines.items() if not _is_there(folder / name, name, stored)]
    with ThreadPoolExecutor(THREADS) as threads:
        for _ in threads.map(partial(_fetch, store, folder), missing):
            pass
    for name in sorted(index.texts, key=lambda name: name == "run.json"):  # the last one: with it the folder is a run
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, index.texts[name])


def _fetch(store: Store, folder: Path, entry: tuple[str, Stored]) -> None:
    name, stored = entry
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".tmp-{path.name}")
    try:
        if store.download(name, unfinished, stored.size) != stored:
            raise NotThere(f"{joined(store.url, name)} is not what the index says")  # replaced meanwhile, or damaged
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _is_there(path: Path, name: str, stored: Stored) -> bool:
    """Whether a file is as the index says. Names of dumps and checkpoints are not used twice."""
    if not path.is_file() or path.stat().st_size != stored.size:
        return False
    return is_dump(name) or file_hash(path) == stored.hash


def _remove_others(folder: Path, named: Collection[str], wanted: Callable[[str], bool]) -> None:
    """Removes files that the snapshot does not have; hidden ones, such as the lock, stay."""
    folders = {parent for name in named for parent in Path(name).parents}
    for top, names, files in os.walk(folder):
        place = Path(top).relative_to(folder)
        for name in [name for name in names if place / name not in folders and not name.startswith(".")]:
            if wanted((place / name / "any").as_posix()):
                shutil.rmtree(Path(top, name))
                names.remove(name)
        for name in files:
            path = (place / name).as_posix()
            if path not in named and not name.startswith(".") and name != "report.html" and wanted(path):
                Path(top, name).unlink()
