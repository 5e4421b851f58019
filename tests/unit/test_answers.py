"""Grading: a corpus of answers with the reason for each verdict, and the invariants behind it."""

from __future__ import annotations

import re
import time
from fractions import Fraction

import pytest
from corpus_math import MATH_CORRECT, MATH_WRONG
from corpus_words import CHOICE_CORRECT, CHOICE_WRONG, LAST_NUMBER, NUMBER_CORRECT, NUMBER_WRONG
from hypothesis import example, given, settings
from hypothesis import strategies as st

from latent_grpo.reward import algebra
from latent_grpo.reward.answers import ChoiceVerifier, MathVerifier, NumberVerifier, gold_is_parsable, grade
from latent_grpo.reward.last_number import last_number
from latent_grpo.reward.math_answers import read_answer, read_gold
from latent_grpo.reward.numbers import read_number

CORPUS = [
    pytest.param(kind, gold, content, reward, id=f"{kind}: {reason} [{content[:24]}]")
    for kind, reward, cases in (
        ("number", 1.0, NUMBER_CORRECT),
        ("number", 0.0, NUMBER_WRONG),
        ("math", 1.0, MATH_CORRECT),
        ("math", 0.0, MATH_WRONG),
        ("choice", 1.0, CHOICE_CORRECT),
        ("choice", 0.0, CHOICE_WRONG),
    )
    for gold, content, reason in cases
]


def test_the_corpus_is_large_and_every_case_has_its_own_reason() -> None:
    lists = (NUMBER_CORRECT, NUMBER_WRONG, MATH_CORRECT, MATH_WRONG, CHOICE_CORRECT, CHOICE_WRONG)
    assert sum(map(len, lists)) >= 300
    for cases in lists:
        assert len({(gold, content) for gold, content, _ in cases}) == len(cases)
        assert all(reason for _, _, reason in cases)


@pytest.mark.parametrize(("kind", "gold", "content", "reward"), CORPUS)
def test_corpus(kind: str, gold: str, content: str, reward: float) -> None:
    verdict = grade(kind, rf"Let me think about 7 and B. So the answer is \boxed{{{content}}}.", gold)
    assert verdict.reward == reward, verdict
    assert (verdict.reason == "correct") == (reward == 1.0)


# (response, verdict for gold 18, why)
EXTRACTION = [
    (r"\boxed{17} no, \boxed{18}", "correct", "the last box counts"),
    (r"\boxed{18} no, \boxed{17}", "wrong", "the last box counts, right ones before it do not"),
    (r"\boxed{17} so the answer is 18", "wrong", "nothing outside the box counts"),
    (r"The answer is 18. \boxed{}", "no_answer", "an empty box is no answer, whatever the text says"),
    (r"\boxed{18} and \boxed{ }", "no_answer", "an empty last box, whatever the box before says"),
    (r"18 \boxed{\text{}}", "no_answer", "a box with nothing but dressing"),
    (r"18 \boxed{18", "no_answer", "a box that the token budget cut"),
    (r"18 \boxed{{18}", "no_answer", "an unclosed group in the box"),
    (r"18 \boxed 18", "no_answer", "a box without braces"),
    (r"\boxed", "no_answer", "the bare command"),
    ("The answer is 18", "no_answer", "no box"),
    ("", "no_answer", "an empty response"),
    (r"\boxed{\boxed{18}}", "correct", "a box in a box"),
    (r"\boxed {18}", "correct", "a space before the brace"),
    (r"\fbox{18}", "correct", "the other box command"),
    (r"\boxed{18}\boxedness{17}", "correct", "another command that starts alike"),
    ("\\boxed{\n18\n}", "correct", "line breaks"),
    (r"\boxed{\mathbf{18}}", "correct", "nested braces"),
    ("\\boxed{1\x008}", "correct", "a NUL byte"),
    ("\\boxed{18\ud800}", "correct", "a lone surrogate"),
    ("\\boxed{\u200b18}", "correct", "a zero-width space"),
]


@pytest.mark.parametrize("kind", ["number", "math"])
@pytest.mark.parametrize(("response", "reason", "why"), EXTRACTION)
def test_the_last_box_alone_is_the_answer(kind: str, response: str, reason: str, why: str) -> None:
    assert grade(kind, response, "18").reason == reason, why


