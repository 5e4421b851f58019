"""A run's folder: its layout, its identity, its lock, and what a resumed run may change.

runs/NAME/
    config.json        the resolved settings
    run.json           kind of run, lineage, program and package versions
    manifest.json      what it was made with: program, data, model, hardware, seeds (deploy.run.manifest)
    metrics.jsonl      one line per step
    alarms.jsonl       alarms: raised, lasting, over (deploy.run.health)
    base/              the model that RL started from, where the run made it (absent with model.path)
    induction/         stage 1 of Latent-SFT with induced labels: encoder and decoder of each of its steps
    sft/               states of a Latent-SFT that is not finished
    trajectories/      dumps (common.store)
    learner_records/   what the learner made of them, files of the same relative paths
    checkpoints/       complete states (learner.checkpoint)
    model/             the trained policy, Hugging Face format
    summary.json       the final table
    control/           requests to the run and its replies (deploy.run.control)
    scaled.json        the number of workers that it was scaled to
    recoveries.jsonl   what a run has recovered from by itself (deploy.run.recovery)
    evaluation.json    the results of an evaluation run
    .lock, .lease      held by the process that writes here (run_lock)
    .remote.json       what it has in common with its copy in an object store (deploy.run.storage)
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from latent_grpo.common.config import (
    ConfigError,
    RunConfig,
    config_as_json,
    load_config,
    parse_config,
)
from latent_grpo.common.config.resume import refused_changes
from latent_grpo.common.files import read_text, unwritable, write_atomically
from latent_grpo.common.remote_url import is_url
from latent_grpo.deploy.run.older_settings import of_today
from latent_grpo.deploy.run.start_folder import STARTED_IN, placed, start_folder
from latent_grpo.deploy.run.stored import IDENTITY, StoredError, stored_object
from latent_grpo.deploy.run.versions import ARITHMETIC, versions

SFT_PURPOSE = "sft"  # of the dumps of Latent-SFT's held-out samples
FAILED = "failed_"  # begins the metric of a failure's share of them; the verifier's reason follows
RunKind = Literal["train", "sft", "evaluate"]
"""What a run does: RL, with a Latent-SFT before it where one is due; Latent-SFT alone; an evaluation."""


log = logging.getLogger(__name__)


class ResumeError(ConfigError):
    """A run that cannot be resumed as requested; the message names the keys or the folder."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The path of a run's folder, and the paths of its parts."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def base_model(self) -> Path:
        """The model that RL starts from, where it was made by the run (new, or by a warm start)."""
        return self.path / "base"

    @property
    def induction(self) -> Path:
        """What stage 1 of Latent-SFT leaves: the encoder."""
        return self.path / "induction"

    @property
    def sft(self) -> Path:
        """Checkpoints of Latent-SFT."""
        return self.path / "sft"

    @property
    def trajectories(self) -> Path:
        """Dumps of trajectories."""
        return self.path / "trajectories"

    @property
    def learner_records(self) -> Path:
        """Dumps of learner records."""
        return self.path / "learner_records"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of RL."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.path / "model"

    def config(self) -> RunConfig:
        """Reads the run's settings. Raises ConfigError where they are damaged."""
        return self._parsed(self.settings())

    def placed_config(self) -> RunConfig:
        """Reads the settings as they are meant from any folder (`deploy.run.start_folder`). Raises ConfigError."""
        return self._parsed(self.placed_settings())

    def _parsed(self, settings: dict[str, Any]) -> RunConfig:
        try:
            return parse_config(settings)
        except ConfigError as error:
            raise StoredError(*(f"{self.path / 'config.json'}: {line}" for line in error.args)) from error

    def placed_settings(self) -> dict[str, Any]:
        """The stored settings as they are meant from any folder."""
        return placed(self.settings(), self.identity())

    def settings(self) -> dict[str, Any]:
        """The stored settings, as this version means them."""
        return of_today(self.read_json("config.json"))

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes a file of the folder, which appears whole or not at all."""
        write_atomically(self.path / name, json.dumps(content, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Reads a file of the folder. Raises ConfigError where it is missing or damaged."""
        return stored_object(self.path / name)

    def identity(self) -> dict[str, Any]:
        """Reads `run.json`; it is empty before a run has begun. Raises ConfigError where it is damaged."""
        return self.read_json(IDENTITY) if has_begun(self.path) else {}


