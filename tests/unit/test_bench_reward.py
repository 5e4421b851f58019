"""The grading benchmark measures gradings: its generated answers are what they claim, and all differ."""

import random
from itertools import islice

import pytest

from latent_grpo.deploy.bench.reward import gsm8k_like, math_like
from latent_grpo.reward.answers import MathVerifier, NumberVerifier, grade


def test_math_like_answers_are_right_right_in_another_form_and_wrong():
    cases = list(islice(math_like(random.Random(0)), 90))
    assert [grade(*case).reason for case in cases] == ["correct", "correct", "wrong"] * 30


def test_gsm8k_like_answers_are_right_and_wrong_in_similar_shares():
    reasons = [grade(*case).reason for case in islice(gsm8k_like(random.Random(0)), 800)]
    assert set(reasons) == {"correct", "wrong"}
    assert 0.35 < reasons.count("correct") / 800 < 0.65


@pytest.mark.parametrize(("make", "verifier"), [(gsm8k_like, NumberVerifier()), (math_like, MathVerifier())])
def test_no_answer_of_a_problem_is_drawn_twice(make, verifier):
    cases = list(islice(make(random.Random(1)), 240))
    condensed = [(verifier.condensed(text), gold) for _, text, gold in cases]
    assert len(set(condensed)) == len(condensed)
