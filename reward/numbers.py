"""Exact reading and comparing of plain numbers, as they are written in answers to word problems.

`read_number` takes a whole answer ("\\$1,234.50 per day", "36\\%", "2\\frac{1}{2} cups") and succeeds only if it states
exactly one number. Everything is a `Fraction`: no float enters a verdict. Time is linear in the text's length and
bounded by `MAX_NUMBER_CHARS`, so this module is safe to run without a time limit.
"""

from __future__ import annotations

import re
import unicodedata
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
_UNSIGNED = (
    r"[0-9]{1,3}(?:\.[0-9]{3}){2,}"  # 1.234.567, which can be nothing else
    r"|(?:[0-9]{1,3}(?:[,' ][0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
)
_POWER_OF_TEN = (
    r"\s*(?:\\times|\\cdot|[×·*x])\s*10\s*(?:\^|\*\*)\s*\{?(?P<power>[-+]?[0-9]{1,4})\}?"
    r"|[eE](?P<exponent>[-+]?[0-9]{1,4})"
)
_FRACTION = (
    r"\\[dtc]?frac\s*(?:\{\s*(?P<top>[-+]?(?:UNSIGNED))\s*\}|(?P<top1>[0-9]))"
    r"\s*(?:\{\s*(?P<bottom>[-+]?(?:UNSIGNED))\s*\}|(?P<bottom1>[0-9]))"
)
NUMBER = re.compile(  # of `plain` text
    (
        rf"(?P<sign>(?:(?<![0-9A-Za-z.)}}])|^)[-+]\s*)?(?:{_CURRENCY}\s*)*(?P<inner_sign>[-+])?"
        rf"(?:(?:(?P<whole>[0-9]+)\s*(?:(?:\+|and)\s*)?)?{_FRACTION}"
        rf"|(?:(?P<mixed>[0-9]+)(?:\s*\+\s*|\s+and\s+|\s+))?(?P<numerator>[0-9]+)\s*/\s*(?P<denominator>[0-9]+)"
        rf"(?![0-9]|[.,][0-9])"
        rf"|(?P<plain>UNSIGNED)(?:{_POWER_OF_TEN})?)"
    ).replace("UNSIGNED", _UNSIGNED)
)
_PERCENT = re.compile(r"\s*(?:\\?%|(?:percent(?:age)?|pct)\b)", re.IGNORECASE)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "k": 10**3}
_SCALE = re.compile(rf"\s*({'|'.join(_SCALES)})s?\b", re.IGNORECASE)
_DOZEN = re.compile(r"\s*dozens?\b", re.IGNORECASE)
_WORDS_TO_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_IN_WORDS = {word: Fraction(value) for value, word in enumerate(_WORDS_TO_TWENTY.split())}
_DOLLARS_AND_CENTS = re.compile(r"\b([0-9][0-9,]*)(?: dollars?)? and ([0-9]{1,2}) cents?\b", re.IGNORECASE)
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
        "²": "^2",
        "³": "^3",
        "¹": "^1",
        "⁴": "^4",
        "⁻": "^-",
        "`": " ",
    }
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)
_VULGAR = {"½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅛": (1, 8), "⅜": (3, 8)} | {
    "⅖": (2, 5), "⅗": (3, 5), "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅝": (5, 8), "⅞": (7, 8)
}  # fmt: skip
_THIN_SPACE = re.compile(r"(?<=[0-9])(?:\\[,!;: ]|\{\s*,\s*\}|~)\s*(?=[0-9]{3}(?![0-9]))")
_SPACE = re.compile(r"\\[,!;: ]|\\q?quad\b|~|\s+")
_TEXT = re.compile(
    r"\\(?:emph|text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf|bb|tt)|mbox|hbox|operatorname)\s*\{([^{}]*)\}"
)
_DRESS = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|bf|rm|it|[Ll]arge|LARGE|[Hh]uge|small|checkmark|square|approx|sim)(?![A-Za-z])"
    r"|\\(?:text)?color\s*\{[^{}]*\}|\\underline(?![A-Za-z])|\\[(){}\[\]]|\*\*|≈|\\\\$"
    "|[\u2600-\u27bf\u2b00-\u2bff\ufe0f\U0001f000-\U0001faff]"  # pictures
)
_OVER = re.compile(
    r"\{\s*([^{}]*?)\s*\\over(?![A-Za-z])\s*([^{}]*?)\s*\}|^\s*([^{}]*?)\s*\\over(?![A-Za-z])\s*([^{}]*?)\s*$"
)
_BRACED_QUOTIENT = re.compile(r"\{\s*([0-9]+)\s*\}\s*/\s*\{\s*([0-9]+)\s*\}")
_DEGREE = re.compile(r"\^\s*\{?\s*(?:\\circ|∘)\s*\}?|°|º|\\degrees?(?![A-Za-z])")
_UNIT_POWER = re.compile(r"(?<![A-Za-z\\])([A-Za-z]+)\s*\^\s*\{?\s*-?[0-9]\s*\}?")
_ATTACHED_DIGITS = re.compile(  # of a unit or a formula: m2, CO2, H2O
    r"(?<![A-Za-z0-9\\])(?:(?:mm|cm|dm|m|km|ft|in|yd|mi)[23]|[A-Z][A-Za-z]{0,2}[0-9](?:[A-Z][a-z]?)?)(?=[\s.,;/)]|$)"
)
# What may stand round the number: with words, also letters, unit slashes and hyphens ("7-day", "km/h"). No nested
# repeats: each character has one way to match, so a failure costs one pass.
_AROUND = {
    True: re.compile(r"(?:[^\W\d_]|[\s.,;:/()\[\]{}'\"!?&$€£¥₹₩₽₪₫฿¢-])*"),
    False: re.compile(r"[\s.,;(){}$€£¥₹₩₽₪₫฿¢]*"),
}
# A letter that multiplies the number is a variable, unless it is a unit's sign (or, behind a space, "a" or "I").
_VARIABLE = re.compile(r"\s*π|(?![mgshlLWVNJCFK])[A-Za-z](?![A-Za-z])|\s+(?![mgshlLWVNJCFKaAI])[A-Za-z](?![A-Za-z/])")
# An operator behind the number, unless it joins a unit: 18-inch, 18/day, 18/h.
_FIRST_OPERAND = re.compile(r"\s*(?:-(?![A-Za-z]{2})|/(?!\s?(?:[A-Za-z]{2}|[mgshlL]\b))|[+*])")
_SIGNED_BRACKET = re.compile(r"[-/][\s(\[{$€£¥₹₩₽₪₫฿¢]*$")  # -(5), -{5}, 1/(5)
_FUNCTION = re.compile(r"[A-Za-z]\s*\(\s*$|(?:^|\s)[b-hj-z]\s+$")  # f(18), x 18
_PARTS = r"(?:halves|thirds|fourths|fifths|sixths|sevenths|eighths|ninths|tenths|hundredths|thousandths)"
_COUNT = rf"(?:{'|'.join(_IN_WORDS)})"
# Words that change which number is meant.
_OTHER_BEFORE = re.compile(
    rf"\b{_COUNT}\s*$|\b(?:sqrt|root|log|ln)\W*$|"
    r"\b(?:not|cannot|never|or|either|neither|nor|than|at\s+(?:least|most)|up\s+to|roots?\s+of|base|log|"
    r"(?:half|thirds?|quarters?|fourths?|fifths?|sixths?|eighths?|tenths?)\s+of)\b|n't\b"
    r"|\b(?:over|under|above|below|beyond|between|except|half|twice|thrice|double|triple|plus|minus|negative|times)"
    r"(?:\s+(?:the|a|of))?\s*\W?$",
    re.IGNORECASE,
)
_OTHER_AFTER = re.compile(
    rf"\b{_PARTS}\b|\band\s+(?:an?|{_COUNT})\s+(?:half|third|quarter|fourth|fifth|sixth|eighth|tenth)s?\b"
    rf"|\b(?:point|no|wait|actually)\W+{_COUNT}\b|^\W*(?:{_COUNT}|lakhs?|crores?|wait)\b|,\s*(?:no|wait|actually)\b|"
    r"\b(?:squared|cubed|factorial|plus|minus|divided|multiplied|to\s+the\s+power|or|nor|not|base|"
    r"is\s+(?:wrong|incorrect|false))\b|n't\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Number:
    """A number that an answer states: `value`, and `other`, its second reading when it has one.

    "36%" reads 36 (a question that asks for per cent) and 9/25; "2 dozen" reads 2 (asked for dozens) and 24.
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

    A word up to twenty that stands alone ("four") is a number too. With `words` the number may stand among words and
    units ("about 18 dollars a day"); without, only currency, per cent and punctuation may surround it, as letters in
    a formula are variables.
    """
    if len(text) > MAX_NUMBER_CHARS or text.count("\\{") != text.count("\\}"):
        return None
    text = plain(text)
    found = None
    position = 0
    # `finditer` would skip what precedes a match; the words between numbers have to be looked at too.
    for match in NUMBER.finditer(text):
        if found is not None:
            return None
        found = match
        position = match.end()
    if found is None:
        value = _IN_WORDS.get(text.strip(" .").casefold())
        return None if value is None else Number(value)
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
        value *= _SCALES[scale.group(1).lower()]
    elif words and (dozen := _DOZEN.match(after)):
        after = after[dozen.end() :]
        other = value * 12
    if before[-1:].isalpha() and found.group()[0].isdigit():
        return None  # "x5": part of a name
    if after[:1] in ("!", "_", "^") or (after[:1] == "'" and before[-1:] != "'") or _VARIABLE.match(after):
        return None  # a factorial, another base, a power, a derivative, a variable
    if _FIRST_OPERAND.match(after) or " - " in f" {after} " or _binary(before, found.group()):
        return None  # an operand of an expression
    if before.count("(") - before.count(")") != after.count(")") - after.count("("):
        return None
    if words and (_FUNCTION.search(before) or _OTHER_BEFORE.search(before) or _OTHER_AFTER.search(after)):
        return None
    around = _AROUND[words]
    if not (around.fullmatch(before) and around.fullmatch(after)):
        return None
    if _SIGNED_BRACKET.search(before) or before[-1:] == ":" or after.lstrip()[:1] == ":":
        return None  # half of an expression, a sign before brackets, a ratio or a time of day
    if ".." in after or before[-1:] == "." or (after[:1] == "." and found.group()[-1] == "."):
        return None  # digits that are left out
    if any(unicodedata.category(character) in ("No", "Nl", "Lm") for character in before + after):
        return None  # a power, an index or a fraction as one character
    return Number(value, other)


def _binary(before: str, number: str) -> bool:
    """Whether the sign of a number subtracts or adds ("x - 18") rather than being its own ("it is -18")."""
    operand = before.rstrip()
    if number[0] not in "+-" or not operand or not (operand[-1].isalnum() or operand[-1] in ")]}"):
        return False
    apart = operand != before and not number[1:2].isspace()
    return not apart or re.search(r"(?:^|[^A-Za-z])[A-Za-z]$|[0-9)\]}]$", operand) is not None


def same_number(given: Number, gold: Number) -> bool:
    """Whether a reading of `given` equals one of `gold` (`equal_values`); of two per cents, the first ones."""
    if given.other is not None and gold.other is not None:
        return equal_values(given.value, gold.value)
    return any(equal_values(a, b) for a in given.readings for b in gold.readings)


def equal_values(given: Fraction, gold: Fraction) -> bool:
    """Exact equality against a whole gold; against any other the error may reach min(1e-5 |gold|, 0.005)."""
    if given == gold or gold.denominator == 1:
        return given == gold
    return abs(given - gold) <= min(RELATIVE_TOLERANCE * abs(gold), ABSOLUTE_TOLERANCE)


def plain(text: str) -> str:
    """The answer with dressing removed: text commands unwrapped, spaces single, thousands joined, signs in ASCII."""
    text = text.translate(_UNICODE)
    for character, (top, bottom) in _VULGAR.items():
        if character in text:
            text = text.replace(character, rf"\frac{{{top}}}{{{bottom}}}")
    text = _TEXT.sub(r" \1 ", text)
    text = _DRESS.sub(" ", text.strip())
    text = _OVER.sub(lambda m: rf"\frac{{{m[1] or m[3]}}}{{{m[2] or m[4]}}}", text)
    text = _BRACED_QUOTIENT.sub(r"\1/\2", text)
    text = _THIN_SPACE.sub("", text)
    text = _SPACE.sub(" ", text)
    text = _DEGREE.sub(" ", text)
    text = _UNIT_POWER.sub(r"\1", text)
    text = _ATTACHED_DIGITS.sub(" unit ", text) if any(c.isalpha() for c in text) else text
    text = _NEGATIVE_WORD.sub("-", text)
    text = _DOLLARS_AND_CENTS.sub(lambda m: f"{m[1]}.{int(m[2]):02} dollars", text)
    text = text.strip()
    text = text[1:-1] if len(text) > 2 and text[0] == text[-1] == "*" else text
    return text.strip().lstrip("~").strip().strip("_").removesuffix("\\$").strip("$").strip()


def is_digit(character: str) -> bool:
    """Whether a character is a digit or a fraction in one character."""
    return character.isdigit() or character in _VULGAR


def _value(match: re.Match[str]) -> Fraction | None:
    """The signed value of a match of `NUMBER`; None for a zero denominator, two signs or an absurd exponent."""
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
        below = (group["bottom"] or group["bottom1"]).strip()
        bottom = _decimal(below.lstrip("+-")) * (-1 if below[0] == "-" else 1)
        if bottom == 0 or (group["whole"] and (top[0] in "+-" or below[0] in "+-")):
            return None
        magnitude = _decimal(top.lstrip("+-")) / bottom
        value = int(group["whole"] or 0) + (-magnitude if top[0] == "-" else magnitude)
    return -value if signs == ["-"] else value


def _decimal(text: str) -> Fraction:
    digits = re.sub(r"[,' ]", "", text)
    if digits.count(".") > 1:
        digits = digits.replace(".", "")
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
