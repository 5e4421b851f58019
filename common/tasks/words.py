"""Generated problems in words, for a model with a real tokenizer: a few operations on small numbers.

A problem is `Tom has 3 pens, gets 4, loses 2. Left?`, about 20 tokens of a BPE tokenizer that splits digits one by one;
its explicit chain of thought is `3+4=7;7-2=5;`, its answer the last result. No value leaves 0 to `largest`. Operations
are told in equally many tokens, so that a small model learns within minutes where to look.

The chain writes every number with as many digits as `largest` has (`07` if it is 20), so that an operation is a fixed
number of tokens there: three numbers and three marks, 6 of them up to 9 and 9 of them beyond. A compression of 3
then makes 2 or 3 latent steps of an operation, each of which holds the same part of it in every problem.

A problem is a function of (seed, split, index), so training never runs out and nothing is stored. One calculation in
eight is held out, whatever name, thing and verbs it is told with.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from latent_grpo.common.tasks.arithmetic import Split, split_of
from latent_grpo.common.types import Problem

NAMES = ("Tom", "Ann", "Ben", "Sam", "Max", "Tim", "Jack", "Anna", "Paul", "Mark", "Lily")
THINGS = (
    *("pens", "books", "coins", "eggs", "cards", "stones", "apples", "shells", "cups"),
    *("keys", "balls", "toys", "stamps", "nuts", "cakes", "boxes", "plants", "birds"),
)
VERBS = {"+": ("gets", "finds", "buys", "wins"), "-": ("loses", "eats", "sells", "gives"), "*": ("times",)}
FACTORS = (2, 3)
GREATEST = 99  # two digits


@dataclass(frozen=True, slots=True, kw_only=True)
class WordProblems:
    """`source.problem(index)` for any index; the same (seed, split, index) is the same problem on every machine."""

    name: str
    operations: int = 4
    shortest: int = 2  # operations are drawn from shortest to `operations`
    largest: int = 9  # no number is greater
    seed: int = 0
    split: Split = "training"

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.operations:
            raise ValueError(
                f"task {self.name}: shortest must be between 1 and operations ({self.operations}), got {self.shortest}"
            )
        if not 2 <= self.largest <= GREATEST:
            raise ValueError(f"task {self.name}: largest must be between 2 and {GREATEST}, got {self.largest}")
        if self.split not in ("training", "evaluation"):
            raise ValueError(f"task {self.name}: split must be training or evaluation, got {self.split!r}")

    def problem(self, index: int) -> Problem:
        """Returns the problem of this index, from 0; a function of the index and the settings alone."""
        draw = random.Random(f"words/{self.seed}/{self.split}/{self.shortest}/{self.operations}/{self.largest}/{index}")
        count = draw.randint(self.shortest, self.operations)
        while True:
            first, steps = draw.randint(1, self.largest), []
            value = first
            for _ in range(count):
                steps.append(self._step(draw, value))
                value = steps[-1].result
            if split_of(str(first) + "".join(step.operator + str(step.number) for step in steps)) == self.split:
                break
        told = "".join(f", {draw.choice(VERBS[step.operator])} {step.number}" for step in steps)
        text = f"{draw.choice(NAMES)} has {first} {draw.choice(THINGS)}{told}. Left?"
        digits = len(str(self.largest))
        chain = "".join(step.written(digits) for step in steps)
        return Problem(
            uid=f"{self.name}/{index}", task=self.name, messages=(("user", text),), answer=str(value), cot=chain
        )

    def _step(self, draw: random.Random, value: int) -> _Step:
        """Draws one operation among those that stay within the range."""
        room = self.largest - value
        factors = [factor for factor in FACTORS if 0 < value * factor <= self.largest]
        operator = draw.choice("+" * (room > 0) + "-" * (value > 0) + "*" * bool(factors))
        numbers = {"+": range(1, room + 1), "-": range(1, value + 1), "*": factors}[operator]
        return _Step(value, operator, draw.choice(numbers))


@dataclass(frozen=True, slots=True)
class _Step:
    value: int  # before it
    operator: str
    number: int

    @property
    def result(self) -> int:
        changed = {"+": self.value + self.number, "-": self.value - self.number, "*": self.value * self.number}
        return changed[self.operator]

    def written(self, digits: int) -> str:
        value, number, result = (f"{n:0{digits}d}" for n in (self.value, self.number, self.result))
        return f"{value}{self.operator}{number}={result};"
