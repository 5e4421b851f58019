"""The structure of a mathematical answer, and when two answers are the same.

An answer is one value, words ("Sunday"), a numeral in a base (`204_6`), a time or ratio (`1:4`), or a sequence of
answers: a list, set, tuple, interval or matrix. Sequences are compared item by item, so that every item has the same
rules. Numbers, words and identical spellings need no algebra; only what is left over goes to `reward.algebra`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from latent_grpo.reward import latex
from latent_grpo.reward.choice import read_choice
from latent_grpo.reward.equations import DENIED, states_its_value
from latent_grpo.reward.extraction import balanced
from latent_grpo.reward.inequalities import stated_set
from latent_grpo.reward.numbers import Number, read_number, same_number

_MAX_DEPTH = 30
_SEPARATORS = frozenset({",", ";", "and", "or"})
_NUMERAL = re.compile(
    r"(-?)\(?([0-9A-Z][0-9A-Za-z]*)\)?\s*_\s*(?:([0-9]+)|\{?\s*\(?(?:base\s+)?([0-9]+|[a-z]+)\)?\s*\}?)", re.IGNORECASE
)
_COLON = re.compile(r"([0-9]+)\s*((?::\s*[0-9]+\s*)+)(a\.?\s?m\.?|p\.?\s?m\.?)?", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z][A-Za-z0-9 ,.'()/-]*|\([A-Za-z]\)")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|neq|in|cup|cap)(?![A-Za-z])")
_SET_OPERATION = re.compile(r"\\(?:cup|cap|setminus)(?![A-Za-z])")
_SET_BUILDER = re.compile(
    r"\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\\mid(?![A-Za-z])|\\vert(?![A-Za-z])|[:|])(.*)", re.DOTALL
)
_MEMBER = re.compile(r"^[A-Za-z]\s*\\in(?![A-Za-z])\s*")
_LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+|\\text|\\(?:theta|alpha|beta|lambda|mu|phi|angle)(?![A-Za-z])")
_LETTER_LIST = re.compile(r"\\text\s*\{\s*([A-Z](?:\s*(?:,\s*and|,|and)\s*[A-Z])+)\s*\}")  # A, B and D
_DROPPED = re.compile(
    r"(?:[0-9)\]]|\^\s*\{[^{}]*\})\s*_"  # the subscript of a number
    r"|\\[lcdi]?dots(?:[cbmio](?![A-Za-z]))?(?![A-Za-z])|\.\.\."
    r"|(?<![_^0-9])[0-9]+\s+[0-9]"  # two numbers: it would multiply them
    r"|\\(?:frac|sqrt)\s*[\^_']"
)
_IDLE_SPACE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])|(?<=[0-9])\s+(?=[A-Za-z])|(?<=[A-Za-z])\s+(?=[0-9])")
_OPTION = re.compile(r"[A-H]")
_COORDINATE = re.compile(r"([A-Za-z])(?:\s*_\s*\{?\s*([0-9]{1,4})\s*\}?)?")
_ASSIGNED = re.compile(r"(?:[A-Za-z]|\\[a-z]+|\\text\{[^{}]*\})(?:_\{?\w+\}?)?\s*(?:\([A-Za-z, ]*\))?")

AlgebraicEquality = Callable[[str, str], bool]
"""`reward.algebra.equal`: (gold, given) -> equal; raises ValueError when one has no meaning."""


class AlgebraNeeded(Exception):  # a question, not an error
    """Spelling and arithmetic do not decide; raised where no algebra is at hand."""


@dataclass(frozen=True, slots=True)
class Value:
    """One answer that is not a sequence. `number`, `words`, `numeral` and `clock` are readings it has; often none."""

    text: str
    number: Number | None = None
    words: str | None = None
    is_text: bool = False  # written as `\\text{...}`: a word and not a product of variables
    numeral: tuple[str, int] | None = None
    clock: tuple[tuple[int, ...], str] | None = None


@dataclass(frozen=True, slots=True)
class Sequence:
    """Several answers. `brackets`: ("", "") for a bare list, ("matrix", "2x2") for a matrix, else the signs."""

    text: str
    brackets: tuple[str, str]
    items: tuple[Answer, ...]


Answer = Value | Sequence


@lru_cache(maxsize=4096)
def read_answer(content: str) -> Answer | None:
    """The answer that a box's content (or a gold) states; None when nothing is left after removing dressing."""
    if not balanced(content) or latex.bracket_depth(content) > _MAX_DEPTH:
        return None
    return _read(latex.normalise(content))


