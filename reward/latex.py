"""Normalising LaTeX answers, and cutting them at their top level.

Purely textual, no algebra: what is dressing (sizes, fonts, spacing, currency, degrees, units) goes, what math-verify
does not read (`√5`, `\\lbrace`, `1\\,234`, `0.\\overline{3}`) is spelled in a way that it does. Every pattern is
linear in the text, which `reward.extraction` has already bounded.
"""

from __future__ import annotations

import re

_UNICODE = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "－": "-", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "％": "\\%",
        "，": ",", "；": ";", "（": "(", "）": ")", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/",
        "π": "\\pi ", "∞": "\\infty ",
        "°": "^\\circ ", "º": "^\\circ ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∪": "\\cup ", "∩": "\\cap ",
        "∈": "\\in ", "±": "\\pm ", "∅": "\\emptyset ", "ℝ": "\\mathbb{R}", "θ": "\\theta ", "≈": " ", "’": "'",
        "⁄": "/", "∖": "\\setminus ", "…": "\\ldots ", "∨": "\\lor ", "∧": "\\land ",
        "²": "^{2}", "³": "^{3}", "⁴": "^{4}", "½": "\\frac{1}{2}", "⅓": "\\frac{1}{3}",
        "⅔": "\\frac{2}{3}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}",
    }
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)  # fmt: skip

