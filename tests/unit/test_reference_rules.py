"""The answer rules of the authors' protocol (METHOD §8): no box, `####`, proxies in the text, what counts as equal."""

from __future__ import annotations

import numpy as np
import pytest

from latent_grpo.common.golds import any_of
from latent_grpo.common.schema import decode, encode
from latent_grpo.common.tasks import gpqa
from latent_grpo.common.types import SamplingSettings, Trajectory
from latent_grpo.deploy.evaluation.whole_text import regraded, whole_text
from latent_grpo.reward.reference import plain_form
from latent_grpo.reward.verifier import load_verifier

NUMBER = [
    (r"so \boxed{72}", "72", True),
    (r"\boxed{7}, no, \boxed{72}", "72", True),  # the last box
    (r"\boxed{72} and 5 more", "72", True),  # a box hides what stands outside
    (r"\boxed{5} and 72", "72", False),
    (r"\boxed{} so 72", "72", True),  # an empty one does not
    (r"\boxed{72", "72", True),  # nor an unclosed one
    ("3 + 4 = 7\n#### 1,234", "1234", True),
    ("#### 5 #### 72", "72", True),
    ("72 #### five", "72", False),  # nothing else is looked for then
    ("72 ####", "72", True),  # unless nothing follows
    ("it is 72.", "72", True),
    ("from 72 to 5", "72", False),
    ("-5", "5", False),
    ("1,234.5", "1234.5", True),
    (r"\boxed{\$72.00}", "72", True),
    (r"\boxed{72 \text{ clips}}", "72", True),
    (r"\boxed{72 clips}", "72", False),  # words beside a number are no number here
    (r"\boxed{\frac{1}{2}}", "0.5", True),
    (r"\boxed{x=72}", "72", True),
    ("72.000009", "72", True),
    ("72.00002", "72", False),
    (r"\boxed{72}", "48 + 24 = 72\n#### 72", True),  # a gold answer as GSM8K publishes it
    ("no number", "72", False),
    ("", "72", False),
]
MATH = [
    (r"\boxed{\dfrac12}", r"\frac{1}{2}", True),
    (r"\boxed{1/2}", r"\frac{1}{2}", True),
    (r"\boxed{0.5}", r"\frac12", True),
    (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})", True),
    (r"\boxed{9^\circ}", "9", True),
    (r"\boxed{1+x}", "x+1", False),  # texts are compared, not what they mean
    (r"\boxed{1,234}", "1234", False),
    (r"\boxed{025}", "25", True),  # AIME's answers are integers of three digits
    ("25", "25", False),
    (r"\boxed{25", "25", False),
]
CHOICE = [
    (r"\boxed{B}", "B", True),
    (r"\boxed{(b).}", "B", True),
    (r"A or \boxed{B}, not C", "B", True),
    (r"\boxed{5 m} is option C", "C", True),  # no letter in the box
    ("I take B, no, C.", "C", True),
    ("I take C, no, B.", "C", False),
    ("ABBA and Bob", "B", False),  # none stands alone
    ("a b c", "B", False),  # letters are capitals, so that an article is none
    ("", "B", False),
]


@pytest.mark.parametrize(
    ("kind", "text", "gold", "right"),
    [("number", *case) for case in NUMBER]
    + [("math", *case) for case in MATH]
    + [("choice", *case) for case in CHOICE],
)
def test_the_rule_of_the_reference(kind, text, gold, right):
    verdict = load_verifier(f"reference_{kind}").grade(text, gold)
    assert verdict.reason == ("correct" if right else "no_answer" if verdict.parsed is None else "wrong")
    assert verdict.reward == float(right)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (r"\tfrac34", r"\frac{3}{4}"), (r"\frac1{72}", r"\frac{1}{72}"), ("3/4", r"\frac{3}{4}"), ("a/b", "a/b"),
        (r"\sqrt2 + 1", r"\sqrt{2}+1"), (r"k = 5", "5"), ("x+y=5", "x+y=5"), (".5", r"\frac{1}{2}"), (r"50\%", "50"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_form_in_which_texts_are_compared(text, form):
    assert plain_form(text) == form


def sample(proxies, hard, finish="stop", gold="7"):
    """One latent step for each proxy token, the second component of each another token; then the hard tokens."""
    latent = np.array([[p, 0] for p in proxies], np.int32).reshape(len(proxies), 2)
    return Trajectory(
        purpose="evaluation", task="svamp", problem_uid="svamp/0", group_uid="g", sample_index=0, epoch=0, run_seed=0,
        policy_version_min=0, policy_version_max=0, engine="none",
        sampling=SamplingSettings(mode="latent", max_tokens=9), prompt_ids=np.array([1], np.int32),
        latent_ids=latent, latent_scores=latent.astype(np.float32),
        latent_log_probs=latent.astype(np.float32), hard_ids=np.array(hard, np.int32),
        hard_log_probs=np.zeros(len(hard), np.float32), finish_reason=finish, gold_answer=gold, reward=0.0,
        grade_reason="no_answer",
    )  # fmt: skip


def text_of(ids):
    """Token 9 is the end of a sequence; any other stands for its own digit."""
    return "".join("<eos>" if i == 9 else f" {i}" for i in ids)


def test_proxies_are_graded_and_the_end_of_the_sequence_is_not():
    rows = [
        sample([5, 7], [9]),
        sample([5], [7, 9]),
        sample([7], [5, 9]),
        sample([7], [9], "length"),
        sample([], [7, 9]),
    ]
    rows.append(sample([7], [], "aborted"))
    texts = [whole_text(row.latent_ids, row.hard_ids, row.finish_reason, text_of) for row in rows]
    assert texts == [" 5 7", " 5 7", " 7 5", " 7<eos>", " 7", " 7"], "a cut sample has all of its tokens"
    graded = decode(regraded(encode(rows, 2), "reference_number", text_of))
    assert [row.grade_reason for row in graded] == ["correct", "correct", "wrong", "correct", "correct", "ungraded"]
    assert [row.parsed_answer for row in graded] == ["7", "7", "5", "7", "7", None]
    golds = [sample([7], [9], gold=any_of(["5", gold])) for gold in ("7", "8")]
    assert [row.grade_reason for row in decode(regraded(encode(golds, 2), "reference_number", text_of))] == [
        "correct",
        "wrong",
    ], "any of several golds is right"
    visible = encode([sample([], [7, 9])], 0)
    assert decode(regraded(visible, "reference_number", text_of))[0].reward == 1.0, "explicit chains have no proxies"


# --- GPQA


def test_gpqa_has_the_options_in_the_order_that_its_row_s_generator_gives():
    """Row 0: `random.Random(42)` turns 0, 1, 2, 3 into 2, 1, 3, 0 by `shuffle`."""
    row = {gpqa.QUESTION: " Which? ", gpqa.CORRECT: "right"} | dict(
        zip(gpqa.INCORRECT, ("one", "two", "three"), strict=True)
    )
    text, letter = gpqa.with_letters(0, row, "reference")
    assert (text, letter) == ("Which?\n(A) two\n(B) one\n(C) three\n(D) right", "D")
    letters = [gpqa.with_letters(number, row, "reference")[1] for number in range(198)]
    assert {letters.count(letter) > 30 for letter in "ABCD"} == {True}
    assert gpqa.with_letters(0, row)[0] != text, "ours is another order"
