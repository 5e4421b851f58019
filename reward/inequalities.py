"""Inequalities in one variable as sets of real numbers, in the spelling of intervals. Purely textual, no algebra.

>>> stated_set(r"x < 1 or x \\ge 2")
'(-\\\\infty,1) \\\\cup [2,\\\\infty)'
"""

from __future__ import annotations

import re

from reward.latex import split_top_level

_SIGN = re.compile(r"(\\(?:le|ge|ne|neq)(?![A-Za-z])|[<>])")
_MEANING = {"<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\neq": "!="}
_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}
_VARIABLE = re.compile(r"[A-Za-z]")
_NAMED = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")


def stated_set(text: str) -> str | None:
    """The set of an inequality, or of several joined by "or" (a union) or "and" (an intersection); else None."""
    if not _SIGN.search(text):
        return None
    for words, operator in ((frozenset({"or", ","}), " \\cup "), (frozenset({"and", ","}), " \\cap ")):
        parts = split_top_level(text, words)
        if len(parts) > 1 and split_top_level(text, words - {","}) != [text]:
            stated = [_one(part) for part in parts]
            if None in stated or len({variable for variable, _ in stated if variable}) > 1:
                return None
            return operator.join(found for _, found in stated)
    single = _one(text)
    return None if single is None else single[1]


def _one(text: str) -> tuple[str, str] | None:
    """(variable, set) of `x < 3`, `3 > x`, `1 < x \\le 2` or `x \\ne 1` with constant bounds; else None."""
    pieces = [piece.strip() for piece in _SIGN.split(text)]
    terms, signs = pieces[::2], [_MEANING[sign] for sign in pieces[1::2]]
    if len(terms) == 2 and _VARIABLE.fullmatch(terms[1]):
        terms, signs = terms[::-1], [_MIRRORED[signs[0]]]
    if len(terms) == 2 and _VARIABLE.fullmatch(terms[0]) and _is_bound(terms[1]):
        variable, (bound,), (sign,) = terms[0], terms[1:], signs
        return variable, {
            "<": rf"(-\infty,{bound})",
            "<=": rf"(-\infty,{bound}]",
            ">": rf"({bound},\infty)",
            ">=": rf"[{bound},\infty)",
            "!=": rf"(-\infty,{bound}) \cup ({bound},\infty)",
        }[sign]
    if len(terms) == 3 and _VARIABLE.fullmatch(terms[1]) and _is_bound(terms[0]) and _is_bound(terms[2]):
        if {sign[0] for sign in signs} == {">"}:
            terms, signs = terms[::-1], [_MIRRORED[sign] for sign in signs[::-1]]
        if {sign[0] for sign in signs} == {"<"}:
            opening, closing = "[" if signs[0] == "<=" else "(", "]" if signs[1] == "<=" else ")"
            return terms[1], f"{opening}{terms[0]},{terms[2]}{closing}"
    return None


def _is_bound(text: str) -> bool:
    """Whether a text can be a constant: no names, and nothing that separates."""
    return bool(text) and not _NAMED.search(text) and "," not in text and "=" not in text