@lru_cache(maxsize=16_384)
def read_gold(gold: str) -> Answer | None:
    """:func:`read_answer` of a gold, in a cache of its own: golds come back, most responses do not."""
    return read_answer.__wrapped__(gold)


def same_answer(gold: Answer, given: Answer, algebra: AlgebraicEquality | None) -> bool:
    """Whether `given` states what `gold` states.

    Raises AlgebraNeeded when `algebra` is None and would be needed, and ValueError when an answer has no meaning.
    """
    if _spelling(gold.text) == _spelling(given.text):
        return True
    gold_set, given_set = stated_set(gold.text), stated_set(given.text)
    if gold_set is not None and gold_set == given_set:
        return True
    if gold_set is not None and given_set is not None:
        a, b = _read(gold_set[1]), _read(given_set[1])
        return gold_set[0] == given_set[0] and a is not None and b is not None and same_answer(a, b, algebra)
    if (gold_set is None) != (given_set is None):
        a = _read(gold_set[1] if gold_set else gold.text)
        b = _read(given_set[1] if given_set else given.text)
        if a is not None and b is not None and _is_set(a) and _is_set(b):
            return same_answer(a, b, algebra)
    if isinstance(gold, Sequence):
        if isinstance(given, Sequence):
            return _same_sequence(gold, given, algebra)
        if gold.brackets[0] == "matrix" and "\\begin" in given.text and "=" not in given.text:
            return _algebraic(gold.text, given.text, algebra)  # a multiple or sum of matrices
        if len(gold.items) == 2 and _RELATION.search(given.text):
            return _algebraic(gold.text, given.text, algebra)  # an interval, answered as an inequality
        named, *rest = latex.split_top_level(given.text, frozenset({"="}))
        stated = _read(rest[0]) if len(rest) == 1 and _LETTERS.search(named) else None  # "(x, y) = (1, 2)"
        if not isinstance(stated, Sequence) or (stated.brackets == ("", "") and not states_its_value(named)):
            return False
        return _same_sequence(gold, _by_name(stated, _tuple_names(named)), algebra)
    if isinstance(given, Sequence):
        if given.brackets[0] and _RELATION.search(gold.text) and "=" not in gold.text:
            return _algebraic(gold.text, given.text, algebra)
        return False  # several values against one
    return _same_value(gold, given, algebra)


def _is_set(answer: Answer) -> bool:
    """Whether an answer is an interval or made of sets; `(1, 2)` may be one."""
    if isinstance(answer, Sequence):
        return len(answer.items) == 2 and answer.brackets[0] in ("(", "[")
    return bool(_SET_OPERATION.search(answer.text))


