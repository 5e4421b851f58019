"""Sources of problems (files, the hub, generators), and the endless order of training (METHOD §2.5, §8).

A problem's identity is task name and row number in its source, so dropping a faulty row renames no other.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from latent_grpo.common.config import ConfigError, TaskConfig
from latent_grpo.common.config.monitoring_and_checkpoints import EvaluationProtocol
from latent_grpo.common.golds import OR, alternatives, any_of
from latent_grpo.common.tasks.arithmetic import ChainArithmetic
from latent_grpo.common.tasks.benchmarks import BENCHMARKS, how_to_get
from latent_grpo.common.tasks.cells import CellError, shown
from latent_grpo.common.tasks.generator import PREFIX, Generator, UsersGenerator
from latent_grpo.common.tasks.layouts import Reading, layout_of
from latent_grpo.common.tasks.tables import KNOWN, Row, Table, TableError, exists, of_dataset, open_table
from latent_grpo.common.tasks.words import WordProblems
from latent_grpo.common.types import Problem

EMPTY_PROBLEM, EMPTY_ANSWER, UNREADABLE_ANSWER = "empty problem", "empty answer", "unreadable gold answer"


class TaskError(ConfigError):
    """A source of problems that cannot be used. The message says what was found and what to change."""


# --- sources -----------------------------------------------------------------------------------------------------


class TaskSource(Protocol):
    """A run's view of a task: problems by index. `size` is None for an endless task."""

    config: TaskConfig
    dropped: dict[str, list[int]]  # reason -> row numbers in the source

    @property
    def size(self) -> int | None:
        """The number of problems; None: endless."""

    def problem(self, index: int) -> Problem:
        """Returns the problem of this index, from 0. Raises IndexError beyond `size`."""


class GeneratedTask:
    """Problems made on demand, at any index; `size` only limits an epoch or an evaluation."""

    def __init__(self, config: TaskConfig, make: Callable[[int], Problem], size: int | None) -> None:
        self.config = config
        self.dropped: dict[str, list[int]] = {}
        self._make = make
        self._size = size

    @property
    def size(self) -> int | None:
        """The number of problems; None: endless."""
        return self._size

    def problem(self, index: int) -> Problem:
        """Returns the problem of this index, from 0. Raises IndexError beyond `size`."""
        if index < 0 or (self._size is not None and index >= self._size):
            raise IndexError(f"task {self.config.name}: index {index} is outside its {self._size} problems")
        return self._make(index)


class StoredTask:
    """Problems read from a file or the hub."""

    def __init__(
        self,
        config: TaskConfig,
        problems: Sequence[Problem],
        dropped: dict[str, list[int]],
        examples: dict[str, str] | None = None,
    ) -> None:
        self.config = config
        self.dropped = dropped
        self.examples = examples or {}  # reason -> what is shown of the first dropped row
        self._problems = problems

    @property
    def size(self) -> int:
        """The number of problems, without the rows that were dropped."""
        return len(self._problems)

    def __len__(self) -> int:
        return len(self._problems)

    def problem(self, index: int) -> Problem:
        """Returns the problem of this index, from 0 and without the rows that were dropped."""
        return self._problems[index]

    def check_dropped(self) -> None:
        """Raises TaskError where more rows are dropped than `max_dropped_share` allows; one is no share."""
        lost, limit = sum(map(len, self.dropped.values())), self.config.max_dropped_share
        count = lost + len(self._problems)
        if lost > limit * count and (lost > 1 or not limit):
            described = describe_dropped(self.dropped, self.examples)
            raise TaskError(
                f"task {self.config.name}: {lost:,} of {count:,} rows of {self.config.path} cannot be used "
                f"({lost / count:.1%}; max_dropped_share is {limit:g}): {described}. "
                "Correct the file or the task's columns, verifier or max_prompt_tokens, or raise max_dropped_share"
            )

    def filtered(self, keep: Callable[[Problem], bool], reason: str, *, faulty: bool = True) -> StoredTask:
        """Returns the task without the problems that `keep` refuses, which are counted under `reason`.

        The first of those that are `faulty` is shown with the count.
        """
        kept, refused = [], []
        for problem in self._problems:
            if keep(problem):
                kept.append(problem)
            else:
                refused.append(problem)
        dropped, examples = self.dropped, self.examples
        if refused:
            dropped = {**dropped, reason: [int(problem.uid.rpartition("/")[2]) for problem in refused]}
            examples = {**examples, reason: shown(refused[0].messages[-1][1])} if faulty else examples
        if not kept:
            raise TaskError(f"task {self.config.name}: no problem is left; {describe_dropped(dropped)}")
        return StoredTask(self.config, kept, dropped, examples)


def describe_dropped(dropped: Mapping[str, list[int]], examples: Mapping[str, str] | None = None) -> str:
    """Describes dropped rows as `dropped 3 empty problem (rows 4, 9, 17)`; empty if there are none.

    With `examples` the first row of each reason is shown after that: `, for example row 4: ...`.
    """
    parts = []
    for reason, rows in dropped.items():
        listed = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        parts.append(f"{len(rows)} {reason} (row{'s' if len(rows) > 1 else ''} {listed})")
    first = [
        f"row {rows[0]}: {examples[reason]}" for reason, rows in dropped.items() if examples and reason in examples
    ]
    return ("dropped " + "; ".join(parts) if parts else "") + (f", for example {'; '.join(first)}" if first else "")


