"""JSON files of a run's folder: one that is damaged is one sentence, with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latent_grpo.common.config import ConfigError

IDENTITY = "run.json"
LISTS = ("arithmetic", "dtypes")  # of the identity, an entry a lineage


class StoredError(ConfigError):
    """A file of a run's folder that is missing, unreadable or damaged."""


def stored_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises :class:`StoredError`."""
    remedy = "bring it back from a copy of the run"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoredError(f"{path} is missing; {remedy}") from error
    except OSError as error:
        raise StoredError(f"{path} cannot be read ({error.strerror or error}); {remedy}") from error
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise StoredError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise StoredError(f"{path} is damaged (it holds no mapping, but {found!r:.60}); {remedy}")
    return found


def stored_identity(path: Path) -> dict[str, Any]:
    """Reads a `run.json`, whose lineage is a number. Raises :class:`StoredError`."""
    found = stored_object(path)
    lineage = found.get("lineage")
    if isinstance(lineage, bool) or not isinstance(lineage, int) or lineage < 0:
        raise StoredError(f"{path} is damaged (its lineage is {lineage!r:.60}); bring it back from a copy of the run")
    if wrong := [name for name in LISTS if name in found and not isinstance(found[name], list)]:
        raise StoredError(f"{path} is damaged ({wrong[0]} is no list); bring it back from a copy of the run")
    return found