def _read(text: str, depth: int = 0) -> Answer | None:
    if depth > _MAX_DEPTH:
        return Value(text)
    text = latex.ungrouped(_MEMBER.sub("", text))
    if not text or not re.search(r"[A-Za-z0-9\\]", text):
        return None
    value = _simple_value(text)
    if value is not None:
        return value
    if letters := _LETTER_LIST.fullmatch(text):
        return _sequence(text, ("", ""), re.findall(r"\b[A-Z]\b", letters[1]), depth)
    if (rows := latex.matrix_rows(text)) is not None:
        cells = [_read(cell, depth + 1) for row in rows for cell in row]
        items = tuple(cell for cell in cells if cell is not None)
        if len(items) == len(cells):
            return Sequence(text, ("matrix", f"{len(rows)}x{len(rows[0])}"), items)
    if (brackets := latex.enclosing_brackets(text)) is not None:
        opening, inside, closing = brackets
        parts = latex.split_top_level(inside, _SEPARATORS)
        if len(parts) > 1:
            return _sequence(text, (opening, closing), parts, depth)
        if opening == "\\{" and (builder := _SET_BUILDER.fullmatch(inside)):
            return _read(builder[1].strip(), depth + 1)
        if (opening, closing) in (("(", ")"), ("\\{", "\\}")) and "\\mid" not in inside and ":" not in inside:
            return _read(inside.strip(), depth + 1)
    parts = latex.split_top_level(text, _SEPARATORS)
    if len(parts) > 1:
        return _sequence(text, ("", ""), parts, depth)
    if text == "\\mathbb{R}":
        return _read("(-\\infty,\\infty)", depth + 1)
    named, equals, stated = text.rpartition("=")
    if text.count("\\pm") == 1 and (not equals or states_its_value(named.split("=")[0])):
        both = [re.sub(r"^[+\s]+|(?<=[{(])\s*\+", "", stated.replace("\\pm", sign)) for sign in "+-"]
        return _sequence(text, ("", ""), both, depth)
    shorter = latex.without_units(text)
    if shorter != text:
        return _read(shorter, depth + 1)
    return Value(text)


def _simple_value(text: str) -> Value | None:
    """The reading of a text that is a number, words, a numeral in a base, or a time or ratio; else None."""
    for candidate in (text, latex.without_units(text)):
        pair = candidate[:1] in ("(", "[") and "," in candidate
        number = None if pair else read_number(candidate, words=False)
        if number is not None:
            return Value(candidate, number=number)
    plain, is_text = latex.unwrapped(text)
    if (numeral := _numeral(plain)) is not None:
        decimal = read_number(numeral[0], words=False) if numeral[1] == 10 else None
        return Value(text, number=decimal) if decimal is not None else Value(text, numeral=numeral)
    if match := _COLON.fullmatch(plain):
        fields = (int(match[1]), *(int(field) for field in match[2].split(":")[1:]))
        return Value(text, clock=(fields, (match[3] or "")[:1].lower()))
    if _LETTER_LIST.fullmatch(text):
        return None
    if _WORDS.fullmatch(plain) and (is_text or re.fullmatch(r"\(?[A-Za-z]\)?|[A-Za-z]{3,}(?:[ -][A-Za-z]+)*", plain)):
        if not is_text and re.search(r"\b(?:and|or)\b", plain):
            return None
        return Value(text, words=_word_key(plain), is_text=is_text)
    return None


def _numeral(text: str) -> tuple[str, int] | None:
    """(digits, base) of a numeral in a base such as `2021_3`, `(1A)_{16}` or `204_{six}`."""
    match = _NUMERAL.fullmatch(text)
    if match is None or len(text) > 200:
        return None
    base = read_number(match[3] or match[4], words=False)
    if base is None or not 2 <= base.value <= 36:
        return None
    return match[1] + match[2].upper(), int(base.value)


def _sequence(text: str, brackets: tuple[str, str], parts: list[str], depth: int) -> Sequence | None:
    items: list[Answer] = []
    for part in parts:
        item = _read(part, depth + 1)
        if item is None:
            return None
        if isinstance(item, Sequence) and item.brackets == ("", "") and brackets[0] in ("", "\\{"):
            items += item.items  # of a `\\pm`: two of the values
        else:
            items.append(item)
    return Sequence(text, brackets, tuple(items))


