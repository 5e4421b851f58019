"""The layouts in which data sets are published, and their rows in the product's columns.

    problem, answer                      the authors' tests as .jsonl, and most benchmarks
    problem, cot, cot_answer             the authors' training set: `cot_answer` is the visible text, with the last box
    prompt, reward_model, extra_info     verl: messages with the instruction in them, and the gold answer
    question, steps, answer              GSM8K-Aug: the steps are the equations
    problem, solution                    MATH: the answer is the solution's last box

The product's columns are problem, answer, cot (the chain of thought that Latent-SFT compresses) and solution (the
visible text after it); a text that a layout lacks is empty.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from latent_grpo.common.config import ConfigError
from latent_grpo.common.tasks.benchmarks import INSTRUCTION
from latent_grpo.common.tasks.cells import (
    CellError,
    cell_text,
    chat,
    gold_text,
    is_missing,
    joined_text,
    read_cell,
    shown,
)
from latent_grpo.common.tasks.gpqa import COLUMNS as GPQA_COLUMNS
from latent_grpo.reward.extraction import extract

COLUMNS = ("problem", "answer", "cot", "solution")
VERL, AUTHORS = {"prompt", "reward_model"}, {"problem", "cot_answer"}
GSM8K_AUG, PLAIN, MATH = {"question", "steps", "answer"}, {"problem", "answer"}, {"problem", "solution"}
LAYOUTS = (VERL, AUTHORS, GSM8K_AUG, PLAIN, MATH)
READ = set().union(*LAYOUTS) | {"cot", "extra_info"}  # all columns that a known layout reads
Row = Mapping[str, Any]


class UnknownLayout(ConfigError):
    """Rows that are in none of the known layouts."""


class IncompleteRow(UnknownLayout):
    """A row of a known layout without a problem or an answer."""


def is_known(columns: Collection[str]) -> bool:
    """Whether a table with these columns is in a known layout."""
    return any(layout <= set(columns) for layout in LAYOUTS)


def product_row(row: Row) -> dict[str, str]:
    """Returns the row in the product's columns. Raises :class:`UnknownLayout`, which says what was found."""
    try:
        return _product_row(row)
    except CellError as error:
        raise UnknownLayout(f"a cell of {shown(dict(row))} cannot be read: {error}") from error


def _product_row(row: Row) -> dict[str, str]:
    if row.keys() >= VERL:
        return _whole(_of_verl(row))
    if row.keys() >= AUTHORS:
        text = joined_text(row["cot_answer"])
        answer = gold_text(row.get("answer")) or _boxed(text)
        return _whole({"problem": row["problem"], "answer": answer, "cot": row.get("cot"), "solution": text})
    if row.keys() >= GSM8K_AUG:
        return _whole({"problem": row["question"], "answer": row["answer"], "cot": row["steps"]})
    if row.keys() >= PLAIN:
        return _whole(row)
    if row.keys() >= MATH:
        text = joined_text(row["solution"])
        return _whole({"problem": row["problem"], "answer": _boxed(text), "solution": text})
    if row.keys() >= GPQA_COLUMNS:
        raise UnknownLayout("these are the raw columns of GPQA, which are read as they are; leave the file where it is")
    raise UnknownLayout(
        f"the columns {', '.join(sorted(row))} are none of the known layouts (problem, answer; problem, cot, "
        "cot_answer; prompt, reward_model; question, steps, answer; problem, solution)"
    )


READERS = {"problem": cell_text, "answer": gold_text, "cot": joined_text, "solution": joined_text}


def _whole(found: Row) -> dict[str, str]:
    texts = {name: read_cell(found, name, READERS[name], "the row").strip() for name in COLUMNS}
    missing = [name for name in ("problem", "answer") if not texts[name]]
    if missing:
        raise IncompleteRow(f"{' and '.join(missing)} cannot be found in {dict(found)!r:.200}")
    return texts


def _boxed(text: str) -> str:
    return extract(text).content or ""


def _of_verl(row: Row) -> dict[str, Any]:
    """The problem of verl's `extra_info.question`, else of the user message; either without the instruction's line."""
    truth, extra = row["reward_model"], row.get("extra_info") or {}
    if is_missing(truth) or is_missing(row["prompt"]):
        raise IncompleteRow(f"reward_model or prompt is empty in {shown(dict(row))}")
    if not isinstance(truth, Mapping) or "ground_truth" not in truth:
        raise UnknownLayout(f"reward_model has no ground_truth: {truth!r:.200}")
    texts = {"answer": truth["ground_truth"], "cot": row.get("cot"), "solution": row.get("cot_answer")}
    if question := cell_text(extra.get("question")):
        return texts | {"problem": _without_instruction(question, "extra_info.question")}
    messages, _ = chat(row["prompt"])
    users = [content for role, content in messages if role == "user"]
    instructed = INSTRUCTION in "\n".join(content for _, content in messages)
    if len(users) != 1 or not instructed:
        raise UnknownLayout(
            f"the prompt is not one user message with the instruction {INSTRUCTION!r}, so the problem cannot be told "
            f"from it: {row['prompt']!r:.200}"
        )
    return texts | {"problem": _without_instruction(users[0], "the user message")}


def _without_instruction(text: str, where: str) -> str:
    """The text without lines that are the instruction. Raises :class:`UnknownLayout` where it shares a line."""
    kept = "\n".join(line for line in text.split("\n") if line.strip() != INSTRUCTION)
    if INSTRUCTION in kept:
        raise UnknownLayout(
            f"{where} has the instruction {INSTRUCTION!r} on a line with other text, so the problem cannot be told "
            f"from it: {text!r:.200}. Put the instruction on a line of its own, or write a column `problem` without it"
        )
    return kept
