"""GPQA as its authors publish it: a question, the correct answer and three incorrect ones, without letters.

Which letter the correct answer gets is a function of the row's number alone, so every model is asked the same thing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from latent_grpo.common.tasks.cells import cell_text

QUESTION, CORRECT = "Question", "Correct Answer"
INCORRECT = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
COLUMNS = {QUESTION, CORRECT, *INCORRECT}
LETTERS = "ABCD"


def with_letters(number: int, row: Mapping[str, Any]) -> tuple[str, str]:
    """Returns (question with its options, letter of the correct one) of row `number`; ("", "") if a part is missing."""
    parts = [cell_text(row.get(column)).strip() for column in (QUESTION, CORRECT, *INCORRECT)]
    if not all(parts):
        return parts[0], ""
    question, *answers = parts
    order = random.Random(f"gpqa/{number}").sample(range(len(answers)), len(answers))
    options = "\n".join(f"{letter}. {answers[place]}" for letter, place in zip(LETTERS, order, strict=True))
    return f"{question}\n\n{options}", LETTERS[order.index(0)]
