"""Rows of public benchmarks whose published answer is wrong. They stay in the data, as published, and are reported.

A row is known by its problem text, whatever file it comes from. To drop such rows, or to correct them, is the user's
decision: figures of papers include them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownFault:
    """A published answer that is wrong, and the evidence."""

    benchmark: str
    published: str
    right: str
    why: str


_DRESSING = re.compile(r"[\s$.,;:!?~\\{}]+")
_FAULTS: dict[str, KnownFault] = {
    "489642df682d336e": KnownFault("SVAMP", "1", "5", "the data set's own equation, 4 - 2 + 3, gives 5"),
    "1a5d1efdf565307b": KnownFault(
        "GSM8K test", "2280", "2180", "750 + 430 + 700 + 300 is 2180; the solution adds 400 and leaves 300 out"
    ),
}


def fingerprint(problem: str) -> str:
    """Reduces a problem's text by white space, case, punctuation and LaTeX delimiters, so that spellings agree."""
    text = _DRESSING.sub("", problem).casefold()
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def known_fault(problem: str, answer: str) -> KnownFault | None:
    """Returns the fault of a row with this problem text, if its answer is the published, wrong one."""
    fault = _FAULTS.get(fingerprint(problem))
    return fault if fault is not None and fault.published == answer.strip() else None
