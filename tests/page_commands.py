"""The commands that a page of the documentation shows: lines of its code blocks that name no language."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: Path, program: str = "") -> list[str]:
    """The page's command lines in their order, without comments; continued lines are one. With `program` only its."""
    found = []
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language in ("", "bash", "sh", "console"):
            found += [line for line in _lines(block) if line]
    return [line for line in found if not program or line.split()[0].rpartition("/")[2] == program]


def _lines(block: str) -> Iterator[str]:
    for line in block.replace("\\\n", " ").splitlines():
        yield " ".join(re.sub(r"(^|\s)#\s.*$", "", line).split())
