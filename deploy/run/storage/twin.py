"""What a run's folder knows of its copy in an object store, and whether the folder is the user's own."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from latent_grpo.common.files import read_text, write_atomically
from latent_grpo.deploy.run.storage.store import StorageError

TWIN_FILE = ".remote.json"  # in the run's folder


@dataclass(frozen=True, slots=True)
class Twin:
    """What a run's folder knows of its copy: the URL, and the snapshots of which one is there if nobody else wrote.

    They are the last one that was written or brought here, and those that were begun since: a kill or a failure may
    have come after the store had one.
    `brought`: the folder was made of the copy, so its settings are of whoever can write there. `written_at`: when the
    copy was last known to be a whole snapshot of the folder, in seconds since 1970; None: never.
    """

    url: str
    snapshots: tuple[str, ...]
    brought: bool = False
    written_at: float | None = None


def read_twin(folder: Path) -> Twin | None:
    """Returns what a folder knows of its copy; None for one that has none."""
    try:
        found = json.loads(read_text(folder / TWIN_FILE))
        url, snapshots, brought = str(found["url"]), tuple(map(str, found["snapshots"])), bool(found["brought"])
        written = found.get("written_at")
        return Twin(url, snapshots, brought, None if written is None else float(written))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{folder / TWIN_FILE} is damaged ({error}); remove it to upload the run anew") from error


def write_twin(folder: Path, twin: Twin) -> None:
    write_atomically(folder / TWIN_FILE, json.dumps(dataclasses.asdict(twin)) + "\n")


def foreign(folder: Path, user: int | None = None) -> str | None:
    """Says why what lies in a run's folder may be another's; None: folder and settings are the user's own.

    They are if they belong to the uid `user` (None: the one that runs this process), not everybody may write them and
    they were not copied from an object store. Raises StorageError and OSError where that cannot be read.
    """
    twin = read_twin(folder)
    if twin is not None and twin.brought:
        return f"{folder} was copied from {twin.url}, where others may write"
    owner = os.geteuid() if user is None else user
    found = [os.stat(folder), os.stat(folder / "config.json")]
    if all(status.st_uid == owner and not status.st_mode & stat.S_IWOTH for status in found):
        return None
    return f"{folder} is another user's, or may be written by everybody (your own after chown and chmod o-w)"
