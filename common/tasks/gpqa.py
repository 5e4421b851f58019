"""GPQA as its authors publish it: a question, the correct answer and three incorrect ones, without letters.

Which letter the correct answer gets is a function of the row's number alone, so every model is asked the same thing.
The two protocols of evaluation (METHOD §8) have different orders and different texts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from latent_grpo.common.config.monitoring_and_checkpoints import EvaluationProtocol
from latent_grpo.common.tasks.cells import cell_text

QUESTION, CORRECT = "Question", "Correct Answer"
INCORRECT = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
COLUMNS = {QUESTION, CORRECT, *INCORRECT}
LETTERS = "ABCD"
REFERENCE_SEED = 42


def with_letters(number: int, row: Mapping[str, Any], protocol: EvaluationProtocol = "ours") -> tuple[str, str]:
    """Returns (question with its options, letter of the correct one) of row `number`; ("", "") if a part is missing."""
    parts = [cell_text(row.get(column)).strip() for column in (QUESTION, CORRECT, *INCORRECT)]
    if not all(parts):
        return parts[0], ""
    question, *answers = parts
    if protocol == "reference":
        order = list(range(len(answers)))
        random.Random(REFERENCE_SEED + number).shuffle(order)
        form, between = "({}) {}", "\n"
    else:
        order = random.Random(f"gpqa/{number}").sample(range(len(answers)), len(answers))
        form, between = "{}. {}", "\n\n"
    options = "\n".join(form.format(letter, answers[place]) for letter, place in zip(LETTERS, order, strict=True))
    return question + between + options, LETTERS[order.index(0)]
