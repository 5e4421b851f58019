"""Reading a multiple-choice answer: exactly one option letter, however it is dressed.

The article "A" is the trap: in "A cat" it is no answer, in "A." and "(A) a cat" it is.
"""

from __future__ import annotations

import re

from reward.latex import unwrapped

_DRESS = re.compile(
    r"\\(?:left|right|[bB]ig{1,2}[lr]?|displaystyle|bf|rm|it|[Ll]arge|LARGE|[Hh]uge|boldsymbol|underline|checkmark)(?![A-Za-z])"
    r"|\\(?:text)?color\s*\{[^{}]*\}|[*$`\"“”!✓✔✅]|\\[(){}\[\],;:! ]|~|\\\\?$|(?<![A-Za-z])['‘]|['’](?![A-Za-z])"
)
_FULL_WIDTH = {0xFEE0 + code: chr(code) for code in range(0x21, 0x7F)}
_FONT = re.compile(
    r"\\(?:emph|text(?:bf|it|rm|normal|sf)?|math(?:rm|bf|it|sf|bb|cal)|mbox|boldsymbol|operatorname)\s*(?=\{)"
)
_PREFIX = re.compile(
    r"^(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|option|choice)\s*(?:is)?\s*:?\s*(?:option|choice)?\s*"
    r"(?=[A-Za-z(\[])",
    re.I,
)
_SUFFIX = re.compile(
    r"\s+is\s+(?:the\s+)?(?:correct|right|true|best|answer|correct\s+(?:answer|option|choice))\.?$", re.I
)
_ALONE = re.compile(r"[(\[{]?\s*([A-Za-z])\s*[)\]}]?\s*[.:,;]*")
_LABELLED = re.compile(r"(?:[(\[{]\s*([A-Z])\s*[)\]}]|([A-Z])\s*[.:)\]])\s*[.:,-]?\s+(.*)", re.DOTALL)
_ANOTHER = re.compile(
    r"[(\[]\s*[A-Z]\s*[)\]]|(?:^|\s)[A-Z]\s*[.:)](?=\s|$)|(?:^|[\s,;/&])(?:and|or|,|/|;|&)\s*[A-Z](?![A-Za-z])", re.M
)

_TAKEN_BACK = re.compile(  # behind a label: a denial, another letter, or nothing but a letter
    r"\b(?:not|no|wrong|incorrect|false|actually|instead|but|vs)\b|n't\b"
    r"|(?:\b(?:answer|option|choice|choose|is)\b|;)\W*[A-D](?![A-Za-z])|^\W*[A-Za-z]\W*$",
    re.IGNORECASE,
)


def read_choice(content: str) -> str | None:
    """The one option letter that `content` states, upper case; else None. B: "B", "(b)", "B.", "B) 5 m", "option B"."""
    text = _FONT.sub(r"\\text", content.translate(_FULL_WIDTH).replace("\\{", "(").replace("\\}", ")"))
    text, _ = unwrapped(_DRESS.sub(" ", text))
    text = _SUFFIX.sub("", _PREFIX.sub("", " ".join(text.split()))).strip()
    while text.startswith("{") and text.endswith("}"):
        text = text[1:-1].strip()
    if match := _ALONE.fullmatch(text):
        return match[1].upper()
    match = _LABELLED.fullmatch(text)
    if match is None or match[3][:1] in tuple("+-^_!*/=<>"):
        return None
    other = _ANOTHER.search(match[3]) or _TAKEN_BACK.search(match[3])
    return None if other else match[1] or match[2]
