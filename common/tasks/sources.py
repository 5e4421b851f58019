"""Sources of problems (files, the hub, generators), and the endless order of training (METHOD §2.5, §8).

A problem's identity is task name and row number in its source, so dropping a faulty row renames no other.
"""

from __future__ import annotations

import array
import csv
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from latent_grpo.common.config import ConfigError, TaskConfig
from latent_grpo.common.config.monitoring_and_checkpoints import EvaluationProtocol
from latent_grpo.common.tasks.arithmetic import ChainArithmetic
from latent_grpo.common.tasks.benchmarks import BENCHMARKS, how_to_get
from latent_grpo.common.tasks.cells import cell_text
from latent_grpo.common.tasks.generator import PREFIX, Generator, UsersGenerator
from latent_grpo.common.tasks.gpqa import COLUMNS as GPQA_COLUMNS
from latent_grpo.common.tasks.gpqa import with_letters
from latent_grpo.common.tasks.words import WordProblems
from latent_grpo.common.types import Problem

EMPTY_PROBLEM, EMPTY_ANSWER, UNREADABLE_ANSWER = "empty problem", "empty answer", "unreadable gold answer"
AUTHORS_SOLUTION = "cot_answer"  # of the authors' files: the visible text, with the boxed answer at its end (METHOD §7)


class TaskError(ConfigError):
    """A source of problems that cannot be used. The message says what was found and what to change."""


# --- sources -----------------------------------------------------------------------------------------------------


class TaskSource(Protocol):
    """A run's view of a task: problems by index. `size` is None for an endless task."""

    config: TaskConfig
    dropped: dict[str, list[int]]  # reason -> row numbers in the source

    @property
    def size(self) -> int | None: ...

    def problem(self, index: int) -> Problem: ...


class GeneratedTask:
    """Problems made on demand, at any index; `size` only limits an epoch or an evaluation."""

    def __init__(self, config: TaskConfig, make: Callable[[int], Problem], size: int | None) -> None:
        self.config = config
        self.dropped: dict[str, list[int]] = {}
        self._make = make
        self._size = size

    @property
    def size(self) -> int | None:
        return self._size

    def problem(self, index: int) -> Problem:
        if index < 0 or (self._size is not None and index >= self._size):
            raise IndexError(f"task {self.config.name}: index {index} is outside its {self._size} problems")
        return self._make(index)


class StoredTask:
    """Problems read from a file or the hub."""

    def __init__(self, config: TaskConfig, problems: Sequence[Problem], dropped: dict[str, list[int]]) -> None:
        self.config = config
        self.dropped = dropped
        self._problems = problems

    @property
    def size(self) -> int:
        return len(self._problems)

    def __len__(self) -> int:
        return len(self._problems)

    def problem(self, index: int) -> Problem:
        return self._problems[index]

    def filtered(self, keep: Callable[[Problem], bool], reason: str) -> StoredTask:
        """Returns the task without the problems that `keep` refuses, which are counted under `reason`."""
        kept, refused = [], []
        for problem in self._problems:
            if keep(problem):
                kept.append(problem)
            else:
                refused.append(int(problem.uid.rpartition("/")[2]))
        dropped = {**self.dropped, reason: refused} if refused else self.dropped
        if not kept:
            raise TaskError(f"task {self.config.name}: no problem is left; {describe_dropped(dropped)}")
        return StoredTask(self.config, kept, dropped)


