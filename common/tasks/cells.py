"""Cells of a table as what they hold: texts, numbers, chats, lists of steps; a missing cell is empty.

A value of any other type is refused. It is never turned into text by way of its spelling in Python, which no model was
trained on and no answer equals.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeVar

from latent_grpo.common.golds import any_of, spelled

_MISSING = frozenset({"nan", "NaN", "NaT", "<NA>"})  # of float and NumPy, of Decimal, of pandas
_TEXTS = (str, bytes, list, tuple, dict)
_LIKE_A_CHAT = re.compile(r"""(array\()?[\[(]?\s*\{\s*['"](role|content|type|text|from|value)['"]\s*:""")
_ROLE = re.compile(  # in chats, and in ShareGPT messages
    r"system|developer|user|human|prompter|assistant|gpt|chatgpt|bing|bard|bot|model|observation|ipython|"
    r"(tool|function)(_call|_response)?",
    re.IGNORECASE,
)
_ARRAY = re.compile(r"\barray(?=\()|,\s*dtype=object(?=\))")  # what NumPy writes around a list
_NO_COMMA = re.compile(r"\}\s+\{")  # and between its objects
_ONE = re.compile(
    r"""(?:Decimal|(?:np\.)?(?:array|str_))? [\[({\s]*  # one value, in brackets or not
        (?:(['"])[^'"]*\1\s*:\s* (?P<number>-?\d[\d.]*) | (?:(['"])[^'"]*\3\s*:\s*)? b?(['"])(?P<text>[^'"]+)\4)
        [\])},\s]* (?:dtype=[\w'<]+\))?""",
    re.VERBOSE,
)
_SENTENCE = re.compile(r"(\w+\s+)*answer(\s+is)?[\s:=$]*(?P<number>-?\d+([.,/]\d+)*)\$?\.?", re.IGNORECASE)
SHOWN = 60  # characters of a cell in a message

Messages = tuple[tuple[str, str], ...]
"""A chat: (role, content) of each message."""
T = TypeVar("T")


class CellError(ValueError):
    """A cell that cannot be read; the message says what it holds and what was expected."""


class GivenTwice:
    """Stands for a cell, or a part of one, whose name is given twice. Whoever reads it refuses it, and not the row."""

    def __str__(self) -> str:
        return "two values under one name; keep one of them"


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, pandas' NA. A text is never missing, not even "nan"."""
    return value is None or (not isinstance(value, _TEXTS) and str(value) in _MISSING)


def cell_text(value: Any) -> str:
    """Returns the text of a text or a number, which is empty for a missing value. Raises :class:`CellError`.

    A whole number is written without a decimal point, whatever its column's type, and no number with an exponent.
    """
    if is_missing(value):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise CellError(f"it holds {kind_of(value)}; expected a text or a number")
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise CellError(f"it holds {value}; expected a text or a finite number")
    if isinstance(value, Decimal):
        return format(value, "f")
    return format(Decimal(repr(value + 0.0)), "f").removesuffix(".0")


def joined_text(value: Any) -> str:
    """Returns the text of a text, a number, or a list of these (the steps of a chain), joined by spaces."""
    if isinstance(value, list | tuple):
        return " ".join(text for part in value if (text := cell_text(part)))
    return cell_text(value)


def gold_text(value: Any) -> str:
    """Returns a gold answer: a text, a number, or a list of these, of which any is right (`common/golds.py`).

    Raises :class:`CellError` for anything else.
    """
    if not isinstance(value, list | tuple):
        return cell_text(value)
    return any_of(text for part in value if (text := cell_text(part)).strip())


def held(gold: str) -> str:
    """Returns what a right response to a gold might be where the gold is no value by itself, otherwise the gold.

    This is the one value of a structure that was spelled as a text (`['7']`, `{"value": 7}`, `Decimal('7')`), or the
    number that a sentence calls the answer. Several values together may be an answer, as `("a", "b")` is.
    """
    stripped = gold.strip()
    if (found := _SENTENCE.fullmatch(stripped)) is not None:
        return found["number"]
    if (found := _ONE.fullmatch(stripped)) is not None:
        return found["number"] or found["text"]
    return gold


def chat(value: Any) -> tuple[Messages, bool]:
    """Reads a problem: its messages, and whether the cell was a chat, which is a prompt as a whole.

    A text or a number is one user message, and so is a list of parts of the type `text`. A chat is a list of `role` and
    `content`, also one that is written as JSON in a text; the content is a text or again a list of parts. A missing
    value has no messages. Raises :class:`CellError` for anything else, and for a chat that the assistant ends.
    """
    if isinstance(value, str) and _LIKE_A_CHAT.match(value.lstrip()):
        if (found := _parsed_chat(value, json.loads)) is not None:
            value = found
        elif _parsed_chat(_NO_COMMA.sub("}, {", _ARRAY.sub("", value.strip())), ast.literal_eval) is not None:
            raise CellError(f"it holds a chat as Python spells it ({shown(value)}); write it as JSON, or as a list")
    if not isinstance(value, list | tuple):
        if isinstance(value, dict) or is_missing(value) or isinstance(value, bool):
            return ((), False) if is_missing(value) else _refused(value)
        return (("user", cell_text(value)),), False
    if all(_is_part(part) for part in value):
        return ((("user", _parts(value)),), False) if value else ((), False)
    if not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value):
        return _refused(value)
    messages = tuple((_role(message["role"]), _content(message["content"])) for message in value)
    if messages[-1][0] == "assistant":
        raise CellError(
            "it is a chat whose last message is the assistant's, which would be part of the prompt; name a column that "
            "ends with the user's"
        )
    return messages, True


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """Returns the cell of a column; a dot selects a part of a nested object (`reward_model.ground_truth`)."""
    if column in row:
        return row[column]
    found: Any = row
    for part in column.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def read_cell(row: Mapping[str, Any], column: str | None, read: Callable[[Any], T], where: str) -> T:
    """Reads a cell; no column is a missing value. Raises :class:`CellError`, which says `where`, and the column."""
    try:
        return read(None if column is None else value_of(row, column))
    except CellError as error:
        raise CellError(f"{where}: column {column!r} cannot be read: {error}") from error


def kind_of(value: Any) -> str:
    """Describes a value that is no text: `a list (["a", "b"])`, `a boolean (true)`, `bytes`."""
    if isinstance(value, GivenTwice):
        return str(value)
    for kinds, name in (
        (bool, "a boolean"),
        (Mapping, "an object"),
        ((list, tuple), "a list"),
        ((bytes, bytearray, memoryview), "bytes"),
    ):
        if isinstance(value, kinds):
            return name if name == "bytes" else f"{name} ({shown(value)})"
    return f"a value of the type {type(value).__name__} ({shown(value)})"


def shown(value: Any) -> str:
    """Returns the beginning of a value, as JSON writes it where it can; a text without quotes."""
    text = spelled(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_name)
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _name(value: Any) -> str:
    return f"<{type(value).__name__}>" if isinstance(value, bytes) else str(value)


def _refused(value: Any) -> Any:
    raise CellError(
        f"it holds {kind_of(value)}; expected a text, a number, or a chat (a list of objects with role and content)"
    )


def _parsed_chat(text: str, parse: Callable[[str], Any]) -> Any:
    """Returns what a text spells as a whole if that is a chat, one of its messages, or a list of parts; None otherwise.

    Any other text is a problem, also one that is an object by itself or begins with one, and a graph of edges with from
    and value: somebody in a chat has one of the roles that chats know.
    """
    try:
        found = parse(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # of a text that only begins like a chat
        return None
    entries = found if isinstance(found, list | tuple) else [found]
    is_chat = all(map(_is_message, entries)) and any(
        _ROLE.fullmatch(str(entry.get("role", entry.get("from")))) for entry in entries
    )
    return found if is_chat or (found is entries and all(map(_is_text, entries))) else None


def _is_message(entry: Any) -> bool:
    return isinstance(entry, Mapping) and any(keys <= entry.keys() for keys in ({"role", "content"}, {"from", "value"}))


def _role(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise CellError(f"a message's role is {shown(value)}; expected a text such as user")
    return value


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping) and "type" in value and "role" not in value


def _content(value: Any) -> str:
    """The text of a message: a text, a number, or a list of parts."""
    if isinstance(value, list | tuple) and all(_is_part(part) for part in value):
        return _parts(value)
    return cell_text(value)


def _parts(parts: Sequence[Mapping[str, Any]]) -> str:
    for part in parts:
        if not _is_text(part):
            raise CellError(
                f"it has a part of the type {part['type']!r} ({shown(part)}); a prompt is made of text alone"
            )
    return "".join(part["text"] for part in parts)


def _is_text(part: Any) -> bool:
    return _is_part(part) and part["type"] in ("text", "input_text") and isinstance(part.get("text"), str)
