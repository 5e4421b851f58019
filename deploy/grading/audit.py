"""The command `latent-grpo grade FILE`, which grades a file of (response, gold) and shows the reasons.

It prints a table of reasons with examples, and with `--compare` the rows on which plain math-verify disagrees.
Responses are hostile text: they are graded in a pool with its limits, and shown through
:func:`common.terminal_text.visible`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from latent_grpo.common.config import load_config
from latent_grpo.common.files import unwritable, write_atomically
from latent_grpo.common.golds import spelled
from latent_grpo.common.plugins import is_import_path
from latent_grpo.common.tasks.sources import describe_dropped
from latent_grpo.common.terminal_text import TextConsole, visible
from latent_grpo.deploy.grading import gold_check
from latent_grpo.deploy.grading.answer_file import AuditError, Row, read_answers
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.reward.answers import gold_is_parsable
from latent_grpo.reward.pool import VerifierPool
from latent_grpo.reward.verifier import REASONS, Definitions, Grade, Verifier
from latent_grpo.rollout_workers.verifiers import build_verifier, code_of, reward_errors, verifier_pool

PLAIN = "latent_grpo.reward.plain_math_verify:PlainMathVerify"
SHOWN_END = 160  # characters of a response's end that an example shows
CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Example:
    """A row and its grade."""

    row: int
    gold: str
    parsed: str | None
    response_end: str


@dataclass(frozen=True, slots=True)
class ReasonShare:
    """One line of the table of reasons."""

    count: int
    share: float
    examples: list[Example]


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A row that this verifier and plain math-verify judge differently, with both reasons."""

    row: int
    gold: str
    reason: str
    plain_reason: str
    parsed: str | None
    response_end: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The report; its `asdict` is the machine-readable form."""

    file: str
    kind: str
    rows: int
    mean_reward: float | None  # over graded rows
    seconds: float
    reasons: dict[str, ReasonShare]
    disagreements: list[Disagreement] | None = None  # None: not compared
    grades: list[Grade] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The pool's limits where no profile gives them."""

    processes: int
    time_limit_s: float
    fallback: str


def run_audit(
    file: Path,
    kind: str,
    limits: Limits,
    *,
    profile: str | None,
    compare: bool,
    golds: bool,
    columns: tuple[str | None, str | None],
    examples: int,
    output: Path | None,
    machine: bool,
    console: Console,
) -> None:
    """Runs the command. `columns` are those of response and gold, None for the usual names. Raises AuditError."""
    if golds and (compare or output):
        raise AuditError("--golds grades no responses; leave out --compare and --output")
    found = read_answers(file, *columns, golds_only=golds)
    rows = found.rows
    code = {kind} if profile is None else code_of(load_config(profile), kind)
    if named := sorted(path for path in code if is_import_path(path)):
        TextConsole(stderr=True).print(Text(f"runs code that the command names: {', '.join(named)}"), soft_wrap=True)
    if found.dropped:
        sentence = f"{file}: {describe_dropped(found.dropped)}"
        TextConsole(stderr=True).print(Text(sentence, style="yellow"), soft_wrap=True)
    with reward_errors(), _pool(profile, limits) as pool:
        if golds:
            findings = gold_check.check_golds(rows, kind, pool, _readable(profile, limits, kind))
            if machine:
                print(gold_check.as_json(findings))
            else:
                gold_check.show(findings, console, f"golds of {file} as {kind}", examples)
            return
        total = len(rows) * (2 if compare else 1)
        with Reporter(TextConsole(stderr=True)).phase("grade", total, "rows") as advance:
            report = audit(
                file, kind, pool, rows=rows, readable=_readable(profile, limits, kind), examples=examples,
                compare=compare, on_progress=advance,
            )  # fmt: skip
    if output is not None:
        write_grades(report, rows, output)
    if machine:
        print(as_json(report))
    else:
        show(report, console, examples)


def _pool(profile: str | None, limits: Limits) -> VerifierPool:
    if profile is not None:
        return verifier_pool(load_config(profile))
    try:
        return VerifierPool(limits.processes, limits.time_limit_s, options=_options(limits))
    except ValueError as error:
        raise AuditError(str(error)) from error


def _options(limits: Limits) -> dict[str, dict[str, str]]:
    return {kind: {"fallback": limits.fallback} for kind in ("math", "number")}


def _readable(profile: str | None, limits: Limits, kind: str) -> Callable[[str], bool]:
    """Returns whether the verifier can read a gold answer, which a run asks before it takes a row."""

    @cache
    def verifier() -> Verifier:  # built once it is needed: whether it can be built at all, the pool says
        if profile is not None:
            return build_verifier(load_config(profile), kind)
        return Definitions({}, _options(limits)).build(kind)

    return lambda gold: gold_is_parsable(verifier(), gold)


