"""Grading one response against one gold answer: the kinds `math`, `number` and `choice`.

    >>> grade("number", r"48 / 2 = 24 and 48 + 24 = 72, so \\boxed{72 \\text{ clips}}", "72")
    Grade(reward=1.0, reason='correct', parsed='72')

The rules are the same for all kinds. The last `\\boxed{}` counts; where there is a box, nothing outside it does; an
empty or malformed last box, or no box at all, is `no_answer` (unless the option `fallback="last_number"` is set, meant
for base models that do not box). Several values against one gold are wrong.

Grading is pure. `number` and `choice` take time linear in the text; `math` may call computer algebra, which can hang
or take all memory on hostile input, so calls that are not under your control belong in `reward.pool.VerifierPool`.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Literal

from latent_grpo.reward.choice import read_choice
from latent_grpo.reward.equations import DENIED, states_its_value
from latent_grpo.reward.extraction import Extraction, balanced, extract
from latent_grpo.reward.latex import normalise
from latent_grpo.reward.math_answers import (
    AlgebraicEquality,
    AlgebraNeeded,
    Answer,
    Sequence,
    read_answer,
    read_gold,
    same_answer,
)
from latent_grpo.reward.numbers import Number, read_number, same_number
from latent_grpo.reward.verifier import ANY_OF, Grade, UnreadableGoldError, Verifier, judged, load_verifier, settled

Fallback = Literal["none", "last_number"]
NO_GOLD = frozenset({"nan", "none", "null", "n/a"})
"""What programs write for a missing value. `math`, which reads words, does not read these as a gold: they stand where
an answer was lost (MATH's training split has two such rows). A word that is meant stands in `\\text{...}`."""


def grade(kind: str, response_text: str, gold: str, **options: Any) -> Grade:
    """The verdict of the verifier `kind` on one response. Pure, in this process, without any limit of time or memory.

    `options`, JSON values, go to the verifier's constructor (`fallback` for `math` and `number`). Raises
    UnknownVerifierError for an unknown kind, and UnreadableGoldError when a built-in kind cannot read `gold`.
    """
    verifier = _cached_verifier(kind, json.dumps(options, sort_keys=True))
    return judged(lambda one: settled(verifier.grade(response_text, one)), gold)


def gold_is_parsable(kind: str | Verifier, gold: str) -> bool:
    """Whether a verifier can grade against this gold answer. May import the computer algebra (about a second).

    Of several golds one suffices. A user's verifier without a `parses_gold` method accepts every gold.
    """
    verifier = _cached_verifier(kind, "{}") if isinstance(kind, str) else kind
    parses_gold = getattr(verifier, "parses_gold", None)
    return True if parses_gold is None else any(parses_gold(one) for one in gold.split(ANY_OF))


class BoxedVerifier:
    """What the built-in kinds share: extraction, the outcome `no_answer`, and a part that is safe without limits."""

    def __init__(self, fallback: Fallback = "none") -> None:
        if fallback not in ("none", "last_number"):
            raise ValueError(f"fallback is {fallback!r}; it must be 'none' or 'last_number'.")
        self._fallback = fallback

    def grade(self, response_text: str, gold: str) -> Grade:
        """The verdict; see the module. Raises UnreadableGoldError when `gold` cannot be read."""
        raise NotImplementedError

    def quick_grade(self, response_text: str, gold: str) -> Grade | None:
        """The verdict if linear time suffices for it, else None. Always equal to what `grade` would say."""
        return self.grade(response_text, gold)

    def parses_gold(self, gold: str) -> bool:
        """Whether `gold` can be graded against."""
        raise NotImplementedError

    def condensed(self, response_text: str) -> str:
        """The shortest text with the same verdict: the answer alone. Samples of a group then share one grading."""
        extraction = self._extract(response_text)
        if extraction.source == "none":
            return ""
        if extraction.content is None:
            return r"\boxed{}"
        return extraction.content if extraction.source == "last_number" else rf"\boxed{{{extraction.raw}}}"

    def _extract(self, response_text: str) -> Extraction:
        return extract(response_text, fallback=self._fallback)


class NumberVerifier(BoxedVerifier):
    """`number`: word problems with one number as the gold (GSM8K and its like); words and units may stand round it."""

    def grade(self, response_text: str, gold: str) -> Grade:
        """The verdict on a response. Raises UnreadableGoldError when `gold` is not one number."""
        wanted = _gold_number(gold)
        content = self._extract(response_text).content
        if content is None:
            return _NO_ANSWER
        *earlier, last = content.split("=")
        given = read_number(last)
        if DENIED.search(content) or (earlier and not states_its_value(normalise(earlier[0]))):
            return Grade(0.0, "wrong", content)  # "2x = 7" and "x != 7" do not say that something is 7
        if given is None:
            has_digits = any(character.isdigit() for character in content)
            return Grade(0.0, "wrong", content) if has_digits else Grade(0.0, "no_answer", content)
        # "5 = 6 = 7" hedges; "x = 7" and "3 + 4 = 7" derive.
        numbers = [given, *(number for part in earlier if (number := read_number(part, words=False)) is not None)]
        return _verdict(all(same_number(number, wanted) for number in numbers), str(given))

    def parses_gold(self, gold: str) -> bool:
        """Whether `gold` states exactly one number."""
        return read_number(gold) is not None


class ChoiceVerifier(BoxedVerifier):
    """`choice`: one option letter out of several (GPQA). The gold is a letter A to D, dressed or not."""

    def __init__(self) -> None:
        super().__init__()

    def grade(self, response_text: str, gold: str) -> Grade:
        """The verdict on a response. Raises UnreadableGoldError when `gold` is not one of A, B, C, D."""
        if not self.parses_gold(gold):
            raise UnreadableGoldError(f"The gold answer of a `choice` problem is {gold!r}; expected one of A, B, C, D.")
        content = self._extract(response_text).content
        given = None if content is None else read_choice(content)
        if given is None:
            several = content is not None and sum(f" {letter} " in f" {content} " for letter in "ABCD") > 1
            return Grade(0.0, "wrong", content) if several else Grade(0.0, "no_answer", content)
        return _verdict(given == read_choice(gold), given)

    def parses_gold(self, gold: str) -> bool:
        """Whether `gold` is one of the letters A to D."""
        return read_choice(gold) in ("A", "B", "C", "D")


class MathVerifier(BoxedVerifier):
    """`math`: what LaTeX can state: numbers, formulas, sets, intervals, tuples, matrices, words (MATH, AIME)."""

    def grade(self, response_text: str, gold: str) -> Grade:
        """The verdict on a response. May hang or exhaust memory on hostile text. Raises UnreadableGoldError."""
        return self._grade(response_text, gold, _algebra())

    def warm_up(self) -> None:
        """Import computer algebra and build its parser, before a time limit counts."""
        self.grade(r"\boxed{(x+1)^2}", "x^2+2x+1")

    def quick_grade(self, response_text: str, gold: str) -> Grade | None:
        """The verdict on numbers, words and identical spellings; None where computer algebra is needed."""
        try:
            return self._grade(response_text, gold, None)
        except AlgebraNeeded:
            return None

    def parses_gold(self, gold: str) -> bool:
        """Whether `gold` is a number, words or another plain form, or is readable to math-verify."""
        answer = _gold_answer(gold)
        return answer is not None and _has_meaning(answer)

    def _grade(self, response_text: str, gold: str, algebra: AlgebraicEquality | None) -> Grade:
        wanted = _gold_answer(gold)
        if wanted is None:
            raise UnreadableGoldError(
                f"The gold answer {gold[:200]!r} of a `math` problem is empty, stands for a missing value, or has "
                "unbalanced braces."
            )
        content = self._extract(response_text).content
        given = None if content is None or not balanced(content) else read_answer(content)
        if given is None:
            return Grade(0.0, "no_answer", content)
        try:
            return _verdict(same_answer(wanted, given, algebra), content)
        except ValueError:  # the box holds something that is no mathematics
            return Grade(0.0, "no_answer", content)


_NO_ANSWER = Grade(0.0, "no_answer")


def _verdict(correct: bool, parsed: str | None) -> Grade:
    return Grade(1.0, "correct", parsed) if correct else Grade(0.0, "wrong", parsed)


@lru_cache(maxsize=65_536)
def _gold_number(gold: str) -> Number:
    number = read_number(gold)
    if number is None:
        raise UnreadableGoldError(
            f"The gold answer of a `number` problem is {gold[:200]!r}; expected exactly one number."
        )
    return number


def _gold_answer(gold: str) -> Answer | None:
    return None if gold.strip().lower() in NO_GOLD else read_gold(gold)


def _algebra() -> AlgebraicEquality:
    """Computer algebra, imported when the first answer needs it: it costs a second and 60 MB."""

    def equal(gold: str, given: str) -> bool:
        from latent_grpo.reward import algebra

        return algebra.equal(gold, given)

    return equal


def _has_meaning(answer: Answer) -> bool:
    if isinstance(answer, Sequence):
        return all(_has_meaning(item) for item in answer.items)
    if answer.number or answer.words or answer.numeral or answer.clock:
        return True
    from latent_grpo.reward import algebra, latex

    try:
        algebra.parse_gold(latex.with_mixed_numbers(answer.text))
    except algebra.Unreadable:
        return False
    return True


@lru_cache(maxsize=64)
def _cached_verifier(kind: str, options_json: str) -> Verifier:
    return load_verifier(kind, **json.loads(options_json))
