"""The reader of files with responses and gold answers, with columns of the usual names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_grpo.common.config import ConfigError
from latent_grpo.common.tasks.cells import CellError, cell_text, chat, gold_text, is_missing, read_cell, value_of
from latent_grpo.common.tasks.sources import describe_dropped
from latent_grpo.common.tasks.tables import TableError, open_table

RESPONSE_COLUMNS = ("response", "response_text", "completion", "output", "prediction", "generation")
GOLD_COLUMNS = ("gold", "gold_answer", "answer", "ground_truth", "reward_model.ground_truth", "target")
PROBLEM_COLUMNS = ("problem", "question", "prompt")


class AuditError(ConfigError):
    """A file that cannot be audited; the message says what was found and what is expected."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the file. `response` is None where only gold answers are checked."""

    number: int
    response: str | None
    gold: str
    problem: str


@dataclass(frozen=True, slots=True)
class Answers:
    """The rows of a file, and the numbers of those that lack a gold answer or a response, by what they lack."""

    rows: list[Row]
    dropped: dict[str, list[int]]


def read_answers(
    file: Path, response_column: str | None = None, gold_column: str | None = None, *, golds_only: bool = False
) -> Answers:
    """Reads files in any of the formats of a task; columns have their usual names unless given. Raises AuditError.

    A dot in a column's name selects a part of a nested object (`reward_model.ground_truth`). Only the named columns are
    read, since a dump's trajectories are large.
    """
    try:
        table = open_table(str(file))
        wanted = {*RESPONSE_COLUMNS, *GOLD_COLUMNS, *PROBLEM_COLUMNS} | {response_column or "", gold_column or ""}
        return _answers(file, list(table.rows(wanted)), table.columns, response_column, gold_column, golds_only)
    except (TableError, CellError) as error:
        raise AuditError(str(error)) from error


def _answers(
    file: Path,
    records: list[dict[str, Any]],
    present: Collection[str],
    response_column: str | None,
    gold_column: str | None,
    golds_only: bool,
) -> Answers:
    if not records:
        raise AuditError(f"{file} has no rows")

    def column(name: str | None, candidates: tuple[str, ...], option: str) -> str:
        for candidate in (name,) if name else candidates:
            if candidate in present or any(value_of(record, candidate) is not None for record in records):
                return candidate
        missing = f"no column {name!r}" if name else f"none of the columns {', '.join(candidates)}"
        raise AuditError(f"{file} has {missing}; its columns are {', '.join(present)}. Choose one with {option}")

    gold_name = column(gold_column, GOLD_COLUMNS, "--gold-column")
    response_name = None if golds_only else column(response_column, RESPONSE_COLUMNS, "--response-column")
    problem_name = next((name for name in PROBLEM_COLUMNS if name in present and name != response_name), None)
    rows: list[Row] = []
    dropped: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        where = f"{file}, row {number}"
        lacks = [name for name in (gold_name, response_name) if name is not None and is_missing(value_of(record, name))]
        if lacks:
            dropped.setdefault(f"without {lacks[0]}", []).append(number)
            continue
        response = None if response_name is None else read_cell(record, response_name, cell_text, where)
        messages, _ = read_cell(record, problem_name, chat, where)
        problem = "\n".join(content for role, content in messages if role == "user")
        rows.append(Row(number, response, read_cell(record, gold_name, gold_text, where), problem))
    if not rows:
        raise AuditError(f"{file}: none of its {len(records)} rows can be graded: {describe_dropped(dropped)}")
    return Answers(rows, dropped)
