"""The answer rules of the reference implementation's own evaluation (METHOD §8, `evaluation.protocol: reference`).

They are wider than this project's in some places (a number without a box counts) and narrower in others (two spellings
of one formula differ), and exist to compare with published numbers. Training never uses them. The text that they are
meant for is a response's whole decoded text, the proxy tokens of its latent steps included.

    >>> ReferenceNumber().grade("12 48</think>#### 1,234", "1234")
    Grade(reward=1.0, reason='correct', parsed='1,234')
    >>> ReferenceChoice().grade("so B, not C", "C")
    Grade(reward=1.0, reason='correct', parsed='C')

All of it is linear in the text and needs no computer algebra.
"""

from __future__ import annotations

import re

from latent_grpo.reward.extraction import extract
from latent_grpo.reward.verifier import Grade

TOLERANCE = 1e-5  # between two numbers, absolute
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?|-?\d*\.?\d+")
_FRACTION = re.compile(r"\\frac\{([+-]?\d+(?:\.\d+)?)\}\{([+-]?\d+(?:\.\d+)?)\}")
_QUOTIENT = re.compile(r"(-?(?:0|[1-9]\d*))/(-?(?:0|[1-9]\d*))")
_INTEGER = re.compile(r"[+-]?\d+")
_BOXED_LETTER = re.compile(r"\(?([A-Da-d])\)?\.?")
_LETTER = re.compile(r"\b[A-D]\b")
_DROPPED = ("\n", r"\!", r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$", r"\%")


class ReferenceNumber:
    """`reference_number`, for the low tasks: the last box, else what follows the last `####`, else the last number.

    Right is the same text (:func:`plain_form`, without commas) or a number within 1e-5. A gold answer may itself hold a
    box or `####`.
    """

    def grade(self, response_text: str, gold: str) -> Grade:
        """The verdict on a response."""
        answer = _low_answer(response_text)
        if not answer:
            return _NO_ANSWER
        wanted = _low_answer(gold) if "####" in gold or "boxed" in gold else gold
        given, right = (plain_form(text.replace(",", "")) for text in (answer, wanted))
        value, expected = _value(given), _value(right)
        close = value is not None and expected is not None and abs(value - expected) <= TOLERANCE
        return _verdict(given == right or close, answer)


class ReferenceMath:
    """`reference_math`, for MATH-500 and AIME: the last box is the same text as the gold answer, or the same integer.

    The texts are compared in :func:`plain_form`, as the authors of MATH do it, so `x+1` is not `1+x`.
    """

    def grade(self, response_text: str, gold: str) -> Grade:
        """The verdict on a response."""
        answer = extract(response_text).content
        if answer is None:
            return _NO_ANSWER
        given, right = plain_form(answer), plain_form(gold)
        integers = all(_INTEGER.fullmatch(text) for text in (given, right))
        return _verdict(given == right or (integers and int(given) == int(right)), answer)


class ReferenceChoice:
    """`reference_choice`, for GPQA: the letter in the last box, else the last letter A-D that stands alone."""

    def grade(self, response_text: str, gold: str) -> Grade:
        """The verdict on a response."""
        if boxed := _BOXED_LETTER.fullmatch(extract(response_text).content or ""):
            letter = boxed[1].upper()
        elif alone := _LETTER.findall(response_text):
            letter = alone[-1]
        else:
            return _NO_ANSWER
        return _verdict(letter == gold.strip().upper(), letter)


_NO_ANSWER = Grade(0.0, "no_answer")


def _verdict(correct: bool, parsed: str) -> Grade:
    return Grade(1.0, "correct", parsed) if correct else Grade(0.0, "wrong", parsed)


def _low_answer(text: str) -> str:
    """The answer of :class:`ReferenceNumber`; empty where the text has none."""
    answer = extract(text).content or (text.rpartition("####")[2].strip() if "####" in text else "")
    if not answer:
        numbers = _NUMBER.findall(text)
        answer = numbers[-1] if numbers else ""
    answer = answer.strip().strip("$ ").removeprefix(":")
    return answer[:-1] if answer.endswith((".", "/")) else answer


def _value(text: str) -> float | None:
    """The number that a text in :func:`plain_form` is, a fraction included; None for any other text."""
    try:
        if fraction := _FRACTION.fullmatch(text):
            return float(fraction[1]) / float(fraction[2])
        return float(text)
    except (ValueError, ZeroDivisionError):
        return None


def plain_form(text: str) -> str:
    """The spelling in which the authors of MATH compare answers: no dressing, units or spaces, one kind of fraction.

    >>> plain_form(r"x = \\dfrac12"), plain_form("1/2"), plain_form("0.5 "), plain_form(r"9\\text{ cm}")
    ('\\\\frac{1}{2}', '\\\\frac{1}{2}', '\\\\frac{1}{2}', '9')
    """
    text = text.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    for dressing in _DROPPED:
        text = text.replace(dressing, "")
    text = text.partition(r"\text{ ")[0]  # a unit on the right
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        text = value
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([^{])(?=\{)", r"\\frac{\1}", text)
    if text == "0.5":
        return r"\frac{1}{2}"
    quotient = _QUOTIENT.fullmatch(text)
    return rf"\frac{{{quotient[1]}}}{{{quotient[2]}}}" if quotient else text