def stored_settings(text: str) -> dict[str, Any]:
    """Returns the settings of a `config.json`, as this version means them."""
    return of_today(json.loads(text))


def local_root(config: RunConfig) -> Path:
    """Returns the folder of this machine in which run folders are made."""
    return Path(config.work_folder if is_url(config.runs_folder) else config.runs_folder)


def create_run(config: RunConfig, profile: str, path: Path | None = None, *, kind: RunKind = "train") -> RunFolder:
    """Makes a new folder `PROFILE-DATE-TIME` below the runs' folder here; a number is added where that name is taken.

    With `path` that folder is used instead; it may exist but must hold no run. `kind` says what the run does. Raises
    ConfigError where it cannot be made.
    """
    if path is not None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.json").touch(exist_ok=False)  # of two that begin at once, one does
        except FileExistsError:
            raise ConfigError(f"{path} holds a run already; give another folder or name") from None
        except OSError as error:
            raise ConfigError(f"{path} {unwritable(error)}; choose a folder that is writable") from error
        return _begun(RunFolder(path), config, kind)
    root, key = local_root(config), "work_folder" if is_url(config.runs_folder) else "runs_folder"
    stem = re.sub(r"[^\w.-]+", "-", Path(profile).stem) or "run"
    stem = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1000):
        path = root / (stem if not number else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"{key} {root} {unwritable(error)}; set it to a folder that is writable") from error
        return _begun(RunFolder(path), config, kind)
    raise ConfigError(f"{key} {root}: all names from {stem} to {stem}-999 are taken; choose another folder")


def _begun(folder: RunFolder, config: RunConfig, kind: RunKind) -> RunFolder:
    try:
        write_identity(folder, config, 0, kind)
    except OSError as error:
        discard(folder)
        raise ConfigError(
            f"{folder.path} {unwritable(error)}; set runs_folder (or work_folder) to another disk"
        ) from error
    return folder


def discard(folder: RunFolder) -> None:
    """Removes the folder of a run that could not begin: what stands there before its first step.

    A folder with anything else in it stays.
    """
    for name in (*MADE_FIRST, LOCK_FILE, LEASE_FILE):
        if (place := folder.path / name).is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty
        folder.path.rmdir()


def is_unused(folder: RunFolder) -> bool:
    """Whether a run has done nothing yet: no step, no checkpoint, no copy elsewhere."""
    with contextlib.suppress(OSError):  # of a folder that is gone
        sizes = {path.name: path.stat().st_size for path in folder.path.iterdir()}
        return not sizes.get("metrics.jsonl") and sizes.keys() <= {*MADE_FIRST, LOCK_FILE, LEASE_FILE}
    return False


def named_run(config: RunConfig) -> Path | None:
    """Returns the folder of `run_name`, whether or not that run has begun; None: the run gets a name of its own."""
    return None if config.run_name is None else local_root(config) / config.run_name


def has_begun(path: Path) -> bool:
    """Whether there is a run in the folder."""
    return (path / IDENTITY).exists()


def reopen_run(
    path: str | Path,
    overrides: list[str],
    kind: RunKind,
    settings: RunConfig | None = None,
    check: Callable[[Path, RunConfig], None] = lambda path, config: None,
) -> tuple[RunFolder, RunConfig, int]:
    """Opens a stopped run to resume it: its folder, its settings with allowed changes, and its new lineage.

    `kind` says what it does from now on: `train` may go on with the run of an `sft`, and 0.2.0 stored no kind. With
    `settings` the run goes on with these in place of its own with `overrides`, after :func:`check_named`; its own are
    given to `check` first, which may raise. Raises :class:`ResumeError`, and :class:`FolderInUse` where the run has not
    stopped.
    """
    if settings is None:
        folder, config = open_run(path, overrides, "--resume")
        check(folder.path, config)
    else:
        folder = RunFolder(Path(path))
        config = with_scaled_workers(folder, settings)
    with run_lock(folder.path):
        lineage = int(folder.read_json(IDENTITY)["lineage"]) + 1
        write_identity(folder, config, lineage, kind)
    return folder, config, lineage