def describe_dropped(dropped: dict[str, list[int]]) -> str:
    """Describes dropped rows as `dropped 3 empty problem (rows 4, 9, 17)`; empty if there are none."""
    parts = []
    for reason, rows in dropped.items():
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        parts.append(f"{len(rows)} {reason} (row{'s' if len(rows) > 1 else ''} {shown})")
    return "dropped " + "; ".join(parts) if parts else ""


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
            f"task {config.name}: path is missing{hint}; set it to a .parquet, .jsonl or .csv file, hf:..., "
            "builtin:... or python:package.module:Name"
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
    rows = _read(config, path)
    if not rows:
        raise TaskError(f"task {config.name}: {path} has no rows")
    read, whole = _reader(config, set().union(*(row.keys() for row in rows[:100])), protocol)
    problems: list[Problem] = []
    dropped: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        messages, answer, cot, solution = _with_gold(read(number, row), boxed)
        if not any(content.strip() for role, content in messages if role == "user"):
            dropped.setdefault(EMPTY_PROBLEM, []).append(number)
        elif not answer.strip():
            dropped.setdefault(EMPTY_ANSWER, []).append(number)
        elif gradable is not None and not gradable(answer):
            dropped.setdefault(UNREADABLE_ANSWER, []).append(number)
        else:
            uid = f"{config.name}/{number}"
            problems.append(
                Problem(
                    uid=uid,
                    task=config.name,
                    messages=messages,
                    answer=answer,
                    cot=cot,
                    solution=solution,
                    whole=whole,
                )
            )
    if not problems:
        raise TaskError(
            f"task {config.name}: none of the {len(rows)} rows of {path} can be graded with verifier "
            f"{config.verifier!r}: {describe_dropped(dropped)}"
        )
    return StoredTask(config, problems, dropped)


Row = dict[str, Any]  # of a file: the cell of each column


def read_rows(config: TaskConfig) -> list[Row]:
    """Reads the rows of a task's file or hub dataset, as they are. Raises TaskError."""
    return _read(config, str(config.path))


def _read(config: TaskConfig, path: str) -> list[Row]:
    if path.startswith("hf:"):
        return _read_hub(config, path.removeprefix("hf:"))
    file = Path(path)
    if not file.is_file():
        raise TaskError(f"task {config.name}: no file {path} (looked in {Path.cwd()}){how_to_get(config.name)}")
    if file.suffix == ".parquet":
        import pyarrow.lib
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(file)
        except (pyarrow.lib.ArrowException, OSError) as error:
            raise TaskError(f"task {config.name}: {path} cannot be read as parquet: {error}") from error
        return (table if config.limit is None else table.slice(0, config.limit)).to_pylist()
    if file.suffix == ".jsonl":
        return _read_jsonl(config, file)
    if file.suffix == ".csv":
        return _read_csv(config, file)
    raise TaskError(
        f"task {config.name}: {path}: expected a .parquet, .jsonl or .csv file, hf:..., builtin:... or python:..."
    )


