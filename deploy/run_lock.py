"""One process at a time writes into a run's folder, or a suite's."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import ConfigError

LOCK_FILE = ".lock"


class FolderInUse(ConfigError):
    """Another process is writing there."""


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Held inside; it goes with the process, however that ends, and what is left of the file locks nothing.

    That takes a file system with flock: on one without, `filelock` falls back on the file itself being there, and after
    a `kill -9` the file has to be deleted. Raises :class:`FolderInUse` at once where another process, or this one,
    holds it.
    """
    path = folder / LOCK_FILE
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = path.read_text(encoding="utf-8").strip() or "another process"
        raise FolderInUse(
            f"{folder} is in use by {holder}: two at once would overwrite each other's files. Wait for it, or stop it "
            "(it keeps a checkpoint) and run this again"
        ) from None
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def in_use(folder: Path) -> str | None:
    """A sentence about who is writing there; None where nobody is. Makes no file."""
    if not (folder / LOCK_FILE).is_file():
        return None
    try:
        with run_lock(folder):
            return None
    except FolderInUse as error:
        return str(error)
