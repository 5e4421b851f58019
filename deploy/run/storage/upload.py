"""The upload of a run while it goes on: a thread of the driver that keeps the copy in an object store up to date.

    snapshot of the folder ──► new files ──► files that grow ──► index ──► small files ──► removal of what is gone

Everything up to the index adds objects that no index names, and everything after it removes such. Where the content
under a name has changed (a model that is exported again), an index without it is written first. A failing upload is
told, tried again, and stops nothing; the end of a run waits for the rest.
"""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath

from latent_grpo.common import main_loop
from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.common.interrupts import Interrupted
from latent_grpo.common.remote_url import checked_url, is_url, joined
from latent_grpo.deploy.run.folder import RunFolder, run_lock
from latent_grpo.deploy.run.storage.index import BEGUN, OWN, Index, read_index, write_index
from latent_grpo.deploy.run.storage.lease import Lease
from latent_grpo.deploy.run.storage.snapshot import LeadsOut, Taken, is_dump, is_state, snapshot, state_manifest
from latent_grpo.deploy.run.storage.store import StorageError, Store, Stored, WrittenElsewhere
from latent_grpo.deploy.run.storage.twin import Twin, foreign, read_twin, write_twin

THREADS = 4  # uploads at the same time
EVERY_S = 15.0
FIRST_RETRY_S, LAST_RETRY_S = 5.0, 300.0
LOOK_EVERY_S = 1.0
TOLD_EVERY_S = 600.0  # a failure that goes on


