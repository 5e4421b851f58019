"""Reading a multiple-choice answer: exactly one option letter, however it is dressed.

The article "A" is the trap: in "A cat" it is no answer, in "A." and "(A) a cat" it is.
"""

from __future__ import annotations

import re

from latent_grpo.reward.latex import unwrapped

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

_LETTER = r"(?:(?i:option|choice)\s+)?(?:[(\[]\s*[A-Z]\s*[)\]]|[A-Z](?![A-Za-z]))"
_NOT_OTHERS = rf"(?i:not)\s+{_LETTER}(?:(?:\s*,\s*{_LETTER})*\s*,?\s+(?i:or|nor)\s+{_LETTER})?"  # "not A, C or D"
_APART = r"(?:\s*[,;]\s*(?i:(?:and|but)\s+)?|\s+(?i:and|but)\s+)"
_DENIES_OTHERS = re.compile(rf"(?:{_APART}{_NOT_OTHERS}|\s*\(\s*{_NOT_OTHERS}\s*\))\s*\.?$")  # B, not C
_OTHERS_ARE_WRONG = re.compile(  # behind "B is correct"
    rf"(?:{_APART}|\.\s+){_LETTER}(?:(?:\s*,\s*{_LETTER})*\s*,?\s+(?i:and)\s+{_LETTER})?"
    r"\s+(?i:(?:is|are)(?:\s+not|n't)(?:\s+(?:correct|right|true))?|(?:is|are)\s+(?:wrong|incorrect|false))\s*\.?$"
)

_MAX_DENYING_CHARS = 200  # a letter and denials alone; searching for them is quadratic in the text


def read_choice(content: str) -> str | None:
    """The one option letter that `content` states, upper case; else None. B: "B", "(b)", "B.", "B) 5 m", "option B"."""
    text = _FONT.sub(r"\\text", content.translate(_FULL_WIDTH).replace("\\{", "(").replace("\\}", ")"))
    text, _ = unwrapped(_DRESS.sub(" ", text))
    text, denied = _without_denied(" ".join(text.split()))
    text = _SUFFIX.sub("", _PREFIX.sub("", text)).strip()
    while text.startswith("{") and text.endswith("}"):
        text = text[1:-1].strip()
    if match := _ALONE.fullmatch(text):
        letter = match[1].upper()
        return None if letter in denied else letter
    if denied:
        return None  # with the option's text, a denial may belong to it
    match = _LABELLED.fullmatch(text)
    if match is None or match[3][:1] in tuple("+-^_!*/=<>"):
        return None
    other = _ANOTHER.search(match[3]) or _TAKEN_BACK.search(match[3])
    return None if other else match[1] or match[2]


def _without_denied(text: str) -> tuple[str, set[str]]:
    """A text without the other letters that it denies at its end, and these letters."""
    denied: set[str] = set()
    if len(text) > _MAX_DENYING_CHARS:
        return text, denied
    while (match := _DENIES_OTHERS.search(text)) or (match := _OTHERS_ARE_WRONG.search(text)):
        head = text[: match.start()]
        if match.re is _OTHERS_ARE_WRONG and not _SUFFIX.search(head):
            break
        text, denied = head, denied | set(re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", match.group()))
    return text, denied
