"""The layouts of a task's rows: plain columns, verl's, and the raw columns of GPQA.

problem, answer, cot, solution     by the names that `columns` gives; a problem may be a chat
prompt, reward_model               verl: a chat, and `reward_model.ground_truth`
Question, Correct Answer, ...      GPQA as its authors publish it
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from latent_grpo.common.config import TaskConfig
from latent_grpo.common.config.monitoring_and_checkpoints import EvaluationProtocol
from latent_grpo.common.tasks.cells import (
    CellError,
    Messages,
    chat,
    gold_text,
    is_missing,
    joined_text,
    kind_of,
    read_cell,
)
from latent_grpo.common.tasks.gpqa import COLUMNS as GPQA_COLUMNS
from latent_grpo.common.tasks.gpqa import with_letters
from latent_grpo.common.tasks.tables import Row, TableError

AUTHORS_SOLUTION = "cot_answer"  # of the authors' files: the visible text, with the boxed answer at its end (METHOD §7)
VERLS_ANSWER = "reward_model.ground_truth"
T = TypeVar("T")


class Reading(NamedTuple):
    """A row's texts; one that it lacks is empty."""

    messages: Messages
    answer: str
    cot: str = ""
    solution: str = ""
    whole: bool = False  # whether the messages are a prompt as a whole


class Layout(NamedTuple):
    """How rows are read: the columns that are needed, and the function of row number and row."""

    columns: Collection[str]
    read: Callable[[int, Row], Reading]


def layout_of(config: TaskConfig, present: Sequence[str], protocol: EvaluationProtocol) -> Layout:
    """Returns the layout of a table with the columns `present`. Raises TableError where columns are missing."""
    columns, path = config.columns, str(config.path)
    named = columns.problem == "prompt" and not _has(present, columns.answer)
    if {"prompt", "reward_model"} <= set(present) and (named or not _has(present, columns.problem)):
        solution = _solution_column(config, present)
        own = "answer" in columns.model_fields_set and _has(present, columns.answer)
        truth = columns.answer if own else VERLS_ANSWER
        needed = [name for name in ("prompt", truth, columns.cot, solution) if name]
        return Layout(needed, partial(_read_verl, path, truth, columns.cot, solution))
    if columns.problem not in present and set(present) >= GPQA_COLUMNS:
        return Layout(GPQA_COLUMNS, partial(_read_gpqa, path, protocol))
    solution = _solution_column(config, present)
    boxed = solution is not None and not _has(present, columns.answer) and "answer" not in columns.model_fields_set
    for key, column in (("problem", columns.problem), ("answer", columns.answer)):
        if not _has(present, column) and not (key == "answer" and boxed):
            raise TableError(f"{_without(config, column, present)}. Set columns.{key}")
    if "cot" in columns.model_fields_set and not _has(present, columns.cot):
        raise TableError(_without(config, columns.cot, present))
    answer = None if columns.answer == solution else columns.answer
    needed = [name for name in (columns.problem, answer, columns.cot, solution) if name]
    return Layout(needed, partial(_read_plain, path, columns.problem, answer, columns.cot, solution))


def _has(present: Sequence[str], column: str) -> bool:
    return column in present or ("." in column and column.partition(".")[0] in present)


def _without(config: TaskConfig, column: str, present: Sequence[str]) -> str:
    return f"{config.path} has no column {column!r}; its columns are {', '.join(sorted(present))}"


def _solution_column(config: TaskConfig, present: Sequence[str]) -> str | None:
    """Returns the column of the visible text: the one that is set, else `solution`, else the authors'; None: none."""
    columns = config.columns
    if columns.solution is None or _has(present, columns.solution):
        return columns.solution
    if "solution" in columns.model_fields_set:
        raise TableError(
            f"{_without(config, columns.solution, present)}. Set columns.solution, or null to train the boxed answer "
            "alone"
        )
    return AUTHORS_SOLUTION if AUTHORS_SOLUTION in present else None


def _read_plain(
    path: str, problem: str, answer: str | None, cot: str, solution: str | None, number: int, row: Row
) -> Reading:
    def cell(column: str | None, read: Callable[[Any], T]) -> T:
        return read_cell(row, column, read, f"{path}, row {number}")

    messages, whole = cell(problem, chat)
    return Reading(messages, cell(answer, gold_text), cell(cot, joined_text), cell(solution, joined_text), whole)


def _read_verl(path: str, answer: str, cot: str, solution: str | None, number: int, row: Row) -> Reading:
    truth = row.get("reward_model")
    if answer == VERLS_ANSWER and not is_missing(truth) and not isinstance(truth, dict):
        raise CellError(
            f"{path}, row {number}: column 'reward_model' holds {kind_of(truth)}; expected an object with ground_truth"
        )
    found = _read_plain(path, "prompt", answer, cot, solution, number, row)
    return found._replace(whole=True)


def _read_gpqa(path: str, protocol: EvaluationProtocol, number: int, row: Row) -> Reading:
    try:
        question, letter = with_letters(number, row, protocol)
    except CellError as error:
        raise CellError(f"{path}, row {number}: {error}") from error
    return Reading((("user", question),), letter)