def _same_sequence(gold: Sequence, given: Sequence, algebra: AlgebraicEquality | None) -> bool:
    if len(gold.items) != len(given.items):
        return False
    gold_names, given_names = _item_names(gold), _item_names(given)
    gold, given = _by_name(gold, gold_names), _by_name(given, given_names)
    matrices = [answer for answer in (gold, given) if answer.brackets[0] == "matrix"]
    if len(matrices) == 2 and gold.brackets != given.brackets:
        return False
    if len(matrices) == 1:  # a column may be written as a tuple
        brackets = (given if matrices[0] is gold else gold).brackets
        column = matrices[0].brackets[1] == f"{len(gold.items)}x1"
        return column and brackets == ("(", ")") and _same_in_order(gold, given, algebra)
    bare, braces, tuple_ = ("", ""), ("\\{", "\\}"), ("(", ")")
    kinds = {gold.brackets, given.brackets}
    if kinds == {bare} and gold_names and not given_names:  # "x = 1, y = 2" as "1, 2": the place says which is which
        return _same_in_order(gold, given, algebra)
    if kinds <= {bare, braces}:
        return _same_unordered(list(gold.items), list(given.items), algebra)
    if len(kinds) == 1 or kinds == {bare, tuple_}:
        return _same_in_order(gold, given, algebra)
    return False


def _item_names(answer: Sequence) -> list[str]:
    """The names of `x = 1, y = 2`; none unless every item is given to a name of its own."""
    parts = [latex.split_top_level(item.text, frozenset({"="})) for item in answer.items]
    if not all(len(part) == 2 and _ASSIGNED.fullmatch(part[0]) for part in parts):
        return []
    names = [_spelling(part[0]) for part in parts]
    return names if len(set(names)) == len(names) else []


def _tuple_names(text: str) -> list[str]:
    """The names of `(x, y)`; none for anything else."""
    brackets = latex.enclosing_brackets(text)
    return [] if brackets is None else latex.split_top_level(brackets[1], frozenset({","}))


def _by_name(answer: Sequence, names: list[str]) -> Sequence:
    """The answer with its items in the order that their names have: `y = 1, x = 2` is the point (2, 1).

    Only where names follow one another, in the alphabet (x, y) or by their index (x_1, x_2). Of others, such as m and
    b, nothing but the problem says which comes first, and the items stay as they were written.
    """
    matches = [match for name in names if (match := _COORDINATE.fullmatch(name))]
    if not len(matches) == len(names) == len(answer.items):
        return answer
    indexed = all(match[2] for match in matches)
    if not indexed and any(match[2] for match in matches):
        return answer
    places = [int(match[2]) if indexed else ord(match[1]) for match in matches]
    one_run = sorted(places) == list(range(min(places), max(places) + 1))
    if not one_run or (indexed and len({match[1] for match in matches}) > 1):
        return answer
    items = [item for _, item in sorted(zip(places, answer.items, strict=True), key=lambda pair: pair[0])]
    return Sequence(answer.text, answer.brackets, tuple(items))


def _same_in_order(gold: Sequence, given: Sequence, algebra: AlgebraicEquality | None) -> bool:
    return all(same_answer(a, b, algebra) for a, b in zip(gold.items, given.items, strict=True))


def _same_unordered(gold: list[Answer], given: list[Answer], algebra: AlgebraicEquality | None) -> bool:
    for item in gold:
        match = next((i for i, candidate in enumerate(given) if same_answer(item, candidate, algebra)), None)
        if match is None:
            return False
        del given[match]
    return True


def _same_value(gold: Value, given: Value, algebra: AlgebraicEquality | None) -> bool:
    if gold.number is not None and given.number is not None:
        return same_number(given.number, gold.number)
    if gold.number is not None and "\\text" in given.text and not latex.says_more_than_a_unit(given.text):
        stated = read_number(latex.unwrapped(given.text)[0])  # \text{18 dollars}; \text{Answer: }18
        if stated is not None:
            return same_number(stated, gold.number)
    if gold.numeral is not None or gold.clock is not None:
        given = _without_name(given)
    if gold.numeral is not None or given.numeral is not None:
        return gold.numeral == given.numeral
    if gold.clock is not None or given.clock is not None:
        return _same_clock(gold, given)
    if gold.is_text and not _OPTION.fullmatch(gold.words or ""):
        return gold.words == (given.words or _word_key(latex.unwrapped(given.text)[0]))
    if gold.words is not None and _OPTION.fullmatch(gold.words):
        return gold.words in (given.words, read_choice(given.text))
    if gold.words is not None and given.words is not None:
        return gold.words == given.words
    if gold.number is not None and given.words is not None:
        return False
    return _same_relation(gold.text, given.text, algebra)


