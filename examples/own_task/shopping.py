"""A task of your own: problems that a program makes, here small sums in words.

Problems that lie in a file need no code (`path: my_problems.jsonl`). This is for those that are made, or come from
somewhere else: a database, a simulator.
"""

from __future__ import annotations

import random
import zlib

from latent_grpo.common.types import Problem

NAMES = ("Ada", "Ben", "Chi", "Dan", "Eva", "Finn")
THINGS = ("apples", "books", "coins", "eggs", "pens")


def split_of(text: str) -> str:
    """Which split a problem belongs to, whatever the seed: training never sees what evaluation asks."""
    return "evaluation" if zlib.crc32(text.encode()) % 8 == 0 else "training"


class Shopping:
    """Named in the settings as `path: python:shopping:Shopping`.

    It is made once, with the task's `name`, the run's `seed`, the `split` and the task's `options` (here `purchases`
    and `most`). An attribute `size` would say how many problems there are; without it they never run out.
    """

    def __init__(self, name: str, seed: int, split: str, purchases: int = 2, most: int = 9) -> None:
        if purchases < 1:
            raise ValueError(f"purchases must be at least 1, got {purchases}")
        self._name, self._split, self._purchases, self._most = name, split, purchases, most
        self._source = f"shopping/{seed}/{split}/{purchases}/{most}"

    def problem(self, index: int) -> Problem:
        """The problem at a place, the same whenever it is asked: a resumed run asks it again, a report explains it.

        So it is drawn from its own generator, seeded with a text. Neither `hash()` of a text nor the global `random`
        would do: they differ from process to process.
        """
        draw = random.Random(f"{self._source}/{index}")
        while True:  # until it is one of this split
            text, chain, total = self._drawn(draw)
            if split_of(text) == self._split:
                break
        return Problem(
            uid=f"{self._name}/{index}",  # the task's name, a slash, and what no other problem of the task has
            task=self._name,
            messages=(("user", text),),
            answer=str(total),
            cot=chain,  # what Latent-SFT compresses into latent steps; RL alone does without
        )

    def _drawn(self, draw: random.Random) -> tuple[str, str, int]:
        """(text, chain of thought, answer)"""
        name, thing = draw.choice(NAMES), draw.choice(THINGS)
        total = draw.randint(1, self._most)
        text, chain = [f"{name} has {total} {thing}."], []
        for _ in range(self._purchases):
            more = draw.randint(1, self._most)
            text.append(f"{name} buys {more} more.")
            chain.append(f"{total}+{more}={total + more};")
            total += more
        return " ".join([*text, f"How many {thing}?"]), " ".join(chain), total
