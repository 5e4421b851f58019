"""The reader of files with responses and gold answers: JSONL or Parquet, with columns of the usual names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_grpo.common.config import ConfigError
from latent_grpo.common.tasks.cells import cell_text, is_missing

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


def read_rows(
    file: Path, response_column: str | None = None, gold_column: str | None = None, *, golds_only: bool = False
) -> list[Row]:
    """Reads the rows of a `.jsonl` or `.parquet` file; columns have their usual names unless given. Raises AuditError.

    A dot in a column's name selects a part of a nested object (`reward_model.ground_truth`).
    """
    given = [name for name in (response_column, gold_column) if name]
    usual = (*RESPONSE_COLUMNS, *GOLD_COLUMNS, *PROBLEM_COLUMNS)
    wanted = {part for name in (*given, *usual) for part in (name, name.partition(".")[0])}
    present, records = _read_parquet(file, wanted) if file.suffix == ".parquet" else _read_jsonl(file)
    if not records:
        raise AuditError(f"{file} has no rows")
    first = records[0]

    def column(name: str | None, candidates: tuple[str, ...], option: str) -> str:
        for candidate in (name,) if name else candidates:
            if candidate in present or _value(first, candidate) is not None:
                return candidate
        missing = f"no column {name!r}" if name else f"none of the columns {', '.join(candidates)}"
        raise AuditError(f"{file} has {missing}; its columns are {', '.join(present)}. Choose one with {option}")

    gold_name = column(gold_column, GOLD_COLUMNS, "--gold-column")
    response_name = None if golds_only else column(response_column, RESPONSE_COLUMNS, "--response-column")
    problem_name = next((name for name in PROBLEM_COLUMNS if isinstance(_value(first, name), str)), None)
    rows = []
    for number, record in enumerate(records):
        gold, response = _value(record, gold_name), None if response_name is None else _value(record, response_name)
        for name, value in ((gold_name, gold), (response_name, response)):
            if name is not None and (is_missing(value) or isinstance(value, dict | list)):
                raise AuditError(f"{file}, row {number}: {name} is {value!r:.80}; expected a text or a number")
        problem = _value(record, problem_name) if problem_name else ""
        rows.append(Row(number, None if response is None else str(response), str(gold), cell_text(problem)))
    return rows


def _read_parquet(file: Path, wanted: set[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns (names of all columns, rows of the `wanted` ones), since a dump's trajectories are large."""
    import pyarrow.lib
    import pyarrow.parquet

    _check_there(file)
    try:
        present = pyarrow.parquet.read_schema(file).names
        return present, pyarrow.parquet.read_table(
            file, columns=[name for name in present if name in wanted]
        ).to_pylist()
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise AuditError(f"{file} cannot be read as Parquet: {error}") from error


def _read_jsonl(file: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns (names that occur, rows)."""
    _check_there(file)
    if file.suffix not in {".jsonl", ".json"}:
        raise AuditError(f"{file}: expected a name that ends in .jsonl or .parquet")
    records = []
    with file.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise AuditError(f"{file}, line {number}: not valid JSON: {error}") from error
            if not isinstance(record, dict):
                raise AuditError(f"{file}, line {number}: expected an object, got {line[:40]!r}")
            records.append(record)
    return list(dict.fromkeys(key for record in records for key in record)), records


def _check_there(file: Path) -> None:
    if not file.is_file():
        raise AuditError(f"{file} does not exist; give a .jsonl or .parquet file")


def _value(record: Any, name: str) -> Any:
    if isinstance(record, dict) and name in record:
        return record[name]
    for part in name.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record