def check_named(path: Path, config: RunConfig, kinds: Sequence[RunKind]) -> None:
    """Raises where the run of a name cannot go on as `config` says, or is no run of these kinds.

    That is ConfigError, and ResumeError for settings that it may not have in place of its own.
    """
    folder = RunFolder(path)
    kind = folder.identity().get("kind", kinds[0])  # 0.2.0 stored none
    if kind not in kinds:
        raise ConfigError(f"run_name {config.run_name}: {path} is a run of `{kind}`; give another name")
    # the same files, however they are named
    asked = parse_config(placed(config.model_dump(mode="json"), folder.identity()))
    check_changes(path, folder.placed_config(), asked)


def open_run(path: str | Path, overrides: list[str], option: str) -> tuple[RunFolder, RunConfig]:
    """Reads a run's folder and its settings with allowed changes; writes nothing. Raises :class:`ResumeError`."""
    folder = RunFolder(Path(path))
    if lacks := [name for name in ("config.json", IDENTITY) if not (folder.path / name).exists()]:
        raise ResumeError(f"{option} {path}: it has no {lacks[0]}; give a run folder such as runs/quickstart-...")
    stored = folder.placed_config()
    config = load_config(stored.model_dump(mode="json"), overrides)
    check_changes(folder.path, stored, config)
    return folder, config


def check_changes(run: Path | str, stored: RunConfig, config: RunConfig) -> None:
    """Raises :class:`ResumeError` where the settings differ from a run's own in what a resumed run may not change."""
    refused = refused_changes(stored, config)
    if refused:
        raise ResumeError(
            f"{run} cannot be resumed with other settings: {'; '.join(refused)}. They decide what is computed; "
            "leave them out, or start a new run with them"
        )


def write_identity(folder: RunFolder, config: RunConfig, lineage: int, kind: RunKind) -> None:
    """Writes what the run does from now on: its kind, lineage, settings and the program's versions."""
    before = folder.identity()
    begun = before.get("arithmetic", [1] * lineage) if before else []
    dtypes = before.get("dtypes", [None] * lineage)  # None: that of the next one that says it
    identity = {
        "kind": kind,
        "lineage": lineage,
        "started": time.strftime("%FT%T%z"),
        "versions": versions(),
        "arithmetic": [*begun, ARITHMETIC],
        "dtypes": [*dtypes, config.model.dtype],
        STARTED_IN: start_folder(before),
    }
    folder.write_json(IDENTITY, identity)
    write_atomically(folder.path / "config.json", config_as_json(config))


LOCK_FILE = ".lock"
LEASE_FILE = ".lease"
MADE_FIRST = {"config.json", "run.json", "manifest.json", "summary.json", "metrics.jsonl", "control", "base", "initial"}
"""What is in a run's folder before its first step."""
LEASE_S = 60.0  # an older lease is that of a process that is gone
RENEW_S = 10.0


class FolderInUse(ConfigError):
    """A folder that another process has locked."""


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Locks a folder while the block runs, on this machine and on others that see it.

    On this machine flock decides, which ends with the process. Other machines may share the folder through a file
    system on which flock means nothing to them: for these a lease, a file that is renewed every `RENEW_S`, says that
    it is in use. The lease of a machine that is gone runs out within `LEASE_S`, and that is waited for. Without flock
    at all, `filelock` takes the file's existence as the lock, and after a `kill -9` the file has to be deleted. Raises
    :class:`FolderInUse` where another process, or this one, holds the folder.
    """
    path, lease = folder / LOCK_FILE, folder / LEASE_FILE
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise _in_use(folder, read_text(path).strip() or "another process") from None
    except OSError as error:
        raise ConfigError(
            f"{folder} {unwritable(error)}, and a run writes into its folder; copy it to a folder that is writable, or "
            "correct its rights"
        ) from error
    try:
        _await_lease(folder, lease)
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        _write_lease(lease)
        over = threading.Event()
        renewing = threading.Thread(target=_renew, args=(lease, over), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            over.set()
            renewing.join()
            with contextlib.suppress(OSError):
                if read_text(lease) == _lease_of_this_process():
                    lease.unlink()
    finally:
        lock.release()


def _in_use(folder: Path, holder: str) -> FolderInUse:
    return FolderInUse(
        f"{folder} is locked by {holder}: two processes would overwrite each other's files. Wait for it to end, or "
        "stop it (it saves a checkpoint) and run this command again"
    )


def _await_lease(folder: Path, lease: Path) -> None:
    """Waits until another machine's lease has run out. Raises :class:`FolderInUse` where it is renewed."""
    first: tuple[str, float] | None = None
    while (found := _other_machine(lease)) is not None:
        first = first or found
        if found != first:
            raise _in_use(folder, f"{found[0]}, which renews its lease")
        time.sleep(1.0)


