"""Exact reading and comparing of plain numbers, as they are written in answers to word problems.

`read_number` takes a whole answer ("\\$1,234.50 per day", "36\\%", "2\\frac{1}{2} cups") and succeeds only if it states
exactly one number. Everything is a `Fraction`: no float enters a verdict. Time is linear in the text's length and
bounded by `MAX_NUMBER_CHARS`, so this module is safe to run without a time limit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_NUMBER_CHARS = 300
"""Longer texts are not read as a number: no answer needs it, and conversion is quadratic in the digits."""
MAX_EXPONENT = 400

RELATIVE_TOLERANCE = Fraction(1, 100_000)
"""Accepted relative error against a gold that is not a whole number: the reference itself was rounded."""
ABSOLUTE_TOLERANCE = Fraction(1, 200)
"""Cap of the accepted error (half a cent): off by one is wrong however large the gold."""

_CURRENCY = r"(?:\\?\$|[€£¥₹₩₽₪₫฿¢]|\\(?:euro|pounds|pound|yen|textdollar|texteuro|textsterling)(?![A-Za-z])(?:\{\})?)"
_UNSIGNED = r"(?:[0-9]{1,3}(?:[,' ][0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_POWER_OF_TEN = (
    r"\s*(?:\\times|\\cdot|[×·*x])\s*10\s*(?:\^|\*\*)\s*\{?(?P<power>[-+]?[0-9]{1,4})\}?"
    r"|[eE](?P<exponent>[-+]?[0-9]{1,4})"
)
_FRACTION = (
    r"\\[dtc]?frac\s*(?:\{\s*(?P<top>[-+]?(?:UNSIGNED))\s*\}|(?P<top1>[0-9]))"
    r"\s*(?:\{\s*(?P<bottom>UNSIGNED)\s*\}|(?P<bottom1>[0-9]))"
)
_NUMBER = re.compile(
    (
        rf"(?P<sign>(?:(?<![0-9A-Za-z.)}}])|^)[-+]\s*)?(?:{_CURRENCY}\s*)*(?P<inner_sign>[-+])?"
        rf"(?:(?:(?P<whole>[0-9]+)\s*)?{_FRACTION}"
        rf"|(?:(?P<mixed>[0-9]+)\s+)?(?P<numerator>[0-9]+)\s*/\s*(?P<denominator>[0-9]+)(?![0-9.,])"
        rf"|(?P<plain>UNSIGNED)(?:{_POWER_OF_TEN})?)"
    ).replace("UNSIGNED", _UNSIGNED)
)
_PERCENT = re.compile(r"\s*(?:\\?%|(?:percent(?:age)?|pct)\b)", re.IGNORECASE)
_SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
    "k": 10**3,
}
_SCALE = re.compile(rf"\s*({'|'.join(_SCALES)})s?\b", re.IGNORECASE)
_NEGATIVE_WORD = re.compile(r"\b(?:minus|negative)\s+(?=[0-9.$\\])", re.IGNORECASE)

# LaTeX that only dresses a number. Unicode forms are mapped first, so that one grammar suffices.
_UNICODE = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "—": "-",
        "﹣": "-",
        "－": "-",
        "’": "'",
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "％": "%",
    }
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)
_VULGAR = {"½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅛": (1, 8), "⅜": (3, 8)}
_THIN_SPACE = re.compile(r"(?<=[0-9])(?:\\[,!;: ]|\{\s*,\s*\}|~)\s*(?=[0-9]{3}(?![0-9]))")
_SPACE = re.compile(r"\\[,!;: ]|\\q?quad\b|~|\s+")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal|sf)?|math(?:rm|bf|it|sf|bb)|mbox|hbox|operatorname)\s*\{([^{}]*)\}")
_DRESS = re.compile(r"\\(?:left|right|displaystyle|textstyle|bf|rm|it|approx|sim)(?![A-Za-z])|\\[()\[\]]|\*\*|≈")
_DEGREE = re.compile(r"\^\s*\{?\s*(?:\\circ|∘)\s*\}?|°|º|\\degrees?(?![A-Za-z])")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])\s*(?:\^\s*\{?\s*-?[0-9]\s*\}?|[²³])")
_ATTACHED_DIGITS = re.compile(r"(?<![A-Za-z0-9\\])[A-Za-z]+[0-9]+(?![0-9.,]*[0-9])(?=[\s.,;/)]|$)")
# What may stand round the number: with words, also letters, unit slashes and hyphens ("7-day", "km/h"). No nested
# repeats: each character has one way to match, so a failure costs one pass.
_AROUND = {
    True: re.compile(r"(?:[^\W\d_]|[\s.,;:/()\[\]{}'\"!?&$€£¥₹₩₽₪₫฿¢-])*"),
    False: re.compile(r"[\s.,;(){}$€£¥₹₩₽₪₫฿¢]*"),
}
# A letter that multiplies the number is a variable and not a unit.
_VARIABLE = re.compile(r"[xyznabij](?![A-Za-z])|\s*[xyzn](?![A-Za-z])")


@dataclass(frozen=True, slots=True)
class Number:
    """A number that an answer states: `value`, and `other`, its second reading when it has one.

    "36%" reads 36 (a question that asks for per cent) and 9/25; "3 million" reads 3 and 3,000,000.
    """

    value: Fraction
    other: Fraction | None = None

    @property
    def readings(self) -> tuple[Fraction, ...]:
        """Every value this number may stand for."""
        return (self.value,) if self.other is None else (self.value, self.other)

    def __str__(self) -> str:
        if self.value.denominator == 1:
            return str(self.value.numerator)
        decimal = _terminating_decimal(self.value)
        return decimal if decimal is not None else f"{self.value.numerator}/{self.value.denominator}"


def read_number(text: str, *, words: bool = True) -> Number | None:
    """The one number that `text` states, or None when it states none, several, or an expression.

    With `words` the number may stand among words and units ("about 18 dollars a day"); without, only currency, per
    cent and punctuation may surround it, as letters in a formula are variables.
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    text = _plain(text)
    found = None
    position = 0
    # `finditer` would skip what precedes a match; the words between numbers have to be looked at too.
    for match in _NUMBER.finditer(text):
        if found is not None:
            return None
        found = match
        position = match.end()
    if found is None:
        return None
    value = _value(found)
    if value is None:
        return None
    before, after = text[: found.start()], text[position:]
    other = None
    if percent := _PERCENT.match(after):
        after = after[percent.end() :]
        other = value / 100
    elif words and (scale := _SCALE.match(after)):
        after = after[scale.end() :]
        other = value * _SCALES[scale.group(1).lower()]
    if before[-1:].isalpha() and found.group()[0].isdigit():
        return None  # "x5": part of a name
    if after[:1] in ("!", "_", "'") or _VARIABLE.match(after):
        return None  # a factorial, another base, a derivative, a variable
    around = _AROUND[words]
    if not (around.fullmatch(before) and around.fullmatch(after)):
        return None
    if before.rstrip()[-1:] in ("/", "-", ":") or after.lstrip()[:1] == ":":
        return None  # half of an expression, a ratio or a time of day
    return Number(value, other)