@pytest.mark.parametrize("kind", ["number", "math"])
def test_the_fallback_takes_the_last_number_only_where_there_is_no_box(kind: str) -> None:
    assert grade(kind, "First 7, then 18.", "18", fallback="last_number").reason == "correct"
    assert grade(kind, "It costs $1,234.", "1234", fallback="last_number").reason == "correct"
    assert grade(kind, r"First 18, \boxed{}", "18", fallback="last_number").reason == "no_answer"
    assert grade(kind, "no idea", "18", fallback="last_number").reason == "no_answer"
    with pytest.raises(ValueError, match="last_number"):
        grade(kind, "18", "18", fallback="last_nubmer")


@pytest.mark.parametrize(("text", "number", "why"), LAST_NUMBER)
def test_the_last_number_is_taken_whole_or_not_at_all(text: str, number: str | None, why: str) -> None:
    assert last_number(text) == number, why
    for kind in ("number", "math"):
        golds = [number] if number else re.findall("[0-9]+", text)  # none of its parts
        for gold in golds:
            verdict = grade(kind, text, gold, fallback="last_number")
            assert verdict.reason == ("correct" if number else "no_answer"), why


@settings(max_examples=300, deadline=None)
@example("5 " * 900)
@given(st.text("0123456789 .,-+/=$%xa(){}\\\n", max_size=40) | st.text(max_size=60))
def test_the_last_number_reads_back_to_itself(text: str) -> None:
    number = last_number(text)
    assert number is None or last_number(number) == number
    for verifier in (NumberVerifier("last_number"), MathVerifier("last_number")):
        assert verifier.quick_grade(text, "18") == verifier.quick_grade(verifier.condensed(text), "18")


def test_a_number_that_the_reach_of_the_fallback_cuts_is_not_taken() -> None:
    assert grade("number", "7" * 2_001, "7", fallback="last_number").reason == "no_answer"
    assert grade("number", "5" * 10 + "18" + " " * 1_998, "18", fallback="last_number").reason == "no_answer"
    assert grade("number", "word " * 1_000 + "18", "18", fallback="last_number").reason == "correct"


HOSTILE = [
    pytest.param("x" * 1_000_000, id="a million characters"),
    pytest.param("\\boxed{" + "{" * 100_000 + "5" + "}" * 100_000 + "}", id="100,000 nested braces"),
    pytest.param("\\boxed{" + "(" * 900 + "5" + ")" * 900 + "}", id="900 nested parentheses"),
    pytest.param("\\boxed{" + "9" * 1_900 + "}", id="1,900 digits"),
    pytest.param("\\boxed{" + "1," * 900 + "2}", id="a list of 900"),
    pytest.param("\\boxed{" + "a" * 1_900 + "^}", id="1,900 letters and an operator"),
    pytest.param("\\boxed{5" + " " * 1_900 + "!}", id="1,900 spaces"),
    pytest.param("\\boxed" * 200_000, id="200,000 boxes without braces"),
    pytest.param("\\boxed{" * 100_000, id="100,000 nested boxes"),
    pytest.param("\\fboxx" * 200_000, id="200,000 commands that look like boxes"),
    pytest.param("\\boxed{" + "\\text{" * 30 + "5" + "}" * 30 + "}", id="30 nested text commands"),
    pytest.param("\x00" * 1_000 + "\ud800\udfff", id="NUL bytes and surrogates"),
    pytest.param("\\boxed{9^{9^{9^{9^{9}}}}}", id="a power tower"),
    pytest.param("\\boxed{__import__('os').system('touch /tmp/never')}", id="code"),
    pytest.param("\\boxed{\\input{/etc/passwd} \\write18{id}}", id="LaTeX that reads files"),
]


