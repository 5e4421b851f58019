"""Which versions of the packages were tested with this program: `tested.json`, which `make test-latest` and
`make test-oldest` extend, and what `doctor` says of another version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

FILE = Path(__file__).resolve().with_name("tested.json")


def known_versions(file: Path = FILE) -> dict[str, list[str]]:
    """Returns the versions of each direct dependency with which all tests of a kind passed, oldest first."""
    return json.loads(file.read_text(encoding="utf-8"))


def never_tested(installed: Mapping[str, str], tested: Mapping[str, list[str]] | None = None) -> list[str]:
    """Returns a sentence for each installed package that is older or newer than all versions of it that were tested.

    A version between two that were tested is not worth a word; nor is a package that is not in the list, or a local
    part (`2.13.0+cpu`).
    """
    tested = known_versions() if tested is None else tested
    found = []
    for name, version in installed.items():
        known = sorted(map(Version, tested.get(canonicalize_name(name), [])))
        here = Version(Version(version).public)
        if known and not known[0] <= here <= known[-1]:
            range_ = str(known[0]) if known[0] == known[-1] else f"{known[0]} to {known[-1]}"
            found.append(f"{name} {version} was never tested with this program; tested: {range_}")
    return found
