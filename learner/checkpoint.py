"""Run checkpoints that survive a kill at any byte.

One checkpoint is one folder below the root::

    00003-step-000020/
        ...              whatever `fill` wrote (the ZeRO engine's shards, the model in Hugging Face format, ...)
        state.json       the run's own state: position in the data, seeds, lineage, counters
        MANIFEST.json    size and xxh3-128 checksum of every file above, and of itself

It is written under a temporary name: files, fsync, manifest, fsync, and only then the rename that makes it a
checkpoint. Names begin with a sequence number and not with the step, because a run that was rewound to an earlier
checkpoint passes the same steps again, and the checkpoint that was written last must win.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from latent_grpo.common import main_loop
from latent_grpo.common.errors import RunError
from latent_grpo.common.files import file_hash, fsync, is_full

FORMAT = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"
_NAME = re.compile(r"(\d{5,})-step-(\d+)")
_UNFINISHED, _DISCARDED = ".unfinished-", ".discarded-"


class CheckpointError(RunError):
    """A checkpoint that is damaged or could not be written. The message says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A folder that was skipped, and the reason in plain words."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint: every byte has been compared with its checksum."""

    path: Path
    step: int
    state: dict[str, Any]
    skipped: tuple[Skipped, ...] = ()  # newer folders that were not complete


def write_checkpoint(
    root: str | Path,
    step: int,
    fill: Callable[[Path], None],
    state: dict[str, Any],
    keep: int,
    protected: Collection[str] = (),
) -> Checkpoint:
    """Writes one checkpoint and removes all but the newest `keep` and those whose names are `protected`.

    `fill` is called with an empty folder and writes the tensors (all learner ranks may write there); `state` must be
    JSON. If `fill` fails, its exception propagates; raises :class:`CheckpointError` where the disk is the cause. The
    earlier checkpoints are untouched.
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    present = _folders(root)
    name = f"{present[-1][0] + 1 if present else 0:05d}-step-{step:06d}"
    temporary = root / f"{_UNFINISHED}{name}"
    temporary.mkdir()
    try:
        fill(temporary)
        (temporary / STATE).write_text(json.dumps(state, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        _seal(temporary, step)
        temporary.rename(root / name)
        fsync(root)
    except BaseException as error:  # also for an interrupt: the unfinished folder has no use
        why = _fault_of_the_disk(root, error)
        shutil.rmtree(temporary, ignore_errors=True)
        if why is None:
            raise
        last = f"the last complete one is {present[-1][2]}" if present else "there is no earlier one"
        raise CheckpointError(f"the checkpoint of step {step} could not be written: {why}; {last}") from error
    for _, _, old in _folders(root)[:-keep]:
        if old.name not in protected:
            _discard(old)
    return Checkpoint(path=root / name, step=step, state=state)


def latest_checkpoint(root: str | Path) -> Checkpoint | None:
    """Returns the last complete checkpoint, with the list of skipped ones, or None if none was ever finished.

    Raises :class:`CheckpointError` if there are finished checkpoints and all are damaged, since a start from nothing
    would silently discard the run.
    """
    root = Path(root)
    if not root.is_dir():
        return None
    skipped = [
        Skipped(path=path, reason="it was never finished: the run ended while it was being written")
        for path in sorted(root.iterdir())
        if path.name.startswith(_UNFINISHED)
    ]
    damaged = []
    for _, step, path in reversed(_folders(root)):
        try:
            state = verify_checkpoint(path)
        except CheckpointError as error:
            damaged.append(Skipped(path=path, reason=str(error)))
            continue
        return Checkpoint(path=path, step=step, state=state, skipped=(*skipped, *damaged))
    if damaged:
        reasons = "; ".join(f"{s.path.name}: {s.reason}" for s in damaged)
        raise CheckpointError(
            f"{root}: all {len(damaged)} checkpoints are damaged ({reasons}). Restore one from a backup, or move the "
            "folder away to start the run from the beginning"
        )
    return None


def list_checkpoints(root: str | Path) -> list[tuple[int, Path]]:
    """Returns (step, folder) of the finished checkpoints, oldest first, without verifying their bytes."""
    return [(step, path) for _, step, path in _folders(Path(root))]


def is_checkpoint(name: str) -> bool:
    """Whether a folder of this name is a finished checkpoint."""
    return _NAME.fullmatch(name) is not None


def checkpoint_files(path: str | Path) -> list[Path]:
    """Returns the files of a finished checkpoint, its manifest last; empty for one whose manifest is not readable.

    Raises FileNotFoundError where the checkpoint has been removed.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file() and not path.is_dir():
        raise FileNotFoundError(path)
    try:
        return [*(path / name for name in _read_manifest(path)), path / MANIFEST]
    except CheckpointError:
        return []