def audit(
    file: Path,
    kind: str,
    pool: VerifierPool,
    *,
    rows: list[Row],
    examples: int,
    readable: Callable[[str], bool] = lambda gold: True,
    compare: bool = False,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Audit:
    """Grades every row, with `compare` also by plain math-verify.

    A row whose gold answer is not `readable` is ungraded, as a run leaves it out: it says nothing about the response.
    """
    started = time.perf_counter()
    grades = _graded(pool, kind, rows, on_progress)
    doubted = {row.gold for row, grade in zip(rows, grades, strict=True) if grade.reason in ("no_answer", "wrong")}
    unread = {gold for gold in doubted if not readable(gold)}
    grades = [
        Grade(None, "ungraded", grade.parsed) if row.gold in unread else grade
        for row, grade in zip(rows, grades, strict=True)
    ]
    seconds = time.perf_counter() - started
    rewards = [grade.reward for grade in grades if grade.reward is not None]
    return Audit(
        file=str(file),
        kind=kind,
        rows=len(rows),
        mean_reward=sum(rewards) / len(rewards) if rewards else None,
        seconds=seconds,
        reasons={reason: _share(reason, rows, grades, examples) for reason in REASONS},
        disagreements=_compared(pool, rows, grades, on_progress) if compare else None,
        grades=grades,
    )


def _graded(pool: VerifierPool, kind: str, rows: list[Row], on_progress: Callable[[int], None]) -> list[Grade]:
    grades: list[Grade] = []
    for start in range(0, len(rows), CHUNK):
        grades += pool.grade_many([(kind, row.response or "", row.gold) for row in rows[start : start + CHUNK]])
        on_progress(len(grades))
    return grades


def _compared(
    pool: VerifierPool, rows: list[Row], grades: list[Grade], on_progress: Callable[[int], None]
) -> list[Disagreement]:
    plain = _graded(pool, PLAIN, rows, lambda done: on_progress(len(rows) + done))
    return _disagreements(rows, grades, plain)


def _share(reason: str, rows: list[Row], grades: list[Grade], examples: int) -> ReasonShare:
    found = [(row, grade) for row, grade in zip(rows, grades, strict=True) if grade.reason == reason]
    shown = [Example(row.number, spelled(row.gold), grade.parsed, _end(row)) for row, grade in found[:examples]]
    return ReasonShare(len(found), len(found) / len(rows), shown)


def _disagreements(rows: list[Row], grades: list[Grade], plain: list[Grade]) -> list[Disagreement]:
    return [
        Disagreement(row.number, spelled(row.gold), ours.reason, theirs.reason, ours.parsed, _end(row))
        for row, ours, theirs in zip(rows, grades, plain, strict=True)
        if (ours.reason == "correct") != (theirs.reason == "correct")
    ]


def _end(row: Row) -> str:
    return (row.response or "")[-SHOWN_END:]


# --- the report ------------------------------------------------------------------------------------------------------


def as_json(report: Audit) -> str:
    """Returns counts, examples and all disagreements as JSON; `--output` has the grades of single rows."""
    fields = asdict(report)
    del fields["grades"]
    return json.dumps(fields, indent=2)


def write_grades(report: Audit, rows: list[Row], output: Path) -> None:
    """Writes one JSON line per row: row, reward, reason, parsed. Raises AuditError, and then leaves no file."""
    graded = zip(rows, report.grades, strict=True)
    lines = [json.dumps({"row": row.number, **asdict(grade)}) + "\n" for row, grade in graded]
    try:
        if output.exists() and not output.is_file():  # a pipe or a device takes what it is given, and stays
            output.write_text("".join(lines), encoding="utf-8")
        else:
            write_atomically(output, "".join(lines))
    except OSError as error:
        raise AuditError(f"--output {output} {unwritable(error)}; give another file") from error


def show(report: Audit, console: Console, examples: int) -> None:
    """Prints the tables of reasons and of disagreements."""
    mean = "none graded" if report.mean_reward is None else f"mean reward {report.mean_reward:.4f}"
    rate = report.rows / report.seconds if report.seconds else 0.0
    table = Table(title=f"{report.file} graded as {report.kind}: {report.rows:,} rows, {mean}, {rate:,.0f} rows/s")
    for heading in ("reason", "rows", "share", "row"):
        table.add_column(heading, justify="left" if heading == "reason" else "right", no_wrap=True)
    for heading in ("gold", "parsed", "end of the response"):
        table.add_column(heading, overflow="fold")
    for reason, share in report.reasons.items():
        head = (reason, f"{share.count:,}", f"{share.share:.2%}")
        if not share.examples:
            table.add_row(*head)
        for number, example in enumerate(share.examples):
            table.add_row(*(head if number == 0 else ("", "", "")), *_cells(example))
        table.add_section()
    console.print(table)
    if report.disagreements is not None:
        _show_disagreements(report, console, examples)


def _show_disagreements(report: Audit, console: Console, examples: int) -> None:
    found = report.disagreements or []
    accepted = [d for d in found if d.plain_reason == "correct"]
    refused = [d for d in found if d.plain_reason != "correct"]
    table = Table(
        title=f"plain math-verify disagrees in {len(found):,} rows: "
        f"it accepts {len(accepted):,} that this verifier refuses, and refuses {len(refused):,} that it accepts"
    )
    for heading in ("here", "math-verify", "row"):
        table.add_column(heading, no_wrap=True)
    for heading in ("gold", "parsed", "end of the response"):
        table.add_column(heading, overflow="fold")
    for case in [*accepted[:examples], *refused[:examples]]:
        table.add_row(case.reason, case.plain_reason, *_cells(case))
    console.print(table)


def _cells(case: Example | Disagreement) -> tuple[str, Text, Text, Text]:
    """Returns row, gold, parsed and end of the response; as `Text`, so that brackets in them are no markup."""
    parsed = Text("-", style="dim") if case.parsed is None else Text(visible(case.parsed))
    return str(case.row), Text(visible(case.gold)), parsed, Text(visible(case.response_end))
