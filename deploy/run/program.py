"""The sources of this program: where they are, and a hash that shows whether two copies are the same.

Hashes are xxh3-128, and are no signature.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import xxhash

OUR_PACKAGES = ("common", "reward", "rollout_workers", "learner", "deploy")
ROOT = Path(__file__).resolve().parents[2]
"""The folder with the packages: a checkout, or `latent_grpo` where that was installed or uploaded."""
DISTRIBUTION = "latent-grpo"


def source_hash(packages: Iterable[str], root: Path = ROOT) -> str:
    """Hashes the Python files of `packages` below `root`: their paths, and their bytes in :func:`hashed_form`."""
    digest = xxhash.xxh3_128()
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(hashed_form(path.read_bytes()))
    return digest.hexdigest()


def hashed_form(source: bytes) -> bytes:
    """Rewrites a source file's imports as version 0.1.0 would have written them.

    Up to 0.1.0 the packages were top-level ones. Without the name `latent_grpo` and the line breaks that it caused in
    imports, a file in which only imports changed keeps its hash, and an unchanged grader is not reported as another.
    """
    source = source.replace(b"latent_grpo.", b"")
    return re.sub(rb"(?m)^(from \S+ import )\(\n((?:    .+,\n)+)\)$", _one_line, source)


def _one_line(wrapped: re.Match[bytes]) -> bytes:
    return wrapped[1] + b" ".join(wrapped[2].split()).removesuffix(b",")


def installed_copies(search: Sequence[str] | None = None) -> Iterator[tuple[str, Path]]:
    """Yields (version, folder with the packages) for other copies of this program that a package manager installed.

    An editable installation is not one, since it refers to a checkout. `search` lists the folders to look in; the
    default is the import path.
    """
    for distribution in importlib.metadata.distributions(name=DISTRIBUTION, path=[*(search or sys.path)]):
        folder = Path(str(distribution.locate_file("latent_grpo"))).resolve()
        if folder != ROOT and all((folder / package / "__init__.py").is_file() for package in OUR_PACKAGES):
            yield distribution.version, folder
