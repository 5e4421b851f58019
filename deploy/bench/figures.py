"""The figures of a benchmark as a file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


def write_json(found: object, path: Path) -> None:
    """Writes figures, dataclasses or a list of them, as JSON."""
    convert: Any = asdict  # whatever JSON does not know is a dataclass here
    path.write_text(json.dumps(found, default=convert, indent=2) + "\n", encoding="utf-8")
