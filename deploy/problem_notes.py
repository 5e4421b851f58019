"""What a user should know of a run's problems and nobody looks up: known wrong answers, and problems in two tasks."""

from __future__ import annotations

from collections.abc import Sequence

from common.known_faults import fingerprint, known_fault
from common.tasks import StoredTask, TaskSource
from common.types import Problem

LISTED = 5


def notes(training: Sequence[TaskSource], evaluation: Sequence[TaskSource]) -> list[str]:
    """One line a finding, about stored tasks. Nothing is dropped: published figures include such rows."""
    tasks = [task for task in dict.fromkeys([*training, *evaluation]) if isinstance(task, StoredTask)]
    return [line for task in tasks if (line := mislabelled(task))] + overlaps(tasks)


def mislabelled(task: StoredTask) -> str:
    """`svamp: 1 row is known to be mislabelled, kept as published: row 679, answer 1, right 5`; empty if none is."""
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
    """A line for each two tasks that share problems; with the rows whose answers differ."""
    rows = [{fingerprint(_text(p)): p for p in map(task.problem, range(len(task)))} for task in tasks]
    lines = []
    for later in range(len(tasks)):
        for earlier in range(later):
            shared = [key for key in rows[earlier] if key in rows[later]]
            if not shared:
                continue
            pairs = [(rows[earlier][key], rows[later][key]) for key in shared]
            differing = [
                f"row {_row(a)}: {a.answer}, row {_row(b)}: {b.answer}" for a, b in pairs if a.answer != b.answer
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
