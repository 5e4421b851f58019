r"""Inequalities in one variable as sets of real numbers, in the spelling of intervals. Purely textual, no algebra.

>>> stated_set(r"x < 1 or x \ge 2")
('x', '(-\\infty,1) \\cup [2,\\infty)')
"""

from __future__ import annotations

import re

from latent_grpo.reward.latex import split_top_level

_SIGN = re.compile(r"(\\(?:le|ge|ne|neq)(?![A-Za-z])|[<>])")
_MEANING = {"<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\neq": "!="}
_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}
_VARIABLE = re.compile(r"[A-Za-z]")
_SIZE = re.compile(r"(?:\||\\[lr]?vert\s*)([A-Za-z])(?:\||\s*\\[lr]?vert)")
_NAMED = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")


def stated_set(text: str) -> tuple[str, str] | None:
    r"""(variable, set) of an inequality, or of several joined by "or" (a union) or "and" (an intersection); else None.

    Read are `x < 3`, `3 > x`, `1 < x \le 2`, `x \ne 1` and `|x| < 2` with constant bounds.
    """
    if not _SIGN.search(text):
        return None
    for word, operator in (("or", r" \cup "), ("and", r" \cap ")):
        if split_top_level(text, frozenset({word})) == [text.strip()]:
            continue
        parts = split_top_level(text, frozenset({word, ","}))
        stated = [found for part in parts if (found := _one(part)) is not None]
        if len(stated) < len(parts) or len({variable for variable, _ in stated}) > 1:
            return None
        return stated[0][0], operator.join(found for _, found in stated)
    return _one(text)


def _one(text: str) -> tuple[str, str] | None:
    """The same for a single inequality."""
    pieces = [piece.strip() for piece in _SIGN.split(text)]
    terms, signs = pieces[::2], [_MEANING[sign] for sign in pieces[1::2]]
    if len(terms) == 2:
        if _VARIABLE.fullmatch(terms[1]):
            terms, signs = terms[::-1], [_MIRRORED[signs[0]]]
        return _two_terms(terms[0], terms[1], signs[0])
    if len(terms) != 3 or not (_VARIABLE.fullmatch(terms[1]) and _is_bound(terms[0]) and _is_bound(terms[2])):
        return None
    if {sign[0] for sign in signs} == {">"}:
        terms, signs = terms[::-1], [_MIRRORED[sign] for sign in signs[::-1]]
    if {sign[0] for sign in signs} != {"<"}:
        return None
    opening, closing = "[" if signs[0] == "<=" else "(", "]" if signs[1] == "<=" else ")"
    return terms[1], f"{opening}{terms[0]},{terms[2]}{closing}"


def _two_terms(left: str, bound: str, sign: str) -> tuple[str, str] | None:
    if (size := _SIZE.fullmatch(left)) and re.fullmatch(r"[0-9.]+", bound):
        sets = {
            "<": f"(-{bound},{bound})",
            "<=": f"[-{bound},{bound}]",
            ">": rf"(-\infty,-{bound}) \cup ({bound},\infty)",
            ">=": rf"(-\infty,-{bound}] \cup [{bound},\infty)",
        }
        return (size[1], sets[sign]) if sign in sets else None
    if not _VARIABLE.fullmatch(left) or not _is_bound(bound):
        return None
    sets = {
        "<": rf"(-\infty,{bound})",
        "<=": rf"(-\infty,{bound}]",
        ">": rf"({bound},\infty)",
        ">=": rf"[{bound},\infty)",
        "!=": rf"(-\infty,{bound}) \cup ({bound},\infty)",
    }
    return left, sets[sign]


def _is_bound(text: str) -> bool:
    """Whether a text can be a constant: no names, and nothing that separates."""
    return bool(text) and not _NAMED.search(text) and "," not in text and "=" not in text