def load_task(
    config: TaskConfig,
    seed: int,
    gradable: Callable[[str], bool] | None = None,
    boxed: Callable[[str], str | None] = lambda text: None,
    protocol: EvaluationProtocol = "ours",
) -> TaskSource:
    """Loads the task's problems. `seed` is the run's; an option `seed` of a generated task takes precedence.

    `gradable` says whether the task's verifier can read a gold answer; other rows are dropped and counted, since a
    sample of such a row could never be right. `boxed` returns the last boxed answer of a text, which is the gold answer
    of a row that has a solution and no answer. `protocol` decides the order and the text of raw GPQA's options.
    Raises TaskError.
    """
    if config.path is None:
        hint = " (a named benchmark gives prompt and verifier, not the problems)" if config.name in BENCHMARKS else ""
        raise TaskError(
            f"task {config.name}: path is missing{hint}; set it to {KNOWN}; or hf:..., builtin:... or "
            "python:package.module:Name"
        )
    if config.path.startswith("builtin:"):
        return _built_in(config, config.path.removeprefix("builtin:"), seed)
    if config.path.startswith(PREFIX):
        return _users_own(config, seed, gradable)
    return _stored(config, config.path, gradable, boxed, protocol)


# --- generated problems ------------------------------------------------------------------------------------------


def is_generated(task: TaskConfig) -> bool:
    """Whether a program makes the task's problems, so that it needs no file."""
    return task.path is not None and task.path.startswith(("builtin:", PREFIX))


def _built_in(config: TaskConfig, name: str, seed: int) -> GeneratedTask:
    if name not in BUILTIN:
        raise TaskError(f"task {config.name}: no generated task {name!r}; known are {', '.join(BUILTIN)}")
    options, size = _options_and_size(config, seed)
    try:
        source = BUILTIN[name](name=config.name, **options)
    except (TypeError, ValueError) as error:
        raise TaskError(f"task {config.name}: options of {name}: {error}") from error
    return GeneratedTask(config, source.problem, size)


def _options_and_size(config: TaskConfig, seed: int) -> tuple[dict[str, Any], int | None]:
    """Returns a generator's arguments, and the number of its problems (None: endless)."""
    options = {"seed": seed, **config.options}
    size = options.pop("size", None)
    if size is not None and (not isinstance(size, int) or size < 1):
        raise TaskError(f"task {config.name}: options.size must be a positive whole number, got {size!r}")
    if config.limit is not None:
        size = min(config.limit, size or config.limit)
    return options, size


BUILTIN: dict[str, Callable[..., Generator]] = {"chain_arithmetic": ChainArithmetic, "words": WordProblems}


def _users_own(config: TaskConfig, seed: int, gradable: Callable[[str], bool] | None) -> GeneratedTask:
    options, size = _options_and_size(config, seed)
    generator = UsersGenerator(config, {"split": "training", **options})
    sizes = [count for count in (generator.size, size) if count is not None]
    task = GeneratedTask(config, generator.problem, min(sizes, default=None))
    generator.check_first(task.size, gradable)
    return task


# --- files and the hub -------------------------------------------------------------------------------------------


def _stored(
    config: TaskConfig,
    path: str,
    gradable: Callable[[str], bool] | None,
    boxed: Callable[[str], str | None],
    protocol: EvaluationProtocol,
) -> StoredTask:
    try:
        table = open_rows(config)
        if not table.columns:
            raise TableError(f"{path} has no rows")
        layout = layout_of(config, table.columns, protocol)
        problems: list[Problem] = []
        dropped: dict[str, list[int]] = {}
        examples: dict[str, str] = {}
        for number, row in enumerate(table.rows(layout.columns, config.limit)):
            found = _with_gold(layout.read(number, row), boxed)
            if (reason := _fault(found, gradable)) is None:
                uid, read = f"{config.name}/{number}", found._asdict()
                problems.append(Problem(uid=uid, task=config.name, **read))
            else:
                dropped.setdefault(reason, []).append(number)
                examples.setdefault(reason, _example(reason, found, row))
    except (TableError, CellError) as error:
        raise TaskError(f"task {config.name}: {error}") from error
    count = len(problems) + sum(map(len, dropped.values()))
    if not count:
        raise TaskError(f"task {config.name}: {path} has no rows")
    if not problems:
        raise TaskError(
            f"task {config.name}: none of the {count} rows of {path} can be graded with verifier "
            f"{config.verifier!r}: {describe_dropped(dropped, examples)}"
        )
    return StoredTask(config, problems, dropped, examples)


def _fault(found: Reading, gradable: Callable[[str], bool] | None) -> str | None:
    """Why a row cannot be used; None: it can."""
    if not any(content.strip() for role, content in found.messages if role == "user"):
        return EMPTY_PROBLEM
    if not found.answer.strip():
        return EMPTY_ANSWER
    return UNREADABLE_ANSWER if gradable is not None and not gradable(found.answer) else None