_CURRENCY_SIGNS = "€£¥₹₩₽₪₫฿¢"
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|biggl?|biggr|Biggl?|Biggr|middle)(?![A-Za-z])\.?", ""),
        (r"\\(?:displaystyle|textstyle|scriptstyle|limits|bf|rm|it)(?![A-Za-z])", " "),
        (r"\\(?:lbrace|lcurly)(?![A-Za-z])", r"\\{"),
        (r"\\(?:rbrace|rcurly)(?![A-Za-z])", r"\\}"),
        (r"\\lbrack(?![A-Za-z])", "["),
        (r"\\rbrack(?![A-Za-z])", "]"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\{\s*([^{}\\]*)\\choose(?![A-Za-z])\s*([^{}\\]*)\}", r"\\binom{\1}{\2}"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*([0-9])\s*([0-9A-Za-z])(?![A-Za-z])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([0-9])\s*(?=\{)", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
        (r"\\[hv]?phantom\s*(?:\{[^{}]*\}|-)", ""),
        (r"\\frac\s*(\\[a-z]+)\s*([0-9A-Za-z])(?![A-Za-z])", r"\\frac{\1}{\2}"),
        (r"\\leq?(?:slant)?(?![A-Za-z])|<=", r"\\le "),
        (r"\\geq?(?:slant)?(?![A-Za-z])|>=", r"\\ge "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\colon(?![A-Za-z])|\{\s*:\s*\}", ":"),
        (r"\\math(?:rm|it)\s*\{\s*([ied])\s*\}", r"\1"),
        (r"\\(?:text)?color\s*\{[^{}]*\}(?!\s*\{)", " "),
        (r"\\\\\[-?[0-9.]+\s*(?:pt|em|ex|mm|cm|in)\]", r"\\\\"),
        (r"\\lg(?![A-Za-z])", r"\\log_{10}"),
        (r"\\sqrt\s*\[\s*([3579])\s*\]\s*\{\s*-\s*([0-9A-Za-z.]+)\s*\}", r"(-\\sqrt[\1]{\2})"),  # the real root
        (r"\\log\s*_\s*\{?\s*e\s*\}?", r"\\ln "),
        (r"∛\s*", r"\\sqrt[3]"),
        (r"∜\s*", r"\\sqrt[4]"),
        (r"(\\sqrt\[[34]\])([0-9]+|[A-Za-z])", r"\1{\2}"),
        (r"(\\sqrt\[[34]\])\(([^()]*)\)", r"\1{\2}"),
        (r"\\(?:math(?:bf|it|sf|tt|normal)|boldsymbol|bm|ensuremath)\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1 "),
        (r"\\(?:mathrm|emph|text(?:bf|it|rm|normal|sf|tt)?|mbox|hbox|operatorname)\s*(?=\{)", r"\\text"),
        (r"\{\s*,\s*\}", ","),
        (r"(?<=[0-9])\\[,!;: ]\s*(?=[0-9]{3}(?![0-9]))", ""),
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s+", " "),
        (r"(?<!\\)\\[()\[\]]|\*\*(?=[^*]*\*\*$)|(?<=[^*])\*\*$", " "),
        (r"\\(?:euro|pounds|pound|yen|textdollar|texteuro|textsterling)(?![A-Za-z])(?:\{\})?", " "),
        (rf"\\?\$|[{_CURRENCY_SIGNS}]", " "),
        (r"\b(?:USD|EUR|GBP|CNY|RMB|INR|Rs\.?)(?![A-Za-z])", " "),
        (r"\\(?:approx|sim|simeq)(?![A-Za-z])", " "),
        (r"(?<=[0-9A-Za-z)}])\s*\*\*\s*(?=[-0-9A-Za-z({])", "^"),
        (r"\\(?:underline|textcolor\s*\{\w+\}|color\s*\{\w+\})\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:checkmark|square|blacksquare)(?![A-Za-z])|✓|✅", " "),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"√\s*\{", r"\\sqrt{"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*([0-9]+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"(?<![A-Za-z\\])sqrt\s*(?=\{)", r"\\sqrt"),
        (r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![A-Za-z\\])(?:pi|Pi)(?![A-Za-z])", r"\\pi "),
        (r"(?<![A-Za-z\\])(?:infty|infinity|inf)(?![A-Za-z])", r"\\infty "),
        (r"\\text\{[\s,]*(and|or)[\s,]*\}", r" , \1 "),
        (r"\\l?or(?![A-Za-z])", " or "),
        (r"\\l?and(?![A-Za-z])", " and "),
        (r"\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(?:Reals?|R)(?![A-Za-z])|\\text(?:bb)?\{R\}|\\mathbb\s*R(?![A-Za-z])", r"\\mathbb{R}"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degrees?(?![A-Za-z])", r"^\\circ "),
        (r"\^\\circ\s*(?:\\text\{\s*[CF]\s*\}|[CF](?![A-Za-z]))\s*$", r"^\\circ "),
        (r"^\s*=\s*(?!=)", ""),
    )
)
_REPEATING = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*\{([0-9]+)\}")
_ENDLESS = re.compile(
    r"(?<![0-9.])([0-9]{0,20})\.([0-9]{0,20}?)([0-9]{1,6}?)\3{2,6}(?:\.\.\.+|\\[lc]?dots(?![A-Za-z]))\s*$"
)
_LEFT_OUT = re.compile(r"(?<=[0-9)}\],])\s*\.{2,}\s*$")  # `5...`
_SCALE = re.compile(r"(?<=[0-9])\s*(\\text\{\s*)?(hundred|thousand|million|billion|trillion)s?(?![A-Za-z])\s*")
_ZEROS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_TRIGONOMETRIC = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)")
_DEGREES = re.compile(r"(?<![0-9.])([0-9]+(?:\.[0-9]+)?)\s*\^\\circ ")
_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])")
_UNIT_POWER = r"(?:\s*\^\s*(?:\{\s*-?[0-9]\s*\}|-?[0-9]))?"
# A text command behind a value is its unit unless it says more: a digit, an alternative, a scale, a denial.
_NO_UNIT = (
    r"\b(?:or|nor|not|and|either|neither|if|when|than|least|most|base|mod|dozen|maybe|perhaps|wrong|false|incorrect|"
    r"squared|cubed|factorial|times|plus|minus|halves|thirds|fourths|fifths|sixths|eighths|tenths|hundredths|thousandths|"
    r"lakhs?|crores?|no|wait|actually|pi|sqrt|point(?=\s+[a-z]))\b"
)
_NO_UNIT_LETTER = r"\s*(?![mgshlLWVNJCFKA])[A-Za-z]\s*\}"  # `5\text{i}` is a product
_UNIT_TEXT = rf"\\text\{{(?!{_NO_UNIT_LETTER})(?![^{{}}]*(?:[0-9]|{_NO_UNIT}))[^{{}}]*\}}{_UNIT_POWER}"
_TRAILING_TEXT = re.compile(
    rf"(?:\\frac\s*\{{\s*{_UNIT_TEXT}\s*\}}\s*\{{\s*{_UNIT_TEXT}\s*\}}|{_UNIT_TEXT}(?:\s*(?:/|\\cdot)\s*{_UNIT_TEXT})*)\s*$"
)
_UNIT = (
    r"(?:square|sq|cubic|cu)?\.?\s*(?:units?|inch(?:es)?|in|feet|foot|ft|yards?|yd|miles?|mi|mph|kilomet(?:er|re)s?|km|met(?:er|re)s?|"
    r"centimet(?:er|re)s?|cm|millimet(?:er|re)s?|mm|grams?|kilograms?|kg|mg|pounds?|lbs?|ounces?|oz|lit(?:er|re)s?|ml|gallons?|"
    r"seconds?|secs?|minutes?|mins?|hours?|hrs?|days?|weeks?|months?|years?|yrs?|degrees?|deg|radians?|rad|dollars?|cents?|euros?|"
    r"rupees?|percent|points?|people|students?|ways?)"
)
_TRAILING_UNIT = re.compile(
    rf"(?<=[0-9}})\s])\s*{_UNIT}(?:\s*(?:per|/)\s*[a-z]+)?\s*(?:\^\s*\{{?\s*[0-9]\s*\}}?)?\s*\.?$"
)
_TRAILING_WORDS = re.compile(
    rf"(?<=[0-9}})])\s+(?!(?:sin|cos|tan|log|exp|mod|sqrt|and)\b)(?![^0-9]*{_NO_UNIT})[A-Za-z]{{3,}}\.?(?:\s+[A-Za-z]+\.?)*$"
)
_SINGLE_LETTER_UNIT = re.compile(
    rf"(?<=[0-9}}])\s+[mgshLVWJN]{_UNIT_POWER}(?:\s*/\s*(?:[smhL]|sec|min|hr|cm|kg){_UNIT_POWER})?$"
)
_MIXED = re.compile(r"(?<![0-9.}\w)])([0-9]+)\s*\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_TOKEN = re.compile(
    r"\\begin\s*\{[^{}]*\}|\\end\s*\{[^{}]*\}|\\[A-Za-z]+|\\.|[()\[\]{},;=<>!:]|(?<=\s)(?:and|or)(?=\s)"
)
_OPENING = {"(", "[", "{", "\\{"}
_CLOSING = {")", "]", "}", "\\}"}


