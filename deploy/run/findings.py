"""What the rows of a run's tasks say about themselves: known faults, golds that nothing can match, repetitions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

from latent_grpo.common.golds import OR, alternatives, spelled
from latent_grpo.common.tasks.cells import held, shown
from latent_grpo.common.tasks.known_faults import fingerprint, known_fault
from latent_grpo.common.tasks.sources import StoredTask, TaskSource
from latent_grpo.common.types import Problem
from latent_grpo.reward.verifier import Grade, UnreadableGoldError, Verifier, judged

LISTED = 5
MOST_GOLDS = 20_000  # distinct ones of a task that are tried, a second or two
Verifiers = Callable[[str], Verifier]


def notes(training: Sequence[TaskSource], evaluation: Sequence[TaskSource], verifiers: Verifiers) -> list[str]:
    """Returns a line per finding about stored tasks. Nothing is dropped, since published figures include such rows.

    `verifiers` builds the verifier of a name.
    """
    once = {(task.config.name, task.config.path): task for task in evaluation}  # a task may be read for two protocols
    tasks = [task for task in dict.fromkeys([*training, *once.values()]) if isinstance(task, StoredTask)]
    found = []
    for task in tasks:
        verifier = verifiers(task.config.verifier)
        found += [mislabelled(task), several_golds(task), refused_golds(task, verifier), contradictions(task, verifier)]
    return [line for line in found if line] + overlaps(tasks)


def refused_golds(task: StoredTask, verifier: Verifier) -> str:
    """Returns a line about gold answers that the verifier would not accept as a response, or an empty string.

    Such a row can never be answered correctly, whatever the model learns. Only what a built-in verifier decides in
    linear time is said; `latent-grpo grade FILE --golds` tries every gold, in several spellings.
    """
    first: dict[str, Problem] = {}
    for problem in map(task.problem, range(len(task))):
        first.setdefault(problem.answer, problem)
    refused = [p for gold, p in itertools.islice(first.items(), MOST_GOLDS) if _accepts(verifier, gold, gold) is False]
    if not refused:
        return ""
    listed = ", ".join(f"row {_row(p)}: {shown(p.answer)}" for p in refused[:LISTED])
    name, kind = task.config.name, task.config.verifier
    return (
        f"{name}: verifier {kind!r} would not accept {len(refused):,} of the gold answers as a response, so nothing "
        f"can be right there: {listed}"
    )


def contradictions(task: StoredTask, verifier: Verifier) -> str:
    """Returns a line about problems that occur again with another answer, or an empty string."""
    first: dict[str, Problem] = {}
    pairs = []
    for problem in map(task.problem, range(len(task))):
        before = first.setdefault(fingerprint(_text(problem)), problem)
        if before.answer != problem.answer and _accepts(verifier, problem.answer, before.answer) is False:
            pairs.append((before, problem))
    if not pairs:
        return ""
    listed = "; ".join(f"row {_row(a)}: {shown(a.answer)}, row {_row(b)}: {shown(b.answer)}" for a, b in pairs[:LISTED])
    again = "1 problem occurs" if len(pairs) == 1 else f"{len(pairs):,} problems occur"
    return f"{task.config.name}: {again} again with another answer, kept as they are ({listed})"


def _accepts(verifier: Verifier, response: str, gold: str) -> bool | None:
    """Whether a boxed gold is correct, for a built-in verifier that says so at once; None: it is not known.

    Either may be several golds: one of them that is correct against one of the others is enough.
    """
    quick = getattr(verifier, "quick_grade", None)
    if quick is None:
        return None
    found: list[Grade | None] = []
    for one in map(held, alternatives(response)):
        try:
            found.append(judged(partial(quick, rf"\boxed{{{one}}}"), gold))
        except UnreadableGoldError:
            return None
    if any(grade is not None and grade.reason == "correct" for grade in found):
        return True
    return None if None in found else False


def several_golds(task: StoredTask) -> str:
    """Returns a line about rows that list several gold answers, or an empty string."""
    found = [problem for problem in map(task.problem, range(len(task))) if OR in problem.answer]
    if not found:
        return ""
    rows = "1 row lists" if len(found) == 1 else f"{len(found):,} rows list"
    return (
        f"{task.config.name}: {rows} several gold answers, and any of them is right, for example row {_row(found[0])}: "
        f"{shown(found[0].answer)}"
    )


def mislabelled(task: StoredTask) -> str:
    """Returns a line about a task's known mislabelled rows, or an empty string.

    For example: `svamp: 1 row is known to be mislabelled, kept as published: row 679, answer 1, right 5`.
    """
    found = [
        (problem, fault)
        for problem in map(task.problem, range(len(task)))
        if (fault := known_fault(_text(problem), problem.answer)) is not None
    ]
    if not found:
        return ""
    listed = "; ".join(f"row {_row(p)}, answer {f.published}, right {f.right}" for p, f in found[:LISTED])
    rows = "1 row is" if len(found) == 1 else f"{len(found)} rows are"
    return f"{task.config.name}: {rows} known to be mislabelled, kept as published: {listed}"


def overlaps(tasks: Sequence[StoredTask]) -> list[str]:
    """Returns a line for each pair of tasks that share problems, with the rows whose answers differ."""
    rows = [{fingerprint(_text(p)): p for p in map(task.problem, range(len(task)))} for task in tasks]
    lines = []
    for later in range(len(tasks)):
        for earlier in range(later):
            shared = [key for key in rows[earlier] if key in rows[later]]
            if not shared:
                continue
            pairs = [(rows[earlier][key], rows[later][key]) for key in shared]
            differing = [
                f"row {_row(a)}: {spelled(a.answer)}, row {_row(b)}: {spelled(b.answer)}"
                for a, b in pairs
                if a.answer != b.answer
            ]
            line = f"{tasks[earlier].config.name} and {tasks[later].config.name} share {len(shared):,} problems"
            if differing:
                listed = "; ".join(differing[:LISTED]) + ("; ..." if len(differing) > LISTED else "")
                line += f", {len(differing)} of them with answers that are written differently ({listed})"
            lines.append(line)
    return lines


def _text(problem: Problem) -> str:
    return "\n".join(content for role, content in problem.messages if role == "user")


def _row(problem: Problem) -> str:
    return problem.uid.rpartition("/")[2]