class Upload:
    """Brings the copy of a run's folder up to date, one pass at a time. The caller holds the folder's lock.

    `say` gets a line, once, where a link of others is left out. `whose` says that the folder is not the user's own
    (:func:`foreign`): then a link out of it is refused.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        lease: Lease | None = None,
        threads: int = THREADS,
        say: Callable[[str], None] = lambda text: None,
        whose: str | None = None,
    ):
        self._say, self._told, self._whose = say, False, whose
        self._folder, self._store, self._threads = folder, store, threads
        self._lease = lease or Lease(store, folder)
        self._index = Index()
        self._same: dict[str, tuple[int, int]] = {}  # (inode, mtime) of files that were found to be as in the copy
        self._shown: dict[str, str] = {}  # the small files that lie beside the index
        self._twin = Twin(store.url, ())
        self._begun = self._swept = self._unsure = self._detached = False

    def attach(self) -> None:
        """Takes the copy's lease and learns what is there. Raises WrittenElsewhere and StorageError."""
        self._lease.take()
        try:
            if self._detached:  # while it was taken
                raise StorageError(f"{self._store.url}: the upload was given up")
            index, twin = read_index(self._store), read_twin(self._folder)
            if index is not None and (twin is None or twin.url != self._store.url):
                raise WrittenElsewhere(
                    f"{self._store.url} holds a run already, and {self._folder} is another one; give another run_name "
                    "or runs_folder, or go on with that run: latent-grpo train --resume " + self._store.url
                )
            if index is not None and twin is not None and index.snapshot not in twin.snapshots:
                raise WrittenElsewhere(
                    f"{self._store.url} was continued by another machine, and {self._folder} is behind it; go on with: "
                    f"latent-grpo train --resume {self._store.url}"
                )
            if index is None:
                self._check_begun()
        except BaseException:
            self._lease.release()
            raise
        self._begun = self._begun or index is not None
        self._index = index or Index()
        known = twin if twin is not None and twin.url == self._store.url else None
        brought, written_at = twin is not None and twin.brought, known.written_at if known is not None else None
        self._twin = Twin(self._store.url, (self._index.snapshot,), brought, written_at)

    def _check_begun(self) -> None:
        """Learns whether an upload has begun here; refuses the objects of others, which the first one would remove."""
        there = self._store.listed()
        self._begun = BEGUN in there
        foreign = min((name for name in there if not name.startswith(f"{OWN}/")), default=None)
        if foreign is not None and not self._begun:
            raise WrittenElsewhere(
                f"{self._store.url} holds {foreign} and no run: a run would remove what it finds there. Give another "
                "run_name or runs_folder, or remove those objects"
            )

    def detach(self) -> None:
        """Gives the lease back; nothing is written any more."""
        self._detached = True
        self._lease.release()

    def run(self, *, everything: bool = False) -> None:
        """Makes one pass: afterwards the copy is the folder as it was at some moment of the pass.

        `everything`: of a run that does not go on, also what others keep in its folder. Raises StorageError, and
        WrittenElsewhere where another machine has taken the copy over.
        """
        if not self._lease.valid:
            if self._lease.lost or self._detached:
                raise WrittenElsewhere(f"{self._store.url} was taken over by another machine")
            self.attach()  # the store could not be reached for long
        if self._unsure:  # a write of the index failed, and the store may have made it
            self._index, self._unsure = read_index(self._store) or Index(), False
        before, swept, self._swept, began = self._index, self._swept, False, time.time()
        with snapshot(self._folder, everything=everything, whose=self._whose) as taken:
            self._tell(taken.left_out)
            kept, lines = self._unchanged(taken), self._lines(taken)
            gone = {_top(name) for name in taken.files.keys() & self._index.files.keys() if name not in kept}
            gone |= {name for name, stored in self._index.lines.items() if not _continues(taken, name, stored)}
            if not self._begun:
                self._check_lease()
                self._store.write(BEGUN, io.BytesIO(), 0)
                self._begun = True
            if gone:
                self._commit(self._index.without(lambda name: _top(name) in gone))
            files = kept | self._send_all(taken, [name for name in taken.files if name not in kept])
            for name, stored in lines.items():
                if self._index.lines.get(name) != stored:
                    self._send(taken, name, stored.size)
            now = Index(files, lines, taken.texts)
            if not now.same_as(self._index):
                self._commit(now)
            self._twin = replace(self._twin, written_at=began)
            write_twin(self._folder, self._twin)
            self._show(taken.texts)
            self._remove({*before.files, *before.lines} if swept else set(self._store.listed()))
        self._swept = True

    def _tell(self, left_out: Sequence[Path]) -> None:
        if left_out and not self._told:
            self._told = True
            more = f" and {len(left_out) - 1} more" if left_out[1:] else ""
            self._say(f"link out of the run's folder, not uploaded: {left_out[0]}{more}")

    def _unchanged(self, taken: Taken) -> dict[str, Stored]:
        """Returns the files of the folder that are in the copy as they are."""
        same: dict[str, Stored] = {}
        states: dict[str, bool] = {}
        for name, size in taken.files.items():
            stored = self._index.files.get(name)
            if stored is None or stored.size != size:
                continue
            if is_dump(name):
                same[name] = stored
            elif is_state(name):
                manifest = state_manifest(name)
                if manifest not in states:
                    there = self._index.files.get(manifest)
                    states[manifest] = there is not None and taken.hash(manifest, taken.files[manifest]) == there
                if states[manifest]:
                    same[name] = stored
            elif self._same.get(name) == (stamp := taken.stamp(name)) or taken.hash(name, size) == stored:
                same[name] = stored
                self._same[name] = stamp
        return same

    def _lines(self, taken: Taken) -> dict[str, Stored]:
        return {name: taken.hash(name, size) for name, size in taken.lines.items()}

    def _send_all(self, taken: Taken, names: Sequence[str]) -> dict[str, Stored]:
        """Writes files as objects, several at a time."""
        with ThreadPoolExecutor(self._threads) as threads:
            sent = threads.map(lambda name: self._send(taken, name, taken.files[name]), names)
            return {name: stored for name, stored in zip(names, sent, strict=True) if stored is not None}

    def _send(self, taken: Taken, name: str, size: int) -> Stored | None:
        """Writes a file as an object; returns None for a dump that the run has removed meanwhile."""
        try:
            file = taken.open(name)
        except FileNotFoundError:
            return None
        self._check_lease()
        stored = self._store.write(name, file, size)
        if name not in taken.handles:
            file.close()
        return stored

    def _check_lease(self) -> None:
        """Comes before every write and removal. Raises StorageError where another machine may have the run by now."""
        if not self._lease.valid:
            raise StorageError(
                f"{self._store.url}: the lease has run out while files were sent; the next try takes it anew"
            )

    def _commit(self, index: Index) -> None:
        self._check_lease()
        self._twin = replace(self._twin, snapshots=(*self._twin.snapshots, index.snapshot))
        write_twin(self._folder, self._twin)
        self._unsure = True
        write_index(self._store, index)
        self._index, self._unsure = index, False
        self._twin = replace(self._twin, snapshots=(index.snapshot,))

    def _show(self, texts: Mapping[str, str]) -> None:
        """Writes the small files beside the index, for other tools that copy the folder."""
        for name, text in texts.items():
            if self._shown.get(name) != text:
                content = text.encode()
                self._check_lease()
                self._store.write(name, io.BytesIO(content), len(content))
                self._shown[name] = text

    def _remove(self, there: Set[str]) -> None:
        """Removes what the index does not name of what is there.

        That is what the pass began with, and all objects in the first pass and after one that failed.
        """
        now = {*self._index.files, *self._index.lines, *self._index.texts}
        kept = {str(folder) for name in now for folder in PurePosixPath(name).parents}
        gone = [PurePosixPath(name) for name in there - now if not name.startswith(f"{OWN}/")]
        folders = {next((str(f) for f in reversed(path.parents) if str(f) not in kept), "") for path in gone}
        for folder in sorted(folders - {""}):
            self._check_lease()
            self._store.remove_folder(folder)
        for path in gone:
            if str(path.parent) in kept:
                self._check_lease()
                self._store.remove(str(path))


