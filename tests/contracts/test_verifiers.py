"""The contract of verifiers, on every built-in kind and on a user's; and what it finds in verifiers that break it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from latent_grpo.reward import verifier as registry
from latent_grpo.reward.testing import check_verifier
from latent_grpo.reward.verifier import (
    Grade,
    UnknownVerifierError,
    Verifier,
    import_path_of,
    load_verifier,
    register,
    registered_kinds,
)

pytestmark = pytest.mark.integration

ANSWER_TAG = {"kind": "format", "options": {"pattern": r"<answer>.*</answer>"}}
OPTIONS = {
    "format": ANSWER_TAG["options"],
    "gate": {"condition": ANSWER_TAG, "then": {"kind": "number"}},
    "length_penalty": {"verifier": {"kind": "number"}, "free_chars": 20, "max_chars": 60, "penalty": 0.5},
    "weighted_sum": {"parts": [{"kind": "math", "weight": 1.0}, {**ANSWER_TAG, "weight": 0.2}]},
}
EXAMPLES = {
    "format": ([("<answer>\n5</answer>", "")], [("5", "5"), ("<answer>5", "5")]),
    "gate": ([(r"<answer>\boxed{5}</answer>", "5")], [(r"\boxed{5}", "5"), (r"<answer>\boxed{6}</answer>", "5")]),
    "length_penalty": ([(r"\boxed{5}", "5"), ("so it is" * 9 + r"\boxed{5}", "5")], [(r"\boxed{6}", "5")]),
    "weighted_sum": ([(r"\boxed{x+1}", "1+x")], [(r"<answer>\boxed{x}</answer>", "1+x"), ("x+1", "1+x")]),
    "math": ([(r"\boxed{\frac12}", "0.5"), (r"\boxed{(x+1)^2}", "x^2+2x+1")], [(r"\boxed{2}", "0.5"), ("none", "0.5")]),
    "number": ([(r"\boxed{\$1,234}", "1234")], [(r"\boxed{1235}", "1234"), ("1234", "1234")]),
    "choice": ([(r"\boxed{(B)}", "B")], [(r"\boxed{C}", "B"), (r"\boxed{}", "B")]),
    "reference_number": ([("3 and #### 1,234", "1234"), ("then 5", "5")], [(r"\boxed{6} 5", "5"), ("none", "5")]),
    "reference_math": ([(r"\boxed{\dfrac12}", "1/2"), (r"\boxed{007}", "7")], [(r"\boxed{1+x}", "x+1"), ("7", "7")]),
    "reference_choice": ([(r"\boxed{(b).}", "B"), ("so B", "B")], [(r"\boxed{C}", "B"), ("none", "B")]),
}


class Reversed:
    """A user's verifier: the response must be the gold backwards."""

    def grade(self, response_text: str, gold: str) -> Grade:
        good = response_text == gold[::-1]
        return Grade(float(good), "correct" if good else "wrong", response_text)


class Generous:
    """Rewards whatever is said."""

    def grade(self, response_text: str, gold: str) -> Grade:
        return Grade(1.0, "correct")


class Fragile:
    """Fails on what it does not expect."""

    def grade(self, response_text: str, gold: str) -> Grade:
        good = int(response_text) == int(gold)
        return Grade(float(good), "correct" if good else "wrong")


class Moody:
    """Answers by what it was asked before."""

    def __init__(self) -> None:
        self._calls = 0

    def grade(self, response_text: str, gold: str) -> Grade:
        self._calls += 1
        return Grade(float(response_text == gold), "correct" if response_text == gold else "wrong", str(self._calls))


@pytest.mark.parametrize("kind", sorted(EXAMPLES))
def test_built_in_verifiers_keep_the_contract(kind: str) -> None:
    correct, wrong = EXAMPLES[kind]
    check_verifier(kind, correct=correct, wrong=wrong, options=OPTIONS.get(kind), time_limit_s=1.0)
    assert isinstance(load_verifier(kind, **OPTIONS.get(kind, {})), Verifier)


def test_every_registered_kind_has_examples_here() -> None:
    assert set(EXAMPLES) == set(registered_kinds())


def test_a_users_verifier_keeps_the_contract() -> None:
    check_verifier("test_verifiers:Reversed", correct=[("cba", "abc")], wrong=[("abc", "abc")])


@pytest.mark.parametrize(
    ("name", "message"),
    [("Generous", "is a wrong example"), ("Fragile", "ungraded"), ("Moody", "then Grade")],
)
def test_the_contract_finds_verifiers_that_break_it(name: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_verifier(f"test_verifiers:{name}", correct=[("1", "1"), ("2", "2")], wrong=[("3", "1")])


def test_a_verifier_can_be_registered_under_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict(registry._REGISTERED)  # nothing takes a name back
    monkeypatch.setattr(registry, "_REGISTERED", known)  # as above
    register("backwards", "test_verifiers:Reversed")
    register("backwards", "test_verifiers:Reversed")
    assert import_path_of("backwards") == "test_verifiers:Reversed"
    assert load_verifier("backwards").grade("cba", "abc").reward == 1.0
    check_verifier("backwards", correct=[("cba", "abc")], wrong=[("abc", "abc")])
    with pytest.raises(ValueError, match="already registered"):
        register("math", "test_verifiers:Reversed")
    with pytest.raises(ValueError, match=r"package\.module:Class"):
        register("sideways", "test_verifiers.Reversed")


def test_an_unknown_kind_is_an_error_that_lists_the_allowed_ones() -> None:
    with pytest.raises(UnknownVerifierError, match=r"'maths'\. Allowed: .*choice, format, .* number, .*, or the"):
        load_verifier("maths")
    with pytest.raises(UnknownVerifierError, match="cannot be built with options"):
        load_verifier("choice", colour="red")


def test_an_import_path_of_an_earlier_version_is_answered_with_todays(importable, tmp_path) -> None:
    todays = r"Since version 0\.2\.0 it is 'latent_grpo\.reward\.answers:MathVerifier'"
    importable(Path(__file__).parents[2])
    with pytest.raises(UnknownVerifierError, match=f"a checkout of this program.*{todays}"):
        load_verifier("reward.answers:MathVerifier")
    assert "reward" not in sys.modules
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "__init__.py").write_text("from latent_grpo.reward.verifier import Grade")
    (tmp_path / "reward" / "mine.py").write_text(
        "class Never:\n    def grade(self, response_text, gold):\n        raise NotImplementedError\n"
    )
    importable(tmp_path)
    try:
        assert type(load_verifier("reward.mine:Never")).__name__ == "Never", "a user's own package of that name"
        with pytest.raises(UnknownVerifierError, match=f"cannot be imported.*{todays}"):
            load_verifier("reward.answers:MathVerifier")
        with pytest.raises(UnknownVerifierError) as caught:
            load_verifier("reward.mine:Always")
        assert "0.2.0" not in str(caught.value)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "reward"]:
            del sys.modules[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "wrong"), "None for `ungraded` only"),
        ((0.0, "ungraded"), "None for `ungraded` only"),
        ((1.0, "right"), "must be one of"),
        ((float("nan"), "wrong"), "finite"),
    ],
)
def test_a_grade_cannot_contradict_itself(arguments: tuple[float | None, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grade(*arguments)
