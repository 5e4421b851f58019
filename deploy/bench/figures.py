"""The figures of a benchmark as a file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latent_grpo.common.files import write_atomically


def write_json(found: object, path: Path) -> None:
    """Writes figures, dataclasses or a list of them, as JSON."""
    convert: Any = asdict  # whatever JSON does not know is a dataclass here
    text = json.dumps(found, default=convert, indent=2) + "\n"
    if path.exists() and not path.is_file():  # a pipe or a device takes what it is given, and stays
        path.write_text(text, encoding="utf-8")
    else:
        write_atomically(path, text)