def _example(reason: str, found: Reading, row: Row) -> str:
    """What is shown of a dropped row: its gold answer, or the row where it lacks one."""
    return shown(found.answer) if reason == UNREADABLE_ANSWER else shown(row)


def open_rows(config: TaskConfig) -> Table:
    """Opens the rows of a task's files or hub dataset. Raises TableError, which does not name the task."""
    path = str(config.path)
    if path.startswith("hf:"):
        return _of_hub(config, path.removeprefix("hf:"))
    try:
        return open_table(path)
    except TableError as error:
        missing = not exists(path)
        raise TableError(f"{error}{how_to_get(config.name) if missing else ''}") from error


def _of_hub(config: TaskConfig, name: str) -> Table:
    """Opens `owner/dataset[:split]`; an option `config` names a dataset's configuration.

    With a `limit` the first rows are read as they come, without fetching and building the whole set.
    """
    import datasets

    repository, _, split = name.partition(":")
    load = partial(datasets.load_dataset, repository, config.options.get("config"), split=split or "train")
    try:
        if config.limit is not None and not {"[", "+"} & set(split):  # a slice needs the whole set
            with contextlib.suppress(OSError):  # no network: the set may be in the cache, whole
                return of_dataset(f"hf:{name}", load(streaming=True))
        return of_dataset(f"hf:{name}", load())
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise TableError(
            f"dataset {repository} (split {split or 'train'}): {error}{how_to_get(config.name)}"
        ) from error


def _with_gold(found: Reading, boxed: Callable[[str], str | None]) -> Reading:
    """Returns the reading with a gold answer: where there is none, the last box of the solution.

    No gold answer is a sentence with a box, so an answer column of such texts is a solution.
    """
    if OR in found.answer:  # a list of golds
        return found._replace(answer=any_of(boxed(gold) or gold for gold in alternatives(found.answer)))
    if not found.solution and (answer := boxed(found.answer)) is not None:
        return found._replace(answer=answer, solution=found.answer)
    if not found.answer.strip() and found.solution:
        return found._replace(answer=boxed(found.solution) or "")
    return found


# --- the order of training ---------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """The problem at an ordinal of the stream."""

    task: int  # index into the stream's tasks
    problem: Problem
    epoch: int


class PromptStream:
    """An endless, deterministic order of problems over several tasks. Its whole state is an ordinal.

    Tasks take turns by weight (the one furthest behind its share is next); within a task each epoch is another seeded
    permutation. An endless task stays in epoch 0 and is read in order.
    """

    def __init__(self, tasks: Sequence[TaskSource], weights: Iterable[float], seed: int) -> None:
        self.tasks = list(tasks)
        shares = np.asarray(list(weights), dtype=np.float64)
        if not self.tasks or len(shares) != len(self.tasks) or not (shares > 0).all():
            raise ValueError(f"need a positive weight per task, got {len(self.tasks)} tasks and weights {shares}")
        self.seed = seed
        self._shares = shares / shares.sum()
        self._counts = np.zeros(len(self.tasks), dtype=np.int64)
        self._turns = array.array("i")  # task of each ordinal so far
        self._positions = array.array("q")  # how often that task had been asked before
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}

    def __getitem__(self, ordinal: int) -> Draw:
        if ordinal < 0:
            raise IndexError(f"ordinal must be >= 0, got {ordinal}")
        task, position = self._turn(ordinal)
        source = self.tasks[task]
        if source.size is None:
            return Draw(task, source.problem(position), 0)
        epoch, within = divmod(position, source.size)
        return Draw(task, source.problem(int(self._permutation(task, epoch, source.size)[within])), epoch)

    def draws(self, ordinals: Iterable[int]) -> Iterator[tuple[int, dict[int, Draw]]]:
        """Yields (task, its draws by their ordinals), so that what they share is done once."""
        drawn = {ordinal: self[ordinal] for ordinal in ordinals}
        for task in sorted({draw.task for draw in drawn.values()}):
            yield task, {ordinal: draw for ordinal, draw in drawn.items() if draw.task == task}

    def _turn(self, ordinal: int) -> tuple[int, int]:
        if len(self.tasks) == 1:
            return 0, ordinal
        while len(self._turns) <= ordinal:
            task = int(np.argmax(self._shares * (len(self._turns) + 1) - self._counts))
            self._turns.append(task)
            self._positions.append(int(self._counts[task]))
            self._counts[task] += 1
        return self._turns[ordinal], self._positions[ordinal]

    def _permutation(self, task: int, epoch: int, size: int) -> np.ndarray:
        cached = self._permutations.get(task)
        if cached is None or cached[0] != epoch:
            identity = repr((self.seed, self.tasks[task].config.name, epoch)).encode()
            words = np.frombuffer(hashlib.blake2b(identity, digest_size=32).digest(), dtype="<u4")
            # RandomState's stream is frozen by NumPy's policy: a resumed run keeps its order after an upgrade
            cached = (epoch, np.random.RandomState(words).permutation(size))
            self._permutations[task] = cached
        return cached[1]
