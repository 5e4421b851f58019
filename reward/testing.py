"""What every verifier has to keep, as one function for a test suite.

def test_my_verifier() -> None:
    check_verifier("my_package.my_module:MyVerifier", correct=[("red", "red")], wrong=[("blue", "red")])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from latent_grpo.reward.pool import VerifierPool
from latent_grpo.reward.verifier import REASONS, Grade

HOSTILE_TEXTS: tuple[str, ...] = (
    "",
    " \n\t",
    "\x00\x01\x7f",
    "\ud800 \udfff",
    "\u202e\u200b\ufeff",
    "\\boxed{",
    "\\boxed{}",
    "\\boxed{" + "{" * 5_000 + "}" * 5_000 + "}",
    "{" * 100_000 + "}" * 100_000,
    "\\boxed{9^{9^{9^{9}}}}",
    "\\boxed{__import__('os').abort()}",
    "()" * 20_000,
    "1" * 20_000,
    "a" * 1_000_000,
)
"""Responses that a model under training may write: none may crash a verifier or be rewarded."""


def check_verifier(
    kind: str,
    *,
    correct: Iterable[tuple[str, str]],
    wrong: Iterable[tuple[str, str]],
    options: Mapping[str, Any] | None = None,
    time_limit_s: float = 5.0,
) -> None:
    """Run a verifier in a pool and assert its contract; `correct` and `wrong` are (response text, gold) examples.

    The contract: every case gets a Grade with a known reason; a correct example is `correct` and has a higher reward
    than every wrong one; the same case gets the same verdict again, in another process too; hostile texts get a verdict
    (the limits of time and memory may decide it) that is neither `ungraded` nor `correct`. Raises AssertionError with
    the case.
    """
    correct, wrong = list(correct), list(wrong)
    if not correct or not wrong:
        raise ValueError("check_verifier needs at least one correct and one wrong example.")
    given = {kind: dict(options)} if options else None
    hostile = [(text, gold) for text in HOSTILE_TEXTS for gold in [correct[0][1]] if text != gold]
    with VerifierPool(processes=2, time_limit_s=time_limit_s, options=given) as pool:
        first = _graded(pool, kind, correct + wrong)
        for case, verdict in first[: len(correct)]:
            assert verdict.reason == "correct", f"{case!r:.300} is a correct example, graded {verdict}"
        for case, verdict in first[len(correct) :]:
            assert verdict.reason in ("wrong", "no_answer"), f"{case!r:.300} is a wrong example, graded {verdict}"
        lowest = min(verdict.reward or 0.0 for _, verdict in first[: len(correct)])
        highest = max(verdict.reward or 0.0 for _, verdict in first[len(correct) :])
        assert lowest > highest, f"a wrong example has reward {highest}, a correct one only {lowest}"
        for case, verdict in _graded(pool, kind, hostile):
            assert verdict.reason not in ("ungraded", "correct"), f"{case!r:.300} was graded {verdict}"
    with VerifierPool(processes=1, time_limit_s=time_limit_s, options=given) as pool:
        again = _graded(pool, kind, reversed(correct + wrong))
        for (case, before), (_, after) in zip(reversed(first), again, strict=True):
            assert before == after, f"{case!r:.300} was graded {before}, then {after}"


def _graded(pool: VerifierPool, kind: str, cases: Iterable[tuple[str, str]]) -> list[tuple[tuple[str, str], Grade]]:
    cases = list(cases)
    verdicts = pool.grade_many([(kind, response_text, gold) for response_text, gold in cases])
    for case, verdict in zip(cases, verdicts, strict=True):
        assert verdict.reason in REASONS, f"{case!r:.300} was graded {verdict}"
    return list(zip(cases, verdicts, strict=True))
