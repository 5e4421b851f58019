"""The check of `latent-grpo grade FILE --golds`: whether gold answers can be graded against, before a run uses them.

Every gold is graded against itself in its usual spellings. The report lists golds that the verifier cannot read,
spellings that it refuses, rows that are known to be mislabelled, and problems that occur with different answers.
Nothing is dropped.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction

from rich.console import Console
from rich.table import Table
from rich.text import Text

from latent_grpo.common.golds import alternatives, spelled
from latent_grpo.common.tasks.cells import held
from latent_grpo.common.tasks.known_faults import fingerprint, known_fault
from latent_grpo.common.terminal_text import visible
from latent_grpo.deploy.grading.answer_file import Row
from latent_grpo.reward.numbers import read_number
from latent_grpo.reward.pool import VerifierPool


@dataclass(frozen=True, slots=True)
class GoldIssue:
    """One finding: the row, its gold, and what is wrong with it."""

    row: int
    gold: str
    finding: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldReport:
    """The findings of a data set; empty lists are the good case."""

    rows: int
    spellings: int
    unreadable: list[GoldIssue]
    refused: list[GoldIssue]
    mislabelled: list[GoldIssue]
    contradictory: list[GoldIssue]
    repeated: int  # rows whose problem occurred before, with the same answer


def check_golds(
    rows: list[Row], kind: str, pool: VerifierPool, readable: Callable[[str], bool] = lambda gold: True
) -> GoldReport:
    """Grades every distinct gold against its own spellings, and finds rows that cannot be right.

    `readable` says whether a run would take a row with this gold.
    """
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.gold, row)
    cases = [
        (row, gold, spelling)
        for row in first.values()
        for gold in alternatives(row.gold)
        for spelling in usual_spellings(kind, gold)
    ]
    grades = pool.grade_many([(kind, rf"So it is \boxed{{{spelling}}}.", gold) for _, gold, spelling in cases])
    unreadable: dict[str, GoldIssue] = {}
    refused = []
    for (row, gold, spelling), grade in zip(cases, grades, strict=True):
        if gold in unreadable:
            continue
        if grade.reason == "ungraded" or not readable(gold):
            unreadable[gold] = GoldIssue(row.number, gold, f"the verifier {kind!r} cannot read it")
        elif grade.reason != "correct":
            refused.append(GoldIssue(row.number, gold, f"{spelling!r} is graded {grade.reason}"))
    mislabelled = [
        GoldIssue(row.number, row.gold, f"{fault.benchmark}: the right answer is {fault.right}: {fault.why}")
        for row in rows
        if (fault := known_fault(row.problem, row.gold)) is not None
    ]
    contradictory, repeated = _repetitions(rows, kind, pool)
    return GoldReport(
        rows=len(rows),
        spellings=len(cases),
        unreadable=list(unreadable.values()),
        refused=refused,
        mislabelled=mislabelled,
        contradictory=contradictory,
        repeated=repeated,
    )


def _repetitions(rows: list[Row], kind: str, pool: VerifierPool) -> tuple[list[GoldIssue], int]:
    """Finds problems that occur again: those whose answers differ, and the number of the others."""
    by_problem: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.problem:
            by_problem[fingerprint(row.problem)].append(row)
    again = [(same[0], row) for same in by_problem.values() for row in same[1:]]
    cases = [(place, gold) for place, (_, row) in enumerate(again) for gold in alternatives(row.gold)]
    grades = pool.grade_many([(kind, rf"\boxed{{{gold}}}", again[place][0].gold) for place, gold in cases])
    agreeing = {place for (place, _), grade in zip(cases, grades, strict=True) if grade.reason == "correct"}
    contradictory = [
        GoldIssue(
            row.number,
            spelled(row.gold),
            f"the same problem has the answer {spelled(first.gold)!r} in row {first.number}",
        )
        for place, (first, row) in enumerate(again)
        if row.gold != first.gold and place not in agreeing
    ]
    return contradictory, len(again) - len(contradictory)


def usual_spellings(kind: str, gold: str) -> Iterator[str]:
    """Yields how a correct response may write this gold in its box: as it is, with spaces, a unit, or as a fraction."""
    yield from dict.fromkeys((gold, held(gold)))
    if kind == "choice":
        letter = gold.strip(" ().")
        yield from (f"({letter})", rf"\text{{{letter}}}", f"{letter}.", rf"\textbf{{({letter})}}")
        return
    yield f"${gold}$"
    yield f" {gold} ."
    if "\\frac" in gold:
        yield gold.replace("\\frac", "\\dfrac")
    number = read_number(gold, words=False)
    if (
        number is None
        or number.other is not None
        or not re.match(r"\s*[-+.0-9\\$]", gold)
        or not re.search("[0-9]", gold)
    ):
        return
    yield rf"{gold}\text{{ units}}"
    yield f"x = {gold}"
    value = number.value
    yield rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    yield f"{2 * value.numerator}/{2 * value.denominator}"
    if value.denominator == 1:
        yield from (f"{value.numerator:,}", rf"\$ {value.numerator:,}", f"{value.numerator}.0")
    elif (exact := _decimal(value)) is not None:
        yield exact


def _decimal(value: Fraction) -> str | None:
    """Returns the decimal with at most twelve places, if it is exact."""
    scaled = value * 10**12
    if scaled.denominator != 1:
        return None
    digits = str(abs(scaled.numerator)).rjust(13, "0")
    return ("-" if value < 0 else "") + digits[:-12] + "." + digits[-12:]


def as_json(report: GoldReport) -> str:
    """Returns the whole report as JSON."""
    return json.dumps(asdict(report), indent=2)


def show(report: GoldReport, console: Console, title: str, limit: int) -> None:
    """Prints the findings by kind, at most `limit` rows of each; counts include all."""
    table = Table(title=f"{title}: {report.rows:,} rows, {report.spellings:,} spellings graded")
    for heading in ("finding", "rows", "row"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "finding" else "right")
    for heading in ("gold", "what"):
        table.add_column(heading, overflow="fold")
    for name in ("unreadable", "refused", "mislabelled", "contradictory"):
        found: list[GoldIssue] = getattr(report, name)
        if not found:
            table.add_row(name, "0")
        for position, issue in enumerate(found[:limit]):
            head = (name, f"{len(found):,}") if position == 0 else ("", "")
            table.add_row(*head, str(issue.row), Text(visible(spelled(issue.gold))), Text(visible(issue.finding)))
        table.add_section()
    table.add_row("repeated", f"{report.repeated:,}", "", "", "problems that occur again with the same answer")
    console.print(table)
