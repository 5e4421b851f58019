r"""What the left side of `... = 5` says of the value on the right. Purely textual, linear in the text.

`x = 5`, `\text{Total} = 5` and `2 + 3 = 5` state 5. `-x = 5`, `2x = 5`, `\sqrt{x} = 5` and `x + 1 = 5` state another
value and leave it to the reader.
"""

from __future__ import annotations

import re

from latent_grpo.reward.latex import unwrapped

DENIED = re.compile(r"!=|/=|=/|<>|≠|\\n(?:ot|eq?)(?![A-Za-z])")
"""An equation that is denied, however it is spelled."""

_GREEK = (
    r"\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|"
    r"varphi|chi|psi|omega|ell|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega)(?![A-Za-z])"
)
_INDEX = r"(?:\s*_\s*(?:\{[^{}]*\}|[0-9A-Za-z]|\\[a-z]+))?"
_NAME = re.compile(
    rf"(?:(?:[A-Za-z]|{_GREEK}|\\(?:bar|hat|vec)\s*(?:\{{\s*[A-Za-z]\s*\}}|[A-Za-z])){_INDEX}\s*'*"
    r"(?:\s*(?:\^\s*\{\s*-1\s*\}\s*)?\(\s*[A-Z0-9a-z, .-]*\))?"  # x, x_1, f(x), f^{-1}(3)
    r"|[A-Z]{2,6}|\[[A-Z]{3,6}\]|\|[A-Z]{2}\||\\overline\s*\{[A-Z]{2}\}"  # a segment, an area, a length
    r"|(?:m\s*)?\\(?:angle|triangle|measuredangle)\s*\{?[A-Z]{1,4}\}?"
    r"|[a-wA-W](?:\s*\+\s*[a-wA-W])+)"  # m + n, as problems ask for it; x + y is a condition on unknowns
)
_PRODUCT = re.compile(r"([A-Za-z])\s*\(.*\1")  # x(x-1)
_TEXT = re.compile(r"\\text\s*\{[^{}]*\}")
_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|hence|therefore|then|and|we|get|have|let|answer|solution|is|the|value|of|measure|length|area|final)"
    r"[\s:,.]+)+(?=\S)",
    re.IGNORECASE,
)
_WORDS = re.compile(r"[^\W\d_][^\W\d_,.'():%#/&+ -]*(?:[ ,.'():%#/&+-]+[^\W\d_]+)*[ .):%]*")
_OTHER_VALUE = re.compile(
    r"\b(?:no|not|never|neither|nor|or|without|except|cannot|minus|negative|half|third|quarter|twice|thrice|double|"
    r"triple|times|squared?|cubed?|roots?|sqrt|log|ln|exp|sin|cos|tan|abs|inverse|reciprocal|opposite|wrong|incorrect|"
    r"false|more|less|than|least|most|over|under|above|below)\b|n't\b",
    re.IGNORECASE,
)
_SHORT_WORDS = re.compile(r"an?|a[st]|by|do|for|he|i[nst]|m[ey]|o[fn]|so|to|us|we|I")
_SHORT_UNIT = re.compile(r"[kcm]m|ft|yd|mi|[km]g|lbs?|oz|m[lL]|hrs?|min|secs?|mph")
_LETTERS_OF_UNKNOWNS = frozenset("abcd"), frozenset("pqrstuvwxyz"), frozenset("klmn")
_ARITHMETIC = re.compile(
    r"\\(?:frac|sqrt|times|cdot|div|binom|log|ln|sin|cos|tan|gcd|max|min|lfloor|rfloor|lceil|rceil|pi|left|right|ast|"
    r"sum|prod|bmod|pmod|mod|cot|sec|csc|exp|overline)(?![A-Za-z])|(?<![A-Za-z])(?:gcd|lcm|max|min)(?=\s*\()"
    r"|\b(?:half|twice)\s+(?:of\s+)?(?=[0-9])"
    r"|(?<=[0-9)\s])x(?=\s*[0-9($])"
)
_WITH_UNIT = re.compile(r"(?<=[0-9%)}])(?:\s*[-/]?\s*(?:per\s+|of\s+|a\s+)?[^\W\d_]{2,})+\.?")


def states_its_value(left: str) -> bool:
    """Whether the (normalised) left side of an equation is a bare name, words that name something, or arithmetic.

    Only then is the right side what the equation is about.
    """
    text = left.strip()
    if not text or _is_name(text):
        return True
    plain, _ = unwrapped(text)
    if not any(character.isdigit() for character in plain):
        if _OTHER_VALUE.search(plain):
            return False
        return _is_name(_LEAD_IN.sub("", plain, count=1)) or (
            _WORDS.fullmatch(plain) is not None and _are_words(_TEXT.sub(" ", text))
        )
    without_units = _WITH_UNIT.sub(_without_unit, _ARITHMETIC.sub(" ", plain))
    return re.search(r"[^\W\d_]", without_units) is None


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and not _PRODUCT.match(text)


def _without_unit(match: re.Match[str]) -> str:
    """Nothing for a unit behind a number; letters that may be a product, as in `2xy` and `2AB`, stay."""
    words = re.findall(r"[^\W\d_]+", match.group())
    return "" if all(_SHORT_UNIT.fullmatch(w) or (not w.isupper() and _are_words(w)) for w in words) else match.group()


def _are_words(text: str) -> bool:
    """Whether letters are words of a language and not products of variables such as `xy` or `abc`."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])'s?(?![a-z])", "", text))
    return all(
        _SHORT_WORDS.fullmatch(word)
        or (len(word) > 1 and (word.isupper() or (len(word) > 2 and not _is_product(word))))
        for word in words
    )


def _is_product(word: str) -> bool:
    return any(frozenset(word.lower()) <= letters for letters in _LETTERS_OF_UNKNOWNS)
