"""A verifier of your own: an answer that misses the right number by one earns a part of the reward.

A verifier is a class with a method `grade`. It is built once in each grader process, with the options of the settings
as arguments, and then called for one response after another. Grader processes have limits of time and memory, and may
be killed: keep nothing there that must last.
"""

from __future__ import annotations

import re

from latent_grpo.reward.verifier import Grade

ANSWER = re.compile(r"\\boxed\{\s*(-?\d+)\s*\}")


class NearMiss:
    """Named in the settings by its import path, `near_miss:NearMiss`."""

    def __init__(self, partial: float = 0.3) -> None:
        # What is raised here is said before the run starts, as one line.
        if not 0 <= partial < 1:
            raise ValueError(f"partial is {partial!r}; it must be at least 0 and below 1, the reward of a right answer")
        self._partial = partial

    def grade(self, response_text: str, gold: str) -> Grade:
        """`response_text` is what the model wrote after its latent thoughts, `gold` the task's answer.

        `correct` and the other reasons are counted in the metrics; the reward is what training sees. What is raised
        here makes the sample `ungraded`, which keeps it out of training: a response that makes no sense must therefore
        get a grade, and not an exception.
        """
        answers = ANSWER.findall(response_text)
        if not answers:
            return Grade(reward=0.0, reason="no_answer")
        given = answers[-1]  # the last one counts, as for the built-in kinds
        if len(given) > 20:
            return Grade(reward=0.0, reason="wrong", parsed=given)
        distance = abs(int(given) - int(gold))
        if distance == 0:
            return Grade(reward=1.0, reason="correct", parsed=given)
        return Grade(reward=self._partial if distance == 1 else 0.0, reason="wrong", parsed=given)

    def parses_gold(self, gold: str) -> bool:
        """Optional. Rows of a file whose answer cannot be graded against are dropped and counted before the start."""
        return re.fullmatch(r"-?\d+", gold) is not None
