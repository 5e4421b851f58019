"""Finding the answer in a response: the last box, or with the fallback the last number. Linear in the text's length."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import Literal

from latent_grpo.reward.last_number import last_number

MAX_ANSWER_CHARS = 2_000
"""A box with more characters is malformed: no answer of any benchmark comes near it, and parsers are superlinear."""
MAX_BRACE_DEPTH = 40
"""A box with deeper nesting is malformed: recursive-descent parsers would exhaust the stack on it."""

_FALLBACK_TAIL_CHARS = 2_000
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\u200b-\u200f\u2060\ufeff]")


@dataclass(frozen=True, slots=True)
class Extraction:
    """What a response offers as its answer: the text inside the last box, or None and why there is none."""

    content: str | None
    raw: str | None  # the content as the response has it, unprintable characters included; of a number as it was read
    source: Literal["box", "malformed_box", "last_number", "none"]


def extract(response_text: str, *, fallback: Literal["none", "last_number"] = "none") -> Extraction:
    """The answer a response gives.

    The last `\\boxed{}` (or `\\fbox{}`) counts. If there is a box, nothing outside it counts: an empty, unclosed,
    overlong or too deeply nested last box is `malformed_box`, whatever boxes or numbers stand before it. Without any
    box the answer is the last number when `fallback` is `last_number` (`reward.last_number`), else `none`.
    """
    opening = _last_box(response_text)
    if opening is not None:
        raw = _braced(response_text, opening)
        content = "" if raw is None else readable(raw).strip()
        return Extraction(content, raw, "box") if content else Extraction(None, None, "malformed_box")
    if fallback == "last_number":
        tail = response_text[-_FALLBACK_TAIL_CHARS:]
        if len(tail) < len(response_text):
            tail = re.sub(r"^\S+", "", tail)  # no number that the cut shortened
        number = last_number(readable(tail))
        if number is not None:
            return Extraction(number, number, "last_number")
    return Extraction(None, None, "none")


def readable(text: str) -> str:
    """The text without control characters but tab and newline, and without lone surrogates and zero-width marks."""
    return _UNPRINTABLE.sub("", text)


def balanced(text: str) -> bool:
    """Whether every brace is closed and none is closed twice; escaped braces do not count."""
    depth = 0
    for brace in _unescaped_braces(text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def _last_box(text: str) -> int | None:
    """Where the command of the last box ends."""
    # One forward scan is linear whatever the text; `\\boxedfoo` is another command, `\\boxed5` a malformed box.
    commands = deque(_BOX.finditer(text), maxlen=1)
    return commands[0].end() if commands else None


def _braced(text: str, start: int) -> str | None:
    """The content of the braces that open at `start` (spaces allowed before), or None when they are malformed."""
    while start < len(text) and text[start].isspace():
        start += 1
    if text[start : start + 1] != "{":
        return None
    depth = 0
    position = start
    # An escaped character needs up to one more place than it shows; anything longer than this is overlong anyway.
    limit = min(len(text), start + MAX_ANSWER_CHARS + 2)
    while position < limit:
        character = text[position]
        if character == "\\":
            position += 2
            continue
        if character == "{":
            depth += 1
            if depth > MAX_BRACE_DEPTH:
                return None
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : position]
        position += 1
    return None


def _unescaped_braces(text: str) -> list[str]:
    return re.findall(r"[{}]", re.sub(r"\\.", "", text, flags=re.DOTALL))