def normalise(text: str) -> str:
    """One spelling for many: the same answer with its dressing removed, ready to be cut and parsed."""
    text = text.translate(_UNICODE)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _REPEATING.sub(_repeating_decimal, _ENDLESS.sub(r"\1.\2\\overline{\3}", text))
    text = _SCALE.sub(lambda match: rf" \times 10^{{{_ZEROS[match[2]]}}} {match[1] or ''}", text)
    if _TRIGONOMETRIC.search(text):
        text = _DEGREES.sub(r"(\\frac{\1 \\pi}{180})", text)
    text = _LEFT_OUT.sub(r"\\ldots ", text.replace("^\\circ", ""))
    text = _join_thousands(text)
    return re.sub(r"\s+", " ", text).rstrip(" .,;:").strip()


def without_units(text: str) -> str:
    """A single value without the unit after it: `\\text{...}`, a known unit, or words after a number."""
    for pattern in (_TRAILING_TEXT, _TRAILING_UNIT, _TRAILING_WORDS, _SINGLE_LETTER_UNIT):
        shorter = pattern.sub("", text).rstrip(" .,;")
        if shorter[-1:] in ("_", "^", "=", "+", "-", "/", "*", "<", ">"):
            continue  # what follows is a part of the value
        if shorter != text and re.search(r"[0-9]|\\(?:pi|sqrt|frac)|[a-z]$", shorter):
            return shorter
    return text