def same_number(given: Number, gold: Number) -> bool:
    """Whether any reading of `given` equals any reading of `gold`; see `equal_values`."""
    return any(equal_values(a, b) for a in given.readings for b in gold.readings)


def equal_values(given: Fraction, gold: Fraction) -> bool:
    """Exact equality against a whole gold; against any other the error may reach min(1e-5 |gold|, 0.005)."""
    if given == gold or gold.denominator == 1:
        return given == gold
    return abs(given - gold) <= min(RELATIVE_TOLERANCE * abs(gold), ABSOLUTE_TOLERANCE)


def _plain(text: str) -> str:
    """The answer with dressing removed: text commands unwrapped, spaces single, thousands joined, signs in ASCII."""
    text = text.translate(_UNICODE)
    for character, (top, bottom) in _VULGAR.items():
        if character in text:
            text = text.replace(character, rf"\frac{{{top}}}{{{bottom}}}")
    text = _TEXT.sub(r" \1 ", text)
    text = _DRESS.sub(" ", text)
    text = _THIN_SPACE.sub("", text)
    text = _SPACE.sub(" ", text)
    text = _DEGREE.sub(" ", text)
    text = _UNIT_POWER.sub("", text)
    text = _ATTACHED_DIGITS.sub(" unit ", text) if any(c.isalpha() for c in text) else text
    text = _NEGATIVE_WORD.sub("-", text)
    return text.strip().lstrip("~").strip().strip("$").strip()


def _value(match: re.Match[str]) -> Fraction | None:
    """The signed value of a match of `_NUMBER`; None for a zero denominator, two signs or an absurd exponent."""
    group = match.groupdict()
    signs = [s.strip() for s in (group["sign"], group["inner_sign"]) if s]
    if len(signs) > 1:
        return None
    if group["plain"] is not None:
        value = _decimal(group["plain"])
        power = int(group["power"] or group["exponent"] or 0)
        if abs(power) > MAX_EXPONENT:
            return None
        value *= Fraction(10) ** power
    elif group["denominator"] is not None:
        if int(group["denominator"]) == 0:
            return None
        value = int(group["mixed"] or 0) + Fraction(int(group["numerator"]), int(group["denominator"]))
    else:
        top = (group["top"] or group["top1"]).strip()
        bottom = _decimal(group["bottom"] or group["bottom1"])
        if bottom == 0 or (group["whole"] and top[0] in "+-"):
            return None
        magnitude = _decimal(top.lstrip("+-"))
        value = int(group["whole"] or 0) + (-magnitude if top[0] == "-" else magnitude) / bottom
    return -value if signs == ["-"] else value


def _decimal(text: str) -> Fraction:
    digits = re.sub(r"[,' ]", "", text)
    return Fraction(("0" + digits).rstrip("."))


def _terminating_decimal(value: Fraction) -> str | None:
    """The exact decimal text of a value with a denominator of factors 2 and 5; None for any other or a long one."""
    denominator, places = value.denominator, 0
    while denominator != 1 and places <= 30:
        denominator, places = denominator // _gcd10(denominator), places + 1
        if _gcd10(denominator) == 1 and denominator != 1:
            return None
    if denominator != 1:
        return None
    scaled = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return ("-" if value < 0 else "") + scaled[:-places] + "." + scaled[-places:]


def _gcd10(number: int) -> int:
    return (2 if number % 2 == 0 else 1) * (5 if number % 5 == 0 else 1)
