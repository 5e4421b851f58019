"""What may have happened to a file of a run: each function damages the file that it is given."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes() or b" ")
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def unreadable(path: Path) -> None:
    """A link to itself: permissions would not keep the administrator from reading."""
    path.unlink()
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    """A named pipe without a writer, for which whoever opens it waits for ever."""
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": flip,
    "a list": lambda path: path.write_text("[1, 2]\n"),
    "a mapping": lambda path: path.write_text('{"a": null}\n'),
    "a number": lambda path: path.write_text("7\n"),
    "a folder": folder_instead,
    "unreadable": unreadable,
    "a pipe": pipe,
}
