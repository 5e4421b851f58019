"""The verifier of this project: the right number in a box earns 1, its neighbours a part of that.

`train.yaml` names it by its import path, `my_verifier:Pens`. It is made once in each grader process, with the options
of `verifiers.pens.options` as arguments. `latent-grpo grade problems.jsonl --golds --kind pens --profile train.yaml`
tries it on the gold answers.
"""

from __future__ import annotations

import re

from latent_grpo.reward.verifier import Grade

BOX = re.compile(r"\\boxed\{\s*(\d{1,4})\s*\}")


class Pens:
    def __init__(self, partial: float = 0.0) -> None:
        if not 0 <= partial < 1:  # what is raised here is said before the run starts, in one line
            raise ValueError(f"partial is {partial!r}; give a number from 0 up to 1, the reward of a right answer")
        self._partial = partial

    def grade(self, response_text: str, gold: str) -> Grade:
        """`response_text` is what the model wrote after its latent steps, `gold` the answer of the file."""
        found = BOX.findall(response_text)
        if not found:
            return Grade(reward=0.0, reason="no_answer")
        given = found[-1]  # the last box counts
        if int(given) == int(gold):
            return Grade(reward=1.0, reason="correct", parsed=given)
        near = abs(int(given) - int(gold)) == 1
        return Grade(reward=self._partial if near else 0.0, reason="wrong", parsed=given)

    def parses_gold(self, gold: str) -> bool:
        """Rows whose answer cannot be graded against are counted and left out before the run starts."""
        return gold.isdecimal()