def _without_name(answer: Value) -> Value:
    """`x = 204_5` as `204_5`."""
    name, *rest = latex.split_top_level(answer.text, frozenset({"="}))
    value = _simple_value(rest[0]) if len(rest) == 1 and _ASSIGNED.fullmatch(name) else None
    return answer if value is None else value


def _same_relation(gold: str, given: str, algebra: AlgebraicEquality | None) -> bool:
    """Two values or relations in text: an assignment `x = 5` may stand for its value on either side."""
    gold_parts = latex.split_top_level(gold, frozenset({"="}))
    given_parts = latex.split_top_level(given, frozenset({"="}))
    if len(given_parts) > 1 and len(gold_parts) == 1 and not _RELATION.search(given):
        # In "3+4 = 7" every number must be the gold: "5 = 6 = 7" hedges, it does not derive.
        denied = DENIED.search(given) and not re.search("[0-9)]!=", given)  # 3!=6 is a factorial
        if denied or not states_its_value(given_parts[0]):
            return False  # 2x = 5 or x^2 = 5 does not say that something is 5
        numeric = [part for part in given_parts[:-1] if not _LETTERS.search(part)]
        return all(_same_part(gold, part, algebra) for part in [given_parts[-1], *numeric])
    if len(gold_parts) == 2 and _ASSIGNED.fullmatch(gold_parts[0]):
        if len(given_parts) == 1 and not _RELATION.search(given):
            return _same_part(gold_parts[1], given, algebra)
        if len(given_parts) == 2 and _spelling(given_parts[0]) == _spelling(gold_parts[0]):
            return _same_part(gold_parts[1], given_parts[1], algebra)
    return _algebraic(gold, given, algebra)


def _same_part(gold: str, given: str, algebra: AlgebraicEquality | None) -> bool:
    gold_answer, given_answer = _read(gold), _read(given)
    if gold_answer is None or given_answer is None:
        return False
    if gold_answer == Value(gold) and given_answer == Value(given):
        return _spelling(gold) == _spelling(given) or _algebraic(gold, given, algebra)
    return same_answer(gold_answer, given_answer, algebra)


def _same_clock(gold: Value, given: Value) -> bool:
    """Times and ratios agree in every field, "a.m." and "p.m." where both say it. 1:4 may be written 1/4."""
    if gold.clock is not None and given.clock is not None:
        suffixes = {gold.clock[1], given.clock[1]} - {""}
        return gold.clock[0] == given.clock[0] and len(suffixes) < 2
    clock, other = (gold.clock, given) if gold.clock is not None else (given.clock, gold)
    if clock is None:
        return False
    fields, suffix = clock
    if other.number is None or len(fields) != 2 or suffix or fields[1] == 0:
        return False
    return other.number.value * fields[1] == fields[0]


def _algebraic(gold: str, given: str, algebra: AlgebraicEquality | None) -> bool:
    if dropped := _DROPPED.search(given) or _DROPPED.search(gold):
        raise ValueError(f"computer algebra would drop or misread {dropped.group()!r}")
    if _primes(gold) != _primes(given):
        raise ValueError("computer algebra would drop a prime")
    if algebra is None:
        raise AlgebraNeeded
    return algebra(latex.with_mixed_numbers(gold), latex.with_mixed_numbers(given))


def _primes(text: str) -> int:
    """How many primes a formula has; a mark of feet or minutes behind a number is none, nor is a quotation mark."""
    return re.sub(r"^\s*'+|(?<=[0-9)}])\s*'+\s*$", "", text).count("'")


def _spelling(text: str) -> str:
    """The text without spaces that mean nothing: those not between two letters or two digits."""
    return _IDLE_SPACE.sub("", text)


def _word_key(text: str) -> str:
    key = re.sub(r"[^A-Za-z0-9]+", " ", text).strip()
    key = re.sub(r"^(?:the|an?)\s+(?=\w)", "", key, flags=re.IGNORECASE)
    return key if len(key) == 1 else key.casefold()
