"""Files of responses and gold answers: JSONL or Parquet, one row each, columns by their usual names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import ConfigError

RESPONSE_COLUMNS = ("response", "response_text", "completion", "output", "prediction", "generation")
GOLD_COLUMNS = ("gold", "gold_answer", "answer", "ground_truth", "reward_model.ground_truth", "target")
PROBLEM_COLUMNS = ("problem", "question", "prompt")


class AuditError(ConfigError):
    """A file that cannot be audited; the message says what was found and what to give."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the file. `response` is None where only golds are wanted."""

    number: int
    response: str | None
    gold: str
    problem: str


def read_rows(
    file: Path, response_column: str | None = None, gold_column: str | None = None, *, golds_only: bool = False
) -> list[Row]:
    """The rows of a `.jsonl` or `.parquet` file; columns by their usual names unless given. Raises AuditError.

    A dot in a column's name goes into a nested object (`reward_model.ground_truth`).
    """
    records = list(_records(file))
    if not records:
        raise AuditError(f"{file} has no rows")
    gold_name = _column(file, records[0], gold_column, GOLD_COLUMNS, "--gold-column")
    response_name = (
        None if golds_only else _column(file, records[0], response_column, RESPONSE_COLUMNS, "--response-column")
    )
    problem_name = next((name for name in PROBLEM_COLUMNS if isinstance(_value(records[0], name), str)), None)
    rows = []
    for number, record in enumerate(records):
        gold, response = _value(record, gold_name), None if response_name is None else _value(record, response_name)
        for name, value in ((gold_name, gold), (response_name, response)):
            if name is not None and (value is None or isinstance(value, dict | list)):
                raise AuditError(f"{file}, row {number}: {name} is {value!r:.80}; expected a text or a number")
        problem = _value(record, problem_name) if problem_name else ""
        rows.append(Row(number, None if response is None else str(response), str(gold), str(problem or "")))
    return rows


def _records(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        raise AuditError(f"{file} does not exist; give a .jsonl or .parquet file")
    if file.suffix == ".parquet":
        import pyarrow.lib
        import pyarrow.parquet

        try:
            yield from pyarrow.parquet.read_table(file).to_pylist()
        except (pyarrow.lib.ArrowException, OSError) as error:
            raise AuditError(f"{file} cannot be read as Parquet: {error}") from error
        return
    if file.suffix not in {".jsonl", ".json"}:
        raise AuditError(f"{file}: expected a name that ends in .jsonl or .parquet")
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
            yield record


def _column(file: Path, record: dict[str, Any], given: str | None, usual: tuple[str, ...], option: str) -> str:
    for name in (given,) if given else usual:
        if _value(record, name) is not None:
            return name
    wanted = f"no column {given!r}" if given else f"none of the columns {', '.join(usual)}"
    raise AuditError(f"{file} has {wanted}; there: {', '.join(map(str, record))}. Name it with {option}")


def _value(record: Any, name: str) -> Any:
    if isinstance(record, dict) and name in record:
        return record[name]
    for part in name.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record
