"""The selection of a run's trajectories: the searched columns, the filters, and the message without a match."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from latent_grpo.common.config import ConfigError
from latent_grpo.common.schema import CORRECT
from latent_grpo.common.store import DumpFile
from latent_grpo.common.terminal_text import visible

SORTS = ("step", "length", "latent", "latent_share", "exit", "reward", "seconds", "advantage")


class InspectionError(ConfigError):
    """A run or a selection of trajectories that cannot be shown; the message says what exists instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One dumped trajectory without its steps.

    `outcome`, `why` and `advantage` are the learner's, and None without a record.
    """

    file: DumpFile
    index: int  # row of the file
    task: str
    problem_uid: str
    group_uid: str
    sample_index: int
    version: int  # policy version at the rollout's start
    reward: float | None  # None: ungraded
    grade_reason: str
    finish_reason: str
    gold_answer: str
    parsed_answer: str | None
    length: int  # T: response steps
    latent: int  # L: latent steps among them
    seconds: float  # of generation
    outcome: str | None = None
    why: str | None = None
    advantage: float | None = None

    @property
    def step(self) -> int:
        return self.file.step

    @property
    def purpose(self) -> str:
        return self.file.purpose

    @property
    def correct(self) -> bool:
        """Whether the verifier calls the answer `correct`; everything else, a partial reward too, is a failure."""
        return self.grade_reason == CORRECT

    @property
    def latent_share(self) -> float:
        """Share of its response steps that are latent."""
        return self.latent / self.length if self.length else 0.0

    @property
    def exit(self) -> int | None:
        """The number of latent steps before it left latent mode; None if it never did."""
        return self.latent if self.latent < self.length else None

    @property
    def other_reward(self) -> bool:
        """Whether the reward is not the usual one: 1 for a correct answer, 0 for any other."""
        return self.reward is not None and self.reward != float(self.correct)

    @property
    def reasons(self) -> tuple[str, ...]:
        """All reasons by which `--reason` finds this row."""
        return tuple(r for r in (self.grade_reason, self.finish_reason, self.outcome, self.why) if r)

    @property
    def name(self) -> str:
        """How the row is named for people: step, group and sample."""
        return f"step {self.step}, {self.group_uid} #{self.sample_index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """The filters of a selection; without any, all trajectories match.

    Steps are inclusive ranges; texts match a part of the name.
    """

    steps: tuple[tuple[int, int], ...] = ()
    purpose: str | None = None
    task: str | None = None
    failed: bool = False
    correct: bool = False
    reason: str | None = None
    group: str | None = None
    problem: str | None = None
    sample_index: int | None = None
    min_length: int | None = None
    max_length: int | None = None
    sort: str = "step"  # with a leading "-": descending
    lineage: int | None = None  # None: the live history

    def __post_init__(self) -> None:
        if self.failed and self.correct:
            raise InspectionError("--failed and --correct exclude each other: no trajectory is both")
        low, high = self.min_length, self.max_length
        if low is not None and high is not None and low > high:
            raise InspectionError(f"--min-length {low} is larger than --max-length {high}: nothing can match")
        if self.sort.removeprefix("-") not in SORTS:
            raise InspectionError(
                f"--sort {self.sort!r}: expected one of {', '.join(SORTS)}, with a leading - for descending"
            )

    @property
    def choosing(self) -> bool:
        """Whether any filter besides the order is set."""
        return any(name != "sort" for name, _ in self._given())

    def _given(self) -> Iterator[tuple[str, Any]]:
        """Yields the filters that are set. A number is set where it is not None: 0 is a sample and a lineage."""
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not (value is None or value is False or value == ()):
                yield name, value

    def __str__(self) -> str:
        """The filters as options of the command line."""
        words = [f"--step {a}" if a == b else f"--step {a}-{b}" for a, b in self.steps]
        for name, value in self._given():
            if name in ("steps", "sort"):
                continue
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
        return " ".join(words) or "no filter"

    def has_step(self, step: int) -> bool:
        """Whether the filters take a step."""
        return not self.steps or any(a <= step <= b for a, b in self.steps)

    def accepts(self, row: Row) -> bool:
        """Whether the filters, but for the step, take a row."""
        return (
            (self.task is None or self.task in row.task)
            and not (self.failed and row.correct)
            and not (self.correct and not row.correct)
            and (self.reason is None or self.reason in row.reasons)
            and (self.group is None or self.group in row.group_uid)
            and (self.problem is None or self.problem in row.problem_uid)
            and (self.sample_index is None or self.sample_index == row.sample_index)
            and (self.min_length is None or row.length >= self.min_length)
            and (self.max_length is None or row.length <= self.max_length)
        )


def parse_steps(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Parses `["10", "20-40"]` into ((10, 10), (20, 40)). Raises InspectionError."""
    spans = []
    for text in texts:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
        if found is None or (found[2] and int(found[2]) < int(found[1])):
            raise InspectionError(f"--step {text!r}: expected a step such as 10, or a range such as 10-40")
        spans.append((int(found[1]), int(found[2] or found[1])))
    return tuple(spans)


def exact_matches_first(rows: list[Row], filters: Filters) -> list[Row]:
    """Keeps only exact matches of a name given in full (`sums/1`), without names that contain it (`sums/10`)."""
    for wanted, name in ((filters.problem, "problem_uid"), (filters.group, "group_uid"), (filters.task, "task")):
        exact = [row for row in rows if getattr(row, name) == wanted]
        rows = exact or rows
    return rows


def ordered(rows: list[Row], sort: str) -> list[Row]:
    """Returns the rows in an order of `--sort`; those without a value come last."""
    name = sort.removeprefix("-")
    if name == "step":
        return rows[::-1] if sort.startswith("-") else rows
    values = {id(row): getattr(row, name) for row in rows}
    known = [row for row in rows if values[id(row)] is not None and not math.isnan(values[id(row)])]
    if not known:
        why = "none of them left latent mode, or had one" if name == "exit" else WITHOUT_RECORDS
        raise InspectionError(f"--sort {name}: none of the {len(rows)} trajectories has it; {why}")
    held = set(map(id, known))
    ordered = sorted(known, key=lambda row: values[id(row)], reverse=sort.startswith("-"))
    return ordered + [row for row in rows if id(row) not in held]


WITHOUT_RECORDS = (
    "this run has no learner records for them (it was made before they existed, or the dump is not of training)"
)


def no_match(filters: Filters, every: Sequence[Row]) -> str:
    """Returns a message that nothing matched, with what the dumps of the chosen steps hold."""
    parts = [f"no trajectory matches {filters}; {len(every)} were searched"]
    if filters.reason is not None:
        found = Counter(reason for row in every for reason in row.reasons)
        parts.append("reasons found: " + ", ".join(f"{name} ({n})" for name, n in found.most_common()))
    if filters.task is not None:
        parts.append("tasks: " + ", ".join(sorted({row.task for row in every})))
    if (filters.min_length, filters.max_length) != (None, None) and every:
        lengths = [row.length for row in every]
        parts.append(f"lengths: {min(lengths)} to {max(lengths)} response steps")
    if filters.group is not None or filters.problem is not None:
        parts.append(f"for example, group {every[0].group_uid} has problem {every[0].problem_uid}" if every else "")
    return visible(". ".join(part for part in parts if part))