def _top(name: str) -> str:
    """What is left out together: a model's folder, one checkpoint, or a file alone."""
    if is_state(name):
        return state_manifest(name).rpartition("/")[0]
    return name if is_dump(name) or "/" not in name else name.split("/")[0]


def _continues(taken: Taken, name: str, stored: Stored) -> bool:
    """Whether a file still begins with what was sent of it."""
    return taken.lines.get(name, 0) >= stored.size and taken.hash(name, stored.size) == stored


class Uploader:
    """The thread that makes passes while a run goes on. `say` gets a line where something is to be known."""

    def __init__(
        self,
        upload: Upload,
        url: str,
        folder: Path,
        say: Callable[[str], None],
        *,
        every_s: float = EVERY_S,
        first_retry_s: float = FIRST_RETRY_S,
    ):
        self._first_retry_s = first_retry_s
        self._upload, self.url, self._folder, self._say, self._every_s = upload, url, folder, say, every_s
        self._wake, self._ending, self._done = threading.Event(), threading.Event(), threading.Event()
        self._given_up = False
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    def begin(self) -> None:
        """Begins to upload."""
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    def end(self, seconds: float) -> str | None:
        """Uploads what is left, for at most so many seconds; returns what is wrong, or None where all is there."""
        if self._thread is None:
            self._upload.detach()
            return None
        self._say(f"uploading what is left to {self.url}")
        self._ending.set()
        self._wake.set()
        end = time.monotonic() + seconds
        while not self._done.is_set() and (left := end - time.monotonic()) > 0:
            main_loop.passed()
            self._done.wait(min(left, LOOK_EVERY_S))
        self._given_up = not self._done.is_set()
        self._upload.detach()  # a thread that is given up writes no index without a lease
        why = self._failure if self._failure is not None else f"it did not end within {seconds:.0f} s"
        if not self._given_up and self._failure is None:
            return None
        return (
            f"{self.url} has not all of the run ({why}); its last whole snapshot can be read and resumed. The rest is "
            f"in {self._folder}: latent-grpo push {self._folder}"
        )

    def _work(self) -> None:
        try:
            self._make_passes()
        finally:
            self._done.set()

    def _make_passes(self) -> None:
        retry_s, told_at = self._first_retry_s, -float("inf")
        while True:
            last = self._ending.is_set()
            try:
                self._upload.run(everything=last)
            except (WrittenElsewhere, LeadsOut) as error:  # no later try would succeed
                if self._given_up:
                    break
                self._failure = str(error)
                self._say(f"[red]nothing more is uploaded: {error}[/]")
                break
            except Exception as error:  # whatever it is, a run must not train on without its upload and without a word
                why = str(error) if isinstance(error, StorageError | OSError) else repr(error)
                if self._given_up:
                    break
                if self._failure is None or time.monotonic() - told_at > TOLD_EVERY_S:
                    told_at = time.monotonic()
                    self._say(f"[yellow]the upload failed and is tried again, while the run goes on: {why}[/]")
                self._failure, wait_s = why, retry_s
                retry_s = min(2 * retry_s, LAST_RETRY_S)
            else:
                if self._failure is not None:
                    self._say(f"[green]the upload goes on: {self.url} is up to date[/]")
                self._failure, retry_s, wait_s = None, self._first_retry_s, self._every_s
                if last:
                    break
            if self._given_up:
                break
            if self._ending.is_set():
                wait_s = 0.0 if self._failure is None else min(wait_s, FIRST_RETRY_S)
                self._wake.clear()
            self._wake.wait(wait_s)