@pytest.mark.parametrize(
    "verifier", [NumberVerifier(), ChoiceVerifier(), MathVerifier()], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize("response", HOSTILE)
def test_what_runs_without_limits_is_fast_on_hostile_text(verifier: NumberVerifier, response: str) -> None:
    gold = "A" if isinstance(verifier, ChoiceVerifier) else "18"
    start = time.perf_counter()
    verdict = verifier.quick_grade(response, gold)
    assert time.perf_counter() - start < 1.0
    assert verdict is None or verdict.reward == 0.0


@settings(max_examples=150, deadline=None)
@example(gold=10**12, offset=1, form=2)
@given(gold=st.integers(-(10**12), 10**12), offset=st.sampled_from([0, 0, 1, -1, 10, 1000]), form=st.integers(0, 5))
def test_the_fast_path_for_numbers_agrees_with_computer_algebra(gold: int, offset: int, form: int) -> None:
    from latent_grpo.reward import algebra

    value = gold + offset
    content = [f"{value}", f"{value:,}", f"{value}.0", rf"\frac{{{value * 2}}}{{2}}", f"{value * 3}/3", f" {value} "][
        form
    ]
    quick = MathVerifier().quick_grade(rf"\boxed{{{content}}}", str(gold))
    assert quick is not None
    assert (quick.reason == "correct") == algebra.equal(str(gold), content.strip().replace(",", ""))


@settings(max_examples=200, deadline=None)
@given(st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**6))
def test_a_fraction_reads_back_exactly(value: Fraction) -> None:
    number = read_number(f"{value.numerator}/{value.denominator}")
    assert number is not None
    assert number.value == value
    assert read_number(str(number)).value == value


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.sampled_from(["number", "choice", "math"]))
def test_any_text_gets_a_verdict(text: str, kind: str) -> None:
    verifier = {"number": NumberVerifier(), "choice": ChoiceVerifier(), "math": MathVerifier()}[kind]
    gold = "A" if kind == "choice" else "18"
    response = rf"\boxed{{{text}}}"
    quick = verifier.quick_grade(response, gold)
    assert quick == verifier.quick_grade(verifier.condensed(response), gold)


MISSING = ("nan", "NaN", "None", "null", "N/A", " NONE ")


@pytest.mark.parametrize(
    ("kind", "gold", "parsable"),
    [
        ("number", "18", True),
        ("number", "1,234.50", True),
        ("number", "-0.5", True),
        ("number", "", False),
        ("number", "eighteen", True),
        ("number", "a dozen", False),
        ("number", "18 or 19", False),
        *((kind, gold, False) for kind in ("number", "math", "choice") for gold in MISSING),
        ("choice", "C", True),
        ("choice", "(C)", True),
        ("choice", "E", False),
        ("choice", "", False),
        ("math", r"\frac{1}{2}", True),
        ("math", r"(-\infty, 1) \cup (1, 3)", True),
        ("math", r"\text{Sunday}", True),
        ("math", r"\text{None}", True),
        ("math", "none of them", True),
        ("math", "2021_3", True),
        ("math", "", False),
        ("math", r"\frac{1}{", False),
        ("math", "+", False),
        ("math", "x^^^2", False),
    ],
)
def test_gold_answers_are_checked_before_a_run(kind: str, gold: str, parsable: bool) -> None:
    assert gold_is_parsable(kind, gold) is parsable


def test_a_stream_of_distinct_responses_does_not_evict_the_golds() -> None:
    read_answer.cache_clear()
    read_gold.cache_clear()
    for i in range(4_201):
        gold = "7919/3" if i % 4_200 == 0 else "5"
        MathVerifier().quick_grade(rf"\boxed{{{i}}}", gold)
    responses, golds = read_answer.cache_info(), read_gold.cache_info()
    assert responses.misses > responses.maxsize, "too few responses to evict anything"
    assert golds.misses == 2, "7919/3 and 5, each read once"
    algebra.parse.cache_clear()
    algebra.parse_gold.cache_clear()
    for i in range(20):
        assert not algebra.equal("y + 7919", f"{i} + y")
    assert algebra.parse.cache_info().misses == 20
    assert algebra.parse_gold.cache_info().misses == 1, "golds have a cache of their own"


@pytest.mark.parametrize("kind", ["number", "choice", "math"])
@pytest.mark.parametrize("gold", ["", "NaN"])
def test_an_unreadable_gold_is_an_error_and_no_verdict(kind: str, gold: str) -> None:
    with pytest.raises(ValueError, match="gold answer"):
        grade(kind, r"\boxed{nan}", gold)


def test_none_can_be_the_answer_where_it_is_written_as_a_word() -> None:
    assert grade("math", r"\boxed{None}", r"\text{None}").reason == "correct"
    assert grade("math", r"\boxed{7}", r"\text{None}").reason == "wrong"