def _read_jsonl(config: TaskConfig, file: Path) -> list[Row]:
    rows: list[Row] = []
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise TaskError(f"task {config.name}: {file}, line {number}: not UTF-8: {error}") from error
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(f"task {config.name}: {file}, line {number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise TaskError(f"task {config.name}: {file}, line {number}: expected an object, got {line[:40]!r}")
            rows.append(row)
            if len(rows) == config.limit:
                break
    return rows


def _read_csv(config: TaskConfig, file: Path) -> list[Row]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(itertools.islice(csv.DictReader(lines), config.limit))
    except (csv.Error, UnicodeDecodeError) as error:
        raise TaskError(f"task {config.name}: {file} cannot be read as CSV: {error}") from error
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise TaskError(
                f"task {config.name}: {file}: row {number} has more or fewer cells than the header; is it a CSV file "
                "with a comma between cells and quotes around texts with commas?"
            )
    return rows


def _read_hub(config: TaskConfig, name: str) -> list[Row]:
    """Reads `owner/dataset[:split]`; an option `config` names a dataset's configuration."""
    import datasets

    repository, _, split = name.partition(":")
    try:
        data = datasets.load_dataset(repository, config.options.get("config"), split=split or "train")
    except (OSError, ValueError) as error:
        raise TaskError(
            f"task {config.name}: dataset {repository} (split {split or 'train'}): {error}{how_to_get(config.name)}"
        ) from error
    return (data if config.limit is None else data.select(range(min(config.limit, len(data))))).to_list()


class Reading(NamedTuple):
    """A row's texts; one that it lacks is empty."""

    messages: tuple[tuple[str, str], ...]  # (role, content)
    answer: str
    cot: str = ""
    solution: str = ""


def _with_gold(found: Reading, boxed: Callable[[str], str | None]) -> Reading:
    """Returns the reading with a gold answer: where there is none, the last box of the solution.

    No gold answer is a sentence with a box, so an answer column of such texts is a solution.
    """
    if not found.solution and (answer := boxed(found.answer)) is not None:
        return found._replace(answer=answer, solution=found.answer)
    if not found.answer.strip() and found.solution:
        return found._replace(answer=boxed(found.solution) or "")
    return found


def _reader(
    config: TaskConfig, present: set[str], protocol: EvaluationProtocol
) -> tuple[Callable[[int, Row], Reading], bool]:
    """Returns a function that reads a row, and whether its messages are a whole prompt."""
    columns = config.columns
    if columns.problem not in present and {"prompt", "reward_model"} <= present:
        solution = _solution_column(config, present)
        return (lambda number, row: _read_verl(config, solution, number, row)), True
    if columns.problem not in present and present >= GPQA_COLUMNS:
        return partial(_read_gpqa, protocol), False
    solution = _solution_column(config, present)
    boxed = solution is not None and columns.answer not in present and "answer" not in columns.model_fields_set
    for key, column in (("problem", columns.problem), ("answer", columns.answer)):
        if column not in present and not (key == "answer" and boxed):
            raise TaskError(
                f"task {config.name}: {config.path} has no column {column!r}; its columns are "
                f"{', '.join(sorted(present))}. Set columns.{key}"
            )
    if "cot" in columns.model_fields_set and columns.cot not in present:
        raise TaskError(
            f"task {config.name}: {config.path} has no column {columns.cot!r}; its columns are "
            f"{', '.join(sorted(present))}"
        )

    def read(number: int, row: Row) -> Reading:
        answer = "" if columns.answer == solution else cell_text(row.get(columns.answer))
        return Reading(
            messages=(("user", cell_text(row.get(columns.problem))),),
            answer=answer,
            cot=cell_text(row.get(columns.cot)),
            solution=_cell(row, solution),
        )

    return read, False


def _solution_column(config: TaskConfig, present: set[str]) -> str | None:
    """Returns the column of the visible text: the one that is set, else `solution`, else the authors'; None: none."""
    columns = config.columns
    if columns.solution is None or columns.solution in present:
        return columns.solution
    if "solution" in columns.model_fields_set:
        raise TaskError(
            f"task {config.name}: {config.path} has no column {columns.solution!r}; its columns are "
            f"{', '.join(sorted(present))}. Set columns.solution, or null to train the boxed answer alone"
        )
    return AUTHORS_SOLUTION if AUTHORS_SOLUTION in present else None


def _cell(row: Row, column: str | None) -> str:
    return "" if column is None else cell_text(row.get(column))


def _read_verl(config: TaskConfig, solution: str | None, number: int, row: Row) -> Reading:
    """Reads verl's layout: `prompt` is a chat, `reward_model.ground_truth` the gold answer."""
    chat, truth = row.get("prompt"), row.get("reward_model")
    if not isinstance(chat, list) or any(not isinstance(m, dict) or {"role", "content"} - m.keys() for m in chat):
        raise TaskError(f"task {config.name}: row {number}: `prompt` must be a list of role and content, got {chat!r}")
    if not isinstance(truth, dict) or "ground_truth" not in truth:
        raise TaskError(f"task {config.name}: row {number}: `reward_model` has no ground_truth, got {truth!r}")
    messages = tuple((str(m["role"]), cell_text(m["content"])) for m in chat)
    answer, cot = cell_text(truth["ground_truth"]), cell_text(row.get(config.columns.cot))
    return Reading(messages, answer, cot, _cell(row, solution))


def _read_gpqa(protocol: EvaluationProtocol, number: int, row: Row) -> Reading:
    question, letter = with_letters(number, row, protocol)
    return Reading((("user", question),), letter)


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
