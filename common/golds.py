"""Gold answers of which any is right, as the one text that records, dumps and grader pipes carry.

A cell that lists several golds means any of them. A text that a verifier itself reads as several parts ("1, 2") is one
gold. Only what grades, trains or shows a gold answer takes it apart.

    >>> gold = any_of(["1/2", "0.5"])
    >>> alternatives(gold), spelled(gold), alternatives("1, 2")
    (('1/2', '0.5'), '1/2 or 0.5', ('1, 2',))
"""

from __future__ import annotations

from collections.abc import Iterable

OR = "\x1e"  # ASCII's record separator, which no answer holds; `reward/` knows it as `verifier.ANY_OF`


def any_of(golds: Iterable[str]) -> str:
    """Returns the text of golds of which any is right, each once, in their order."""
    return OR.join(dict.fromkeys(golds))


def alternatives(gold: str) -> tuple[str, ...]:
    """Returns the golds of which any is right, the preferred one first; nearly always the gold itself."""
    return tuple(gold.split(OR))


def spelled(gold: str) -> str:
    """Returns the gold as people read it: `1/2 or 0.5`."""
    return gold.replace(OR, " or ")
