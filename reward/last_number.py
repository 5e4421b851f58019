"""The last number of a text without a box (`fallback: last_number`), unless it is only a part of something larger.

    ... so 48 / 2 = 24 and 48 + 24 = 72 clips.     72
    The chance is 3/4.                             3/4
    That makes 2^10.                               nothing: 10 is the exponent of something

The last digit of the text decides where to look. Its number is read as if it stood in a box, together with the words
round it: from the last number, equals sign or comma before it to the end of the sentence. What a box would not accept
(an operand, a power, a denial, a bound, a variable's factor) is no answer, and no number before it is taken instead.
"""

from __future__ import annotations

import re

from latent_grpo.reward.equations import states_its_value
from latent_grpo.reward.latex import normalise, unwrapped
from latent_grpo.reward.numbers import MAX_NUMBER_CHARS, NUMBER, Number, is_digit, plain, read_number

_REACH = 120  # characters that are looked at on each side of the last digit
_BREAK = re.compile(r"\n|(?<=[.?!])\s+|;\s")
_STATES = re.compile(  # behind "Answer:", an arrow or the #### of GSM8K something is stated, as behind an equals sign
    r"≈|→|⇒|(?<!<)[-=]+>|>>|#+|(?<=[A-Za-z*]{2}):|\\(?:approx|simeq|implies|to|(?:[Ll]ong)?[Rr]ightarrow)(?![A-Za-z])|="
)
_HANGING = re.compile(r"(?<![-+*/])[-+*/^×÷·<>≤≥≠]\s*$")  # an operator at the end of the line above
_BEFORE_EQUATION = re.compile(  # behind an ordinary word, a comma or an arrow an equation may begin
    r",\s|→|⇒|(?<!<)[-=]+>|#+|(?<=[A-Za-z*]{2}):|(?<!\\)\b(?!(?:sqrt|log|ln|exp|sin|cos|tan|abs|of|half|third|quarter|"
    r"twice|thrice|double|triple|times|not)\b)[A-Za-z][a-z]+\b"
)
_OUT_OF = re.compile(r"\bout\s+of\W*$", re.IGNORECASE)
_NAME = r"[A-Za-z](?:_\{?\w+\}?)?\s*=[\s$]*$"  # "x ="
_NAMED = (
    re.compile(rf"(?<![\w+*/^{{}}-])\s*{_NAME}"),
    re.compile(rf"\s*(?:[,;&]|and\b|or\b)[\s$]*(?:and\b|or\b)?\s*{_NAME}"),
)
_JOINS = re.compile(
    r"an?|and|added|by|choose|divided|from|into|less|mod|modulo|more|multiplied|of|or|out|over|per|plus|power|minus|"
    r"subtracted|than|the|through|times|to|vs|x"
)
_LINKS = re.compile(
    r"are|becomes?|equals?|gives?|giving|is|leaves?|leaving|makes?|making|means?|so|then|thus|was|yields"
)


def last_number(text: str) -> str | None:
    """The last number that `text` states, in a spelling that reads back to the same number; else None.

    None too where the last number is only a part of an expression, a list, a range, a date, a time or a ratio.
    """
    found = _last_number(text)
    if found is None:
        return None
    dress = "" if found.other is None else "%" if found.other == found.value / 100 else " dozen"
    literal = f"{found}{dress}"
    return literal if len(literal) <= MAX_NUMBER_CHARS // 3 else None


def _last_number(text: str) -> Number | None:
    place = next((i for i in range(len(text) - 1, -1, -1) if is_digit(text[i])), None)
    if place is None:
        return None
    start = max((match.end() for match in _BREAK.finditer(text, 0, place)), default=0)
    following = _BREAK.search(text, place + 1)
    lead, rest = text[start:place], text[place : following.start() if following else None][:_REACH]
    if len(lead) > _REACH:
        _, space, lead = lead[-_REACH:].partition(" ")  # whole words
        if not space:
            return None
    sentence = plain(_STATES.sub(" = ", lead + rest))
    numbers = list(NUMBER.finditer(sentence))
    if not numbers or re.match(r"[-+]\s", numbers[-1].group()):
        return None  # the sign may be a bullet, or subtract
    number, lead = numbers[-1], sentence[: numbers[-1].start()]
    if not lead.strip() and _HANGING.search(text[:start]):
        return None
    joint = lead[numbers[-2].end() :] if len(numbers) > 1 else lead
    if "=" in joint:
        before = lead.rpartition("=")[2]
        if not _states_its_value(text[start:place]):
            return None
        if len(numbers) > 1 and _NAMED[0].search(sentence[: numbers[-2].start()]) and _NAMED[1].match(joint):
            return None  # x = 1, y = 2
    elif len(numbers) > 1 and not _apart(joint):
        return None
    else:
        before = re.split("[,;]", joint)[-1]
    if _OUT_OF.search(before):
        return None
    dropped = lead[: len(lead) - len(before)]
    after = sentence[number.end() :].replace(")", "", max(dropped.count("(") - dropped.count(")"), 0))
    return read_number(before + number.group() + after)


def _states_its_value(lead: str) -> bool:
    """Whether the last equation of the text before a number's last digit says that something is that number.

    "x =" and "3 + 4 =" do, "2x =" and "x !=" do not.
    """
    *_, sign = _STATES.finditer(lead)
    left = _BEFORE_EQUATION.split(unwrapped(normalise(lead[: sign.start()]))[0])[-1]
    return left[-1:] not in ("!", "<", ">", "/") and states_its_value(left.split("=")[0])


def _apart(joint: str) -> bool:
    """Whether the words between two numbers make them two statements; "or", "hours and" and a comma do not."""
    words = [word for word in re.findall(r"[^\W\d_]+", joint.casefold()) if not _JOINS.fullmatch(word)]
    return len(words) > 1 or (len(words) == 1 and _LINKS.fullmatch(words[0]) is not None)
