"""The generated problems in words: what is told, what is calculated, and the tokens of a calculation."""

from __future__ import annotations

import re

import pytest

from latent_grpo.common.config import NewModelConfig, TaskConfig
from latent_grpo.common.models import make_tokenizer
from latent_grpo.common.tasks.sources import TaskError, load_task
from latent_grpo.common.tasks.words import VERBS, WordProblems


def answer_of(text: str) -> int:
    """Solves a problem from its words alone."""
    first, *told = text.removesuffix(". Left?").split(", ")
    value = int(re.fullmatch(r"\w+ has (\d+) \w+", first)[1])
    for clause in told:
        verb, _, number = clause.partition(" ")
        (operator,) = (sign for sign, verbs in VERBS.items() if verb in verbs)
        value = {"+": value + int(number), "-": value - int(number), "*": value * int(number)}[operator]
    return value


@pytest.mark.parametrize("largest", [2, 9, 99])
def test_the_words_the_chain_and_the_answer_say_the_same(largest):
    source = WordProblems(name="w", largest=largest)
    for index in range(200):
        problem = source.problem(index)
        ((role, text),) = problem.messages
        assert role == "user"
        assert answer_of(text) == int(problem.answer)
        value = int(re.search(r"\d+", text)[0])
        for step in problem.cot.split(";")[:-1]:
            left, result = step.split("=")
            before, operator, number = re.fullmatch(r"(\d+)([-+*])(\d+)", left).groups()
            assert int(before) == value
            value = {"+": value + int(number), "-": value - int(number), "*": value * int(number)}[operator]
            assert int(result) == value
            assert 0 <= value <= largest
        assert value == int(problem.answer)


def test_a_problem_depends_only_on_seed_split_and_index():
    one, again = (WordProblems(name="w", seed=3) for _ in range(2))
    assert [one.problem(i) for i in (5, 0, 9)] == [again.problem(i) for i in (5, 0, 9)]
    assert one.problem(0) != WordProblems(name="w", seed=4).problem(0)
    assert one.problem(10**9).uid == "w/1000000000"


@pytest.mark.parametrize("operations", [2, 4])
def test_no_calculation_is_in_both_splits_whatever_it_is_told_with(operations):
    training, held_out = (
        {WordProblems(name="w", operations=operations, split=s, seed=seed).problem(i).cot for i in range(400)}
        for s, seed in (("training", 0), ("evaluation", 1))
    )
    assert len(training) > 200
    assert len(held_out) > 50
    assert not training & held_out


@pytest.mark.parametrize(("largest", "tokens"), [(9, 6), (20, 9)])
def test_every_operation_is_equally_many_tokens_and_so_whole_latent_steps(largest, tokens):
    tokenizer = make_tokenizer(NewModelConfig(tokenizer="bpe", vocab_size=300), ["7=7;7=7;"] * 9)  # splits digits
    counts = set()
    for index in range(100):
        problem = WordProblems(name="w", largest=largest).problem(index)
        operations = problem.cot.count(";")
        counts.add(operations)
        assert len(tokenizer.encode(problem.cot)) == tokens * operations
    assert counts == {2, 3, 4}


@pytest.mark.parametrize("option", [{"shortest": 5}, {"shortest": 0}, {"largest": 100}, {"split": "test"}])
def test_an_impossible_option_is_refused_by_name(option):
    with pytest.raises(TaskError, match=next(iter(option))):
        load_task(TaskConfig(name="w", path="builtin:words", options=option), seed=0)