def verify_checkpoint(path: str | Path) -> dict[str, Any]:
    """Compares every byte with the manifest and returns the run state. Raises :class:`CheckpointError`."""
    path = Path(path)
    files = _read_manifest(path)
    for name, (size, checksum) in files.items():
        main_loop.passed()  # the bytes of all files may take longer than deadlines.loop_s
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{name} is missing")
        found = file.stat().st_size
        if found != size:
            raise CheckpointError(f"{name} has {found} bytes, expected {size}")
        if file_hash(file) != checksum:
            raise CheckpointError(f"{name} is damaged: its bytes do not match their checksum")
    if STATE not in files:
        raise CheckpointError(f"{STATE} is not in the manifest; this folder was not written by this program")
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def _fault_of_the_disk(root: Path, error: BaseException) -> str | None:
    """Says what is wrong with the disk, or returns None where something else is the cause."""
    if isinstance(error, Exception) and is_full(root, error):
        usage, folders = shutil.disk_usage(root), _folders(root)
        size = sum(path.stat().st_size for path in folders[-1][2].rglob("*") if path.is_file()) if folders else 0
        needed = f"; the checkpoint before takes {size / 2**20:.1f} MiB" if size else ""
        return (
            f"the disk of {root} is full (No space left: {usage.free / 2**20:.1f} MiB of {usage.total / 2**20:.0f} MiB "
            f"free{needed}); make room or lower checkpoint.keep"
        )
    return f"{root}: {error.strerror or error}" if isinstance(error, OSError) else None


# --- the manifest --------------------------------------------------------------------------------------------------


def _seal(folder: Path, step: int) -> None:
    """Flushes every file to the disk and writes the manifest last."""
    files: dict[str, list[int | str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            main_loop.passed()
            fsync(path)
            files[path.relative_to(folder).as_posix()] = [path.stat().st_size, file_hash(path)]
    body = {"format": FORMAT, "step": step, "files": files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**body, "checksum": _body_checksum(body)}, indent=1), encoding="utf-8")
    fsync(manifest)
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        fsync(path)


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{MANIFEST} is missing")
    try:
        body = json.loads(path.read_bytes())
        checksum = body.pop("checksum")
        files = {name: (int(size), str(digest)) for name, (size, digest) in body["files"].items()}
        version = body["format"]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} is truncated or damaged ({error})") from error
    if checksum != _body_checksum(body):
        raise CheckpointError(f"{MANIFEST} is damaged: it does not match its own checksum")
    if version != FORMAT:
        raise CheckpointError(f"it has checkpoint format {version}, this program reads format {FORMAT}")
    if outside := [name for name in files if name.startswith("/") or ".." in name.split("/")]:
        raise CheckpointError(f"{MANIFEST} names {outside[0]!r:.100}, which is not in the checkpoint")
    return files


def _body_checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


# --- folders -------------------------------------------------------------------------------------------------------


def _folders(root: Path) -> list[tuple[int, int, Path]]:
    """Returns (sequence, step, folder) of finished checkpoints, oldest first."""
    if not root.is_dir():
        return []
    matches = ((_NAME.fullmatch(p.name), p) for p in root.iterdir() if p.is_dir())
    return sorted((int(m[1]), int(m[2]), p) for m, p in matches if m)


def _sweep(root: Path) -> None:
    """Removes folders that a killed run left half written or half deleted."""
    for path in root.iterdir():
        if path.name.startswith((_UNFINISHED, _DISCARDED)):
            shutil.rmtree(path, ignore_errors=True)


def _discard(folder: Path) -> None:
    """Removes a folder under another name, so that a kill in between does not leave a damaged checkpoint."""
    hidden = folder.with_name(f"{_DISCARDED}{folder.name}")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