def _other_machine(lease: Path) -> tuple[str, float] | None:
    """Returns who holds a lease of another machine and when it was renewed, or None where it has run out.

    Times are those of the file system's clock, which both machines see.
    """
    try:
        holder, renewed = json.loads(read_text(lease)), lease.stat().st_mtime
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    if not isinstance(holder, dict) or holder.get("machine") == this_machine():
        return None  # flock has decided
    try:
        with tempfile.NamedTemporaryFile(dir=lease.parent, prefix=".now-") as now:
            age = os.fstat(now.fileno()).st_mtime - renewed
    except OSError:  # a reader may not write here, or the disk is full
        age = time.time() - renewed
    return (f"process {holder.get('pid')} on {holder.get('host')}", renewed) if age < LEASE_S else None


def this_machine() -> str:
    """Tells this machine, since it was started, from others that may have the same name."""
    found = [socket.gethostname()]
    for path in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):
        with contextlib.suppress(OSError):
            found.append(Path(path).read_text(encoding="utf-8").strip())
    return " ".join(found)


def _lease_of_this_process() -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "machine": this_machine()})


def _write_lease(lease: Path) -> None:
    with contextlib.suppress(OSError):  # a full disk is said where something of worth is written
        write_atomically(lease, _lease_of_this_process())


def _renew(lease: Path, over: threading.Event) -> None:
    own = _lease_of_this_process()
    while not over.wait(RENEW_S):
        with contextlib.suppress(OSError):
            if read_text(lease) != own:
                # this process stood still for so long that another one has taken the folder: it may write nothing more
                log.error("%s belongs to another process now; this one ends at once", lease.parent)
                os._exit(1)
        _write_lease(lease)


SCALED_FILE = "scaled.json"


def keep_workers(folder: RunFolder, config: RunConfig, workers: int) -> None:
    """Writes a number of workers that a run has been scaled to into its settings, so that a resumed run has it too."""
    stored = folder.config()
    rollout = stored.rollout.model_copy(update={"workers": workers})
    write_atomically(folder.path / "config.json", config_as_json(stored.model_copy(update={"rollout": rollout})))
    folder.write_json(SCALED_FILE, {"from": config.rollout.workers, "to": workers})


def with_scaled_workers(folder: RunFolder, config: RunConfig) -> RunConfig:
    """Returns settings of a job that starts again, with the number of workers that the run was scaled to.

    Another number than the one from which it was scaled has been set on purpose, and stays.
    """
    if not (folder.path / SCALED_FILE).exists():
        return config
    scaled = folder.read_json(SCALED_FILE)
    to = scaled.get("to")
    if isinstance(to, bool) or not isinstance(to, int) or to < 1:
        raise ResumeError(f"{folder.path / SCALED_FILE} is damaged (it scales to {to!r:.60}); remove it")
    if config.rollout.workers != scaled.get("from"):
        return config
    rollout = config.rollout.model_copy(update={"workers": to})
    return config.model_copy(update={"rollout": rollout})


def in_use(folder: Path) -> str | None:
    """Returns a sentence about the process that has locked the folder, or None. Makes no file."""
    if not (folder / LOCK_FILE).is_file():
        return None
    if (holder := _other_machine(folder / LEASE_FILE)) is not None:
        return str(_in_use(folder, holder[0]))
    lock = FileLock(folder / LOCK_FILE)
    try:
        with lock.acquire(timeout=0):
            return None
    except Timeout:
        return str(_in_use(folder, read_text(folder / LOCK_FILE).strip() or "another process"))
