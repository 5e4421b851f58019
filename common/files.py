"""Atomic writes of files and folders, and a file's hash."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash


def write_atomically(path: Path, content: str | bytes | memoryview, *, temporary: str | None = None) -> None:
    """Writes a file that appears whole or leaves the earlier one; it is on the disk when this returns.

    `temporary` is its name in the same folder while it is written. Raises OSError, and then leaves nothing behind.
    """
    unfinished = path.with_name(temporary or f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    fsync(path.parent)


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
    """Fills a folder with `write(folder)` and only then renames it, so that a killed run leaves no partial model."""
    unfinished = target.with_name(f".unfinished-{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    write(unfinished)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
