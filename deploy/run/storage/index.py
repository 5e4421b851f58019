"""The index of a remote run: what the run consists of there, and nothing else does.

    .latent-grpo/index.json     this index
    .latent-grpo/begun          there from before the first file on: what lies here without an index is of an upload
    .latent-grpo/writers/       the leases of those who write here (run.storage.lease)
    trajectories/, checkpoints/, model/, ...   as in the run's folder (deploy.run.folder)

It names each file with its size and hash, and holds the small files (`config.json`, `run.json`, ...) itself, so that
one write replaces all of them together. Files that grow by lines are named by a size up to which they are meant:
a longer object is a later state of the same file. The small files lie beside it too, for whoever copies the folder
with other tools; only the index counts.
"""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import xxhash

from latent_grpo.deploy.run.storage.store import NotThere, StorageError, Store, Stored

OWN = ".latent-grpo"
INDEX = f"{OWN}/index.json"
BEGUN = f"{OWN}/begun"
WRITERS = f"{OWN}/writers"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Index:
    """One snapshot of a run. `snapshot` tells it from every other; paths are relative to the run's folder."""

    files: Mapping[str, Stored] = field(default_factory=dict)
    """Files that do not change."""
    lines: Mapping[str, Stored] = field(default_factory=dict)
    """Files that grow by whole lines, up to a size."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """The content of small files that are replaced."""
    snapshot: str = field(default_factory=lambda: secrets.token_hex(8))

    def same_as(self, other: Index) -> bool:
        """Whether both are the same state of a run."""
        return (self.files, self.lines, self.texts) == (other.files, other.lines, other.texts)

    def without(self, top: Callable[[str], bool]) -> Index:
        """Returns a snapshot without the files and lines whose path `top` holds for."""
        return Index(
            {name: stored for name, stored in self.files.items() if not top(name)},
            {name: stored for name, stored in self.lines.items() if not top(name)},
            self.texts,
        )


def read_index(store: Store) -> Index | None:
    """Returns the index of a run, or None where no run has begun. Raises StorageError for one that is damaged."""
    try:
        content = store.read(INDEX)
    except NotThere:
        return None
    try:
        body = json.loads(content)
        if body.pop("checksum") != checksum(body):
            raise ValueError("it does not match its own checksum")
        if body["format"] != FORMAT:
            raise StorageError(f"{store.url}: its index has format {body['format']}, this program reads {FORMAT}")
        files, lines = (
            {_safe(n): Stored(_size(v[0]), str(v[1])) for n, v in body[k].items()} for k in ("files", "lines")
        )
        texts = {_safe(name): str(text) for name, text in body["texts"].items()}
        for name in ("config.json", "run.json"):
            if not isinstance(json.loads(texts[name]), dict):
                raise ValueError(f"its {name} is no mapping")
        return Index(files, lines, texts, str(body["snapshot"]))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise StorageError(f"{store.url}/{INDEX}: not the index of a run, or damaged ({error})") from error


def write_index(store: Store, index: Index) -> None:
    """Replaces the index: from then on the run is this snapshot."""
    body = {
        "format": FORMAT,
        "snapshot": index.snapshot,
        "files": {name: [stored.size, stored.hash] for name, stored in index.files.items()},
        "lines": {name: [stored.size, stored.hash] for name, stored in index.lines.items()},
        "texts": dict(index.texts),
    }
    content = json.dumps({**body, "checksum": checksum(body)}).encode()
    store.write(INDEX, io.BytesIO(content), len(content))


def _safe(name: str) -> str:
    """A name of a file in the run's folder; who can write the index could else write anywhere on this machine."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or any(part.startswith(".") for part in path.parts) or "\\" in name:
        raise ValueError(f"it names {name!r}, which is no file of a run")
    return str(path)


def _size(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"it gives a file {value!r} bytes")
    return value


def checksum(body: dict[str, Any]) -> str:
    """Returns what stands in an index beside its other fields."""
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