@contextlib.contextmanager
def uploading(
    folder: RunFolder, config: RunConfig, say: Callable[[str], None], *, made: bool, recovering: bool = False
) -> Iterator[Callable[[], None]]:
    """Uploads a run while the block goes on, if its `runs_folder` is a URL; the run calls what this yields to begin.

    The caller holds the folder's lock. At the end of the block it waits `deadlines.upload_s` for the rest, after
    SIGTERM what is left of `deadlines.terminate_s`. Raises StorageError at the beginning, and at the end of a whole
    block where something is not there. A folder that this process has `made` has no links of others in it. A run that
    is `recovering` begins though the store cannot be reached, as it would have gone on.
    """
    if not is_url(config.runs_folder):
        yield lambda: None
        return
    store = Store(joined(config.runs_folder, folder.name))
    upload = Upload(folder.path, store, say=say, whose=None if made else foreign(folder.path))
    try:
        upload.attach()
    except WrittenElsewhere:
        raise
    except StorageError as error:
        if not recovering:
            raise
        say(f"[yellow]{error}; the run goes on, and the upload with it when it can[/]")
    uploader = Uploader(upload, store.url, folder.path, say)
    say(f"uploading to {store.url}")
    try:
        yield uploader.begin
    except BaseException as error:
        limit = config.deadlines.upload_s
        if isinstance(error, Interrupted):
            at = error.at + config.deadlines.after_signal(error.terminated)[0] if error.terminated else None
            limit = limit if at is None else max(at - time.monotonic(), 0.0) + AFTER_S
        if (missing := uploader.end(limit)) is not None:
            say(f"[red]{missing}[/]")
        raise
    if (missing := uploader.end(config.deadlines.upload_s)) is not None:
        raise StorageError(missing)
    say(f"uploaded: {store.url}")


AFTER_S = 15.0  # of the 30 s that a machine waits longer than deadlines.terminate_s


def push(folder: str | Path, say: Callable[[str], None], url: str | None = None) -> str:
    """Uploads what the copy of a run lacks, for a run that does not go on; returns the copy's URL.

    `url`: the folder of an object store to upload to, for a run that has no copy yet. Raises ConfigError where there
    is no run or no place for it, StorageError, and FolderInUse for a run that goes on.
    """
    run = RunFolder(Path(folder).resolve())
    if not (run.path / "config.json").is_file():
        raise ConfigError(f"push {folder}: it has no config.json; give a run folder such as runs/quickstart-...")
    twin = read_twin(run.path)
    if url is None and twin is None and is_url(given := run.config().runs_folder):
        url = given
    if url is None and twin is None:
        raise ConfigError(
            f"push {folder}: the run has no copy in an object store; say where to: --to s3://BUCKET/PREFIX"
        )
    store = Store(twin.url if url is None and twin is not None else joined(checked_url(url or ""), run.name))
    upload = Upload(run.path, store, say=say, whose=foreign(run.path))
    with run_lock(run.path):
        upload.attach()
        try:
            say(f"uploading {run.path} to {store.url}")
            upload.run(everything=True)
        finally:
            upload.detach()
    return store.url
