"""A snapshot of a run's folder while the run goes on: which files belong to it now, each of them open.

The order of looking makes the snapshot a state in which the folder was, or one that a kill could have left:

    checkpoints          before dumps and metrics: what a checkpoint has behind it is written before it is whole
    sft/, induction/     before base/: states of Latent-SFT go once the model is there
    dumps, then lines    before run.json: a lineage is written there before its first dump

Checkpoints, states and models are opened at once, so that they can be read to their end though the run removes them
meanwhile. Dumps are many, and one that has been removed is left out.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import xxhash

from latent_grpo.common.errors import ConfigError
from latent_grpo.common.files import linked_out, opened
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.run.storage.store import CHUNK, StorageError, Stored
from latent_grpo.learner.checkpoint import MANIFEST, checkpoint_files, is_checkpoint

SCORES = "checkpoints/scores.json"
LEFT_OUT = ("control", "report.html")
"""What is of no use elsewhere, beside hidden files: requests to the running process, and a page made from the rest."""
TRIES = 10  # at looking into a folder that changes meanwhile


class LeadsOut(StorageError):
    """A link in somebody else's run folder to a file elsewhere, which nobody has asked to upload."""

    exit_code = ConfigError.exit_code


@dataclass(slots=True)
class Taken:
    """The files of a snapshot. `files` and `lines` have their size; what is open is closed with :func:`snapshot`.

    `left_out`: links of others that lead out of the folder.
    """

    files: dict[str, int] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    left_out: list[Path] = field(default_factory=list)
    handles: dict[str, BinaryIO] = field(default_factory=dict)
    folder: Path = field(default_factory=Path)

    def open(self, name: str) -> BinaryIO:
        """Opens a file at its beginning. Raises FileNotFoundError where the run has removed it."""
        if (handle := self.handles.get(name)) is not None:
            handle.seek(0)
            return handle
        return opened(self.folder / name)

    def stamp(self, name: str) -> tuple[int, int]:
        """Returns what tells this file from one that took its name: inode and time of change."""
        handle = self.handles.get(name)
        found = os.fstat(handle.fileno()) if handle is not None else (self.folder / name).stat()
        return found.st_ino, found.st_mtime_ns

    def hash(self, name: str, size: int) -> Stored:
        """Returns what the first `size` bytes of a file are, from the disk."""
        file, digest, left = self.open(name), xxhash.xxh3_128(), size
        while left and (chunk := file.read(min(CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
        if name not in self.handles:
            file.close()
        return Stored(size - left, digest.hexdigest())


@contextlib.contextmanager
def snapshot(run: Path, *, everything: bool = False, whose: str | None = None) -> Iterator[Taken]:
    """Looks at a run's folder. `everything`: also at files that others keep there, of a run that does not go on.

    `whose` says that the folder is not the user's own. Raises StorageError where there is no run, and LeadsOut where
    such a folder links to what lies elsewhere.
    """
    folder, taken = RunFolder(run), Taken(folder=run)
    with contextlib.ExitStack() as stack:
        held: list[Callable[[], list[Path]]] = [
            lambda: _whole_model(folder.model),
            *(lambda top=top: _states(top) for top in (folder.checkpoints, folder.sft)),
            lambda: _induction(folder.induction),
            lambda: _whole_model(folder.base_model),
            lambda: _whole_model(run / "initial"),
        ]
        for listing in held:
            for path, handle in stack.enter_context(_opened(listing)).items():
                name = path.relative_to(run).as_posix()
                taken.handles[name], taken.files[name] = handle, _size(handle)
        links = [run / name for name in taken.files]  # what may be one that leads out
        for top in (folder.trajectories, folder.learner_records):
            links += _add_dumps(taken, top)
        for path in sorted(run.glob("*.jsonl")):
            taken.lines[path.name] = _whole_lines(path)
            links.append(path)
        if everything:
            _add_others(taken)
        texts = [run / SCORES, *sorted(run.glob("*.json"))]
        if whose is not None and (why := linked_out(run, [*links, *texts])) is not None:
            raise LeadsOut(f"not uploaded: {whose}, and {why}")
        for path in texts:
            if path.is_file() and not path.name.startswith("."):
                taken.texts[path.relative_to(run).as_posix()] = path.read_text(encoding="utf-8")
        if "run.json" not in taken.texts or "config.json" not in taken.texts:
            raise StorageError(f"{run}: there is no run to upload: it has no run.json and config.json")
        yield taken


def is_state(name: str) -> bool:
    """Whether a path lies in a checkpoint, whose files never change under their names."""
    return any(is_checkpoint(part) for part in name.split("/")[:-1])


def is_dump(name: str) -> bool:
    """Whether a path is that of a dump, whose name is never used again."""
    return name.startswith(("trajectories/", "learner_records/"))


def state_manifest(name: str) -> str:
    """Returns the path of the manifest of the checkpoint in which a path lies."""
    parts = name.split("/")
    place = next(number for number, part in enumerate(parts) if is_checkpoint(part))
    return "/".join([*parts[: place + 1], MANIFEST])


@contextlib.contextmanager
def _opened(listing: Callable[[], list[Path]]) -> Iterator[dict[Path, BinaryIO]]:
    """Opens all files of a listing, which is made again where one of them is gone by then."""
    for _ in range(TRIES):
        with contextlib.ExitStack() as stack:
            try:
                found: dict[Path, BinaryIO] = {path: stack.enter_context(opened(path)) for path in listing()}
            except FileNotFoundError:
                continue
            yield found
            return
    raise StorageError("the run's folder changes faster than it can be read; the next try takes it anew")


def _whole_model(folder: Path) -> list[Path]:
    return _files_in(folder) if folder.is_dir() else []


def _states(root: Path) -> list[Path]:
    names = sorted(root.iterdir()) if root.is_dir() else []
    return [path for folder in names if is_checkpoint(folder.name) for path in checkpoint_files(folder)]


def _induction(root: Path) -> list[Path]:
    """Stage 1 of an induced Latent-SFT: states of a phase that goes on, and the models of those that are over."""
    tops = sorted(root.iterdir()) if root.is_dir() else []
    states = [path for top in tops if top.name.endswith("-states") for path in _states(top)]
    whole = [top for top in tops if top.is_dir() and not top.name.startswith(".") and not top.name.endswith("-states")]
    return states + [path for top in whole for path in _files_in(top)]


def _files_in(folder: Path) -> list[Path]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _add_dumps(taken: Taken, top: Path) -> list[Path]:
    """Adds the dumps of a folder, which may be a link; returns it and those dumps that are links."""
    above, links = len(str(taken.folder)) + 1, [top]
    for folder, _, names in os.walk(top):  # of tens of thousands of files, every few seconds: plain strings
        for name in names:
            if name.endswith(".parquet") and not name.startswith("."):
                path = f"{folder}/{name}"
                with contextlib.suppress(FileNotFoundError):  # dump.keep_bytes has removed it
                    found = os.lstat(path)
                    if stat.S_ISLNK(found.st_mode):
                        links.append(Path(path))
                        found = os.stat(path)
                    taken.files[path[above:]] = found.st_size
    return links


def _add_others(taken: Taken) -> None:
    """Adds what sinks and others keep in the folder: only at rest are such files whole.

    Links out of it are left out: wandb links its log in the user's cache.
    """
    whole = taken.folder.resolve()
    known = re.compile(r"(model|checkpoints|sft|induction|base|initial|trajectories|learner_records)(/|$)")
    for path in _files_in(taken.folder):
        name = path.relative_to(taken.folder).as_posix()
        top = "/" not in name and name.endswith((".json", ".jsonl"))
        if known.match(name) or top or name.split("/")[0] in LEFT_OUT:
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(whole):
            taken.left_out.append(path)
        else:
            taken.files[name] = path.stat().st_size


def _whole_lines(path: Path) -> int:
    """The size of a file up to its last line end."""
    with opened(path) as file:
        end = file.seek(0, io.SEEK_END)
        while end:
            begin = max(end - 65536, 0)
            file.seek(begin)
            found = file.read(end - begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            end = begin
    return 0


def _size(handle: BinaryIO) -> int:
    return handle.seek(0, io.SEEK_END)
