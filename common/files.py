"""Atomic writes of files and folders, reading what another process may have replaced, and a file's hash."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import xxhash


def write_atomically(path: Path, content: str | bytes | memoryview, *, temporary: str | None = None) -> None:
    """Writes a file that appears whole or leaves the earlier one; it is on the disk when this returns.

    `temporary` is its name in the same folder while it is written. Raises OSError, and then leaves nothing behind.
    """
    unfinished = path.with_name(temporary or f".{path.name}.{os.getpid()}")
    try:
        unfinished.unlink(missing_ok=True)
        with unfinished.open("xb") as file:  # never through a link that somebody else has put there
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # of a disk that is read-only there is nothing to remove
            unfinished.unlink(missing_ok=True)
        error.filename = str(path)  # an error of writing names no file, and one of opening the unfinished one
        raise
    fsync(path.parent)


SPECIAL = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def check_is_file(path: Path) -> None:
    """Raises OSError for a pipe, a socket or a device in a file's place: whoever opens one may wait for ever.

    A folder passes, as every way of reading refuses it. Raises FileNotFoundError, and what `stat` raises, too.
    """
    if (what := SPECIAL.get(stat.S_IFMT(path.stat().st_mode))) is not None:
        raise OSError(errno.ENXIO, f"it is {what} and no file", str(path))


def opened(path: Path) -> BinaryIO:
    """Opens a file of a run's folder for reading. Raises what :func:`check_is_file` and `open` raise."""
    check_is_file(path)
    return path.open("rb")


def read_text(path: Path) -> str:
    """Reads a UTF-8 file of a run's folder. Raises what :func:`opened` does, and UnicodeDecodeError."""
    with opened(path) as file:
        return file.read().decode()


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that is full, for this user or this file."""


FULL_BYTES = 2**20  # a disk with less is full: a library's error does not say how much it would have needed


def is_full(folder: Path, error: Exception) -> bool:
    """Whether a full disk is the cause of an error in a folder, which libraries say in words of their own.

    Some say it as the system does, and some not at all: then the room that is left decides, which has to be asked for
    while what was written is still there.
    """
    said = (isinstance(error, OSError) and error.errno in FULL) or any(os.strerror(e) in str(error) for e in FULL)
    return said or shutil.disk_usage(folder).free < FULL_BYTES


def unwritable(error: OSError) -> str:
    """Completes a sentence that begins with a path: `cannot be written: No space left on device (0.9 MB free)`."""
    why = error.strerror or str(error)
    if error.errno in FULL and error.filename is not None:
        with contextlib.suppress(OSError):
            there = next(folder for folder in Path(error.filename).absolute().parents if folder.exists())
            free = shutil.disk_usage(there).free
            why = f"{why} ({free / 1e6:,.1f} MB free)"
    return f"cannot be written: {why}"


def linked_out(root: Path, paths: Iterable[Path]) -> str | None:
    """Says of the first path that a symbolic link, or `..`, leads out of the folder `root`; None: all lie in it.

    A folder of somebody else may link to what only its reader can read: such files are not copied on.
    """
    whole, inside = root.resolve(), dict[Path, bool]()
    for path in paths:
        if path.parent not in inside:
            inside[path.parent] = path.parent.resolve().is_relative_to(whole)
        if not inside[path.parent] or (path.is_symlink() and not path.resolve().is_relative_to(whole)):
            return f"{path} leads out of {root}, to {path.resolve()}; put the file itself there, or remove the link"
    return None


def fsync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk; a rename is durable only once its folder is flushed."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_hash(path: Path, algorithm: Callable[[], Any] = xxhash.xxh3_128) -> str:
    """The hash of a file's bytes, in hexadecimal.

    The default shows whether two files are the same and is no signature; `hashlib.sha256` is one.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def save_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Fills a folder with `write(folder)` and only then renames it, so that a killed run leaves no partial model.

    Raises OSError where the disk is full, whatever `write` raises.
    """
    unfinished = target.with_name(f".unfinished-{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        write(unfinished)
    except Exception as error:  # libraries report a full disk in words of their own
        full = is_full(target.parent, error)
        shutil.rmtree(unfinished, ignore_errors=True)
        if full:
            code = next((e for e in FULL if os.strerror(e) in str(error)), errno.ENOSPC)  # also a quota's
            raise OSError(code, os.strerror(code), str(target)) from error
        raise
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