def says_more_than_a_unit(text: str) -> bool:
    """Whether words beside a value change it or offer another: "or", "not", "squared", "dozen"."""
    return re.search(_NO_UNIT, text) is not None


def with_mixed_numbers(text: str) -> str:
    """`2\\frac{1}{2}` spelled as a sum: LaTeX parsers differ over whether it is a product."""
    return _MIXED.sub(r"(\1+\\frac{\2}{\3})", text)


def unwrapped(text: str) -> tuple[str, bool]:
    """The text with `\\text{...}` replaced by its content, and whether there was any."""
    plain, count = re.subn(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    return re.sub(r"\s+", " ", plain).strip(), count > 0


def split_top_level(text: str, separators: frozenset[str]) -> list[str]:
    """The parts between separators that stand outside every bracket and environment; blank parts are dropped."""
    parts, start = [], 0
    for match in _top_level_tokens(text):
        if match.group() in separators:
            parts.append(text[start : match.start()])
            start = match.end()
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def enclosing_brackets(text: str) -> tuple[str, str, str] | None:
    """(opening, inside, closing) when one pair of brackets encloses the whole text; `(1,2]` is such a pair too."""
    first = next((o for o in ("\\{", "(", "[") if text.startswith(o)), None)
    last = next((c for c in ("\\}", ")", "]") if text.endswith(c)), None)
    if first is None or last is None or len(text) < len(first) + len(last):
        return None
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0:
            return (first, text[len(first) : -len(last)], last) if match.end() == len(text) else None
    return None


def matrix_rows(text: str) -> list[list[str]] | None:
    """The entries of a text that is one matrix environment, row by row; None for anything else and for determinants."""
    brackets = enclosing_brackets(text)
    if brackets is not None and brackets[0] in ("(", "["):
        text = brackets[1].strip()
    match = re.fullmatch(r"\\begin\{([pb]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", text, re.DOTALL)
    if match is None or "\\begin" in match.group(2):
        return None
    rows = [[cell.strip() for cell in row.split("&")] for row in re.split(r"\\\\", match.group(2)) if row.strip()]
    return rows if rows and all(len(row) == len(rows[0]) and all(row) for row in rows) else None


def ungrouped(text: str) -> str:
    """The text without braces that enclose all of it and only group."""
    text = text.strip()
    while text.startswith("{") and text.endswith("}") and _closes_at_end(text):
        text = text[1:-1].strip()
    return text


def _closes_at_end(text: str) -> bool:
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.end() == len(text)
    return False


def bracket_depth(text: str) -> int:
    """The deepest nesting of brackets of any kind."""
    depth = deepest = 0
    for match in re.finditer(r"[()\[\]{}]", text):
        depth += 1 if match.group() in "([{" else -1
        deepest = max(deepest, depth)
    return deepest


def _top_level_tokens(text: str) -> list[re.Match[str]]:
    tokens, depth = [], 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in _OPENING or token.startswith("\\begin"):
            depth += 1
        elif token in _CLOSING or token.startswith("\\end"):
            depth -= 1
        elif depth == 0:
            tokens.append(match)
    return tokens


def _join_thousands(text: str) -> str:
    """`1,234` as one number, except inside brackets, where it is a pair."""
    pieces, end = [], 0
    for match in _THOUSANDS.finditer(text):
        before = re.sub(r"\\frac\s*\{|\\sqrt\s*\{", "", text[: match.start()])
        depth = len(re.findall(r"[(\[]|\\\{", before)) - len(re.findall(r"[)\]]|\\\}", before))
        if depth == 0:
            pieces += [text[end : match.start()], match.group().replace(",", "")]
            end = match.end()
    return "".join([*pieces, text[end:]])


def _repeating_decimal(match: re.Match[str]) -> str:
    whole, fixed, repeated = match.group(1) or "0", match.group(2), match.group(3)
    top = int(whole + fixed + repeated) - int(whole + fixed)
    return rf"\frac{{{top}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"
