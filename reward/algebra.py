"""The algebra under the `math` grader: math-verify and SymPy, for single values that spelling alone cannot decide.

Importing this module costs about a second, and a call may run for ever or take all memory (power towers, huge
factorials): that is why graders run in processes that can be killed. math-verify's own time limits use SIGALRM,
which works in no thread but the main one; they are off.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import math_verify
import sympy
from latex2sympy2_extended import NormalizationConfig

from latent_grpo.reward.numbers import ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE

# math-verify warns once that its time limits are off; here that is intended.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_DIGITS = 50
_SAME = sympy.Rational(1, 10**35)  # relative; with 50 digits, constants that agree this well are the same number
_CLOSE = sympy.Rational(1, 10**20)
_TINY = sympy.Rational(1, 10**15)
_ENDLESS = (sympy.oo, -sympy.oo, sympy.nan, sympy.zoo)
_ROUNDING = sympy.Rational(1, 10**6)
_SIX_PLACES = sympy.Rational(1, 2 * 10**6)
_RELATIVE, _ABSOLUTE = (sympy.Rational(t.numerator, t.denominator) for t in (RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE))
_SAMPLE_POINTS = tuple(sympy.Rational(*pair) for pair in ((1237, 719), (2591, 1103), (353, 811), (4057, 2203)))

_EXTRACTION = [
    math_verify.LatexExtractionConfig(
        try_extract_without_anchor=False,
        boxed_match_priority=0,
        # Units are removed by `reward.latex`: math-verify would also take the letters t, h, c, d, g, l, m, o, s for
        # units.
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
        ),
    )
]


class Unreadable(ValueError):
    """An answer that math-verify cannot read, or that SymPy cannot evaluate."""


def equal(gold: str, given: str) -> bool:
    """Whether two normalised answers, one value or relation each, are equal. Raises Unreadable if one means nothing."""
    gold_value, given_value = parse_gold(gold), parse(given)
    try:
        decided = _equal_constants(gold_value, given_value)
        if decided is None:
            decided = _equal_formulas(gold_value, given_value)
    except MemoryError:
        raise
    except Exception as error:  # SymPy raises nearly every type on meaningless input
        raise Unreadable(f"SymPy cannot compare the answers ({type(error).__name__}: {error})") from error
    if decided is None:
        decided = math_verify.verify(
            gold_value, given_value, strict=True, allow_set_relation_comp=True, timeout_seconds=None
        )
    return decided


@lru_cache(maxsize=2048)
def parse(latex: str) -> sympy.Basic:
    """The SymPy object of one normalised answer. Raises Unreadable."""
    try:
        parsed = math_verify.parse(
            rf"\boxed{{{latex}}}",
            extraction_config=_EXTRACTION,
            fallback_mode="no_fallback",
            extraction_mode="first_match",  # else an unreadable answer would be searched for a fraction to take instead
            parsing_timeout=None,
        )
        if not parsed or isinstance(parsed[0], str):
            raise Unreadable(f"math-verify cannot read {latex[:200]!r}")
        value = parsed[0]
        # Without a hint such as `\mathbb{C}` math-verify reads the i of 2+3i as a variable, for which i^2 = -1 does
        # not hold.
        imaginary = [symbol for symbol in getattr(value, "free_symbols", ()) if symbol.name == "i"]
        return value.xreplace(dict.fromkeys(imaginary, sympy.I)) if imaginary else value
    except (MemoryError, Unreadable):
        raise
    except Exception as error:  # SymPy raises nearly every type on meaningless input
        raise Unreadable(f"{latex[:200]!r} means nothing ({type(error).__name__}: {error})") from error


@lru_cache(maxsize=8192)
def parse_gold(latex: str) -> sympy.Basic:
    """:func:`parse` of a gold, in a cache of its own: golds come back, most responses do not. Raises Unreadable."""
    return parse.__wrapped__(latex)


def _equal_constants(gold: sympy.Basic, given: sympy.Basic) -> bool | None:
    """Verdict on two constants; None when one of them is not a constant.

    math-verify rounds to six decimals and chops small differences to zero, so that 1/2006! equals 1/2004! for it. Here
    exact constants are compared exactly or relatively, and only decimals have the tolerance of `reward.numbers`.
    """
    if not (_is_constant(gold) and _is_constant(given)):
        return None
    gold, given = gold.doit(), given.doit()
    if gold == given:
        return gold not in (sympy.nan, sympy.zoo)
    if gold.is_Rational and given.is_Rational:
        return False
    if gold.has(*_ENDLESS) or given.has(*_ENDLESS):
        return False
    if not (gold.has(sympy.Float) or given.has(sympy.Float)):
        return _equal_exact(gold, given)
    difference = sympy.N(sympy.Abs(sympy.N(gold, _DIGITS) - sympy.N(given, _DIGITS)), _DIGITS)
    size = sympy.N(sympy.Abs(gold), _DIGITS)
    if not (_is_decimal(difference) and _is_decimal(size)):
        return None
    # Against a whole gold only the rounding of decimals in a formula is forgiven, never a step of one.
    if gold.is_Integer:
        tolerance = min(size / 10**12, _ROUNDING)
    elif gold.has(sympy.Float) or gold.is_Rational:
        tolerance = min(size * _RELATIVE, _ABSOLUTE)
    else:  # an exact root or multiple of pi: six places, and as many digits in large numbers
        tolerance = min(_SIX_PLACES * max(size, 1), size / 10**4, _ABSOLUTE)
    return bool(difference <= tolerance)


def _equal_exact(gold: sympy.Basic, given: sympy.Basic) -> bool | None:
    """Whether two constants without decimals are the same number; None when SymPy cannot evaluate them.

    Rational ones are compared exactly. The digits of others decide only where the difference is clear: not near zero,
    and not where a step of one is small beside the value.
    """
    if gold.is_Rational and given.is_Rational:
        return gold == given
    difference, size = (sympy.N(sympy.Abs(sympy.N(value, _DIGITS)), _DIGITS) for value in (gold - given, gold))
    if not (_is_decimal(difference) and _is_decimal(size)):
        return None
    if size >= _TINY:
        if difference > size * _SAME:
            return False
        if difference <= _CLOSE:
            return True
    return bool(sympy.simplify(gold - given) == 0)


def _is_decimal(value: sympy.Basic) -> bool:
    return bool(value.is_Float or value.is_Integer)


def _equal_formulas(gold: sympy.Basic, given: sympy.Basic) -> bool | None:
    """Verdict on two expressions in variables from their values at sample points; None when these do not decide.

    Much cheaper than `simplify`, above all where the answers differ. Points of both signs must agree: |x| is not x.
    """
    symbols = gold.free_symbols | given.free_symbols
    if not symbols or not (isinstance(gold, sympy.Expr) and isinstance(given, sympy.Expr)) or gold.has(sympy.Float):
        return None
    if given.has(sympy.Float) or sympy.S.ImaginaryUnit in symbols or len(symbols) > 8:
        return None
    ordered = sorted(symbols, key=lambda symbol: symbol.name)
    agree = []
    for sign in (1, -1):
        for shift in (0, 1):
            point = {
                symbol: sign * (_SAMPLE_POINTS[(index + shift) % 4] + index) for index, symbol in enumerate(ordered)
            }
            try:
                same = _equal_exact(gold.subs(point).doit(), given.subs(point).doit())
            except (ArithmeticError, AttributeError, TypeError, ValueError, NotImplementedError):
                return None
            if same is None:
                return None
            agree.append(same)
        if sign == 1 and not all(agree):
            return False
    return True if all(agree) else None


def _is_constant(value: sympy.Basic) -> bool:
    return isinstance(value, sympy.Expr) and not value.free_symbols and value.is_number is not False
