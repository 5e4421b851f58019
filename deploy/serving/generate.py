"""`latent-grpo generate`: a trained model's responses, shown as they are made or written as rows (docs/serving.md)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from latent_grpo.common.config import ConfigError, TaskConfig
from latent_grpo.common.files import unwritable
from latent_grpo.common.tasks.benchmarks import CHOICE_PROMPT
from latent_grpo.common.tasks.cells import CellError, chat, read_cell
from latent_grpo.common.tasks.gpqa import COLUMNS as GPQA_COLUMNS
from latent_grpo.common.tasks.gpqa import with_letters
from latent_grpo.common.tasks.sources import open_rows
from latent_grpo.common.tasks.tables import TableError, exists
from latent_grpo.common.terminal_text import TextConsole, visible, visible_token
from latent_grpo.rollout_workers.latent_model import LatentModel, LatentStep, Response, Sampling
from latent_grpo.rollout_workers.trained_model import Chat

COLUMNS = ("messages", "problem", "question", "prompt")  # where a row's problem may stand, the first that is there
NAME = "generate"  # of the task that stands for a file
LEAST_WEIGHT = 0.005  # of a component that is shown
ROWS_AT_ONCE = 64  # of a file, so that its first responses are written while the others are generated


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user asked for."""

    sampling: Sampling
    samples: int = 1
    seed: int = 0
    thoughts: bool = False


def generate_here(model: LatentModel, problems: Iterable[str], wish: Wish, console: Console) -> None:
    """Shows the responses to each problem step by step: thoughts if wished for, and the text as it is written."""
    for problem in problems:
        if wish.samples > 1:
            for response in model.generate([problem], samples=wish.samples, seed=wish.seed, **wish.sampling):
                console.rule(f"sample {response.sample}", align="left")
                if wish.thoughts:
                    _show_thoughts(response.thoughts, console)
                console.print(Text(_lines(response.text)))
                console.print(_summary(response))
            continue
        thoughts = 0
        for piece in model.stream(problem, seed=wish.seed, **wish.sampling):
            if isinstance(piece, Response):
                console.print()
                console.print(_summary(piece))
            elif isinstance(piece, str):
                console.print(Text(_lines(piece)), end="")
            elif wish.thoughts:
                thoughts += 1
                console.print(thought_line(thoughts, piece))


def generate_rows(
    model: LatentModel, problems: Sequence[str | Chat], wish: Wish, write: Callable[[dict[str, Any]], None]
) -> int:
    """Calls `write` with one row per response, in the order of `problems`; returns how many there were."""
    written = 0
    for first in range(0, len(problems), ROWS_AT_ONCE):
        chosen = problems[first : first + ROWS_AT_ONCE]
        for response in model.generate(chosen, samples=wish.samples, seed=wish.seed, **wish.sampling):
            number = first + response.problem
            write(as_row(response, number, problems[number], thoughts=wish.thoughts))
            written += 1
    return written


def as_row(response: Response, number: int, problem: str | Chat, *, thoughts: bool) -> dict[str, Any]:
    """Returns a response as JSON. `number` is that of the problem's row."""
    row: dict[str, Any] = {
        "row": number,
        "sample": response.sample,
        "problem": problem,
        "response": response.text,
        "answer": response.answer,
        "finish_reason": response.finish_reason,
        "latent_steps": response.latent_steps,
        "steps": response.steps,
        "prompt_tokens": response.prompt_tokens,
    }
    if thoughts:
        row["thoughts"] = [
            {
                "tokens": list(step.texts),
                "ids": step.ids.tolist(),
                "weights": [round(float(w), 6) for w in step.weights],
            }
            for step in response.thoughts
        ]
    return row


def problems_of(file: Path, column: str | None, limit: int | None) -> list[str | Chat]:
    """Reads the problems of a file, a folder, a glob or a hub dataset. Raises ConfigError: file, row and column.

    The raw columns of GPQA are read as an evaluation reads them: the question with its options, and the line that asks
    for a letter.
    """
    if not str(file).startswith("hf:") and not exists(str(file)):
        raise ConfigError(f"--file {file}: there is no such file (looked in {Path.cwd()}); give a file of problems")
    try:
        table = open_rows(TaskConfig(name=NAME, path=str(file), limit=limit))
        chosen = column or next((name for name in COLUMNS if name in table.columns), "")
        if not chosen and set(table.columns) >= GPQA_COLUMNS:
            rows = enumerate(table.rows(GPQA_COLUMNS, limit))
            return [_choice(number, row, f"{file}, row {number}") for number, row in rows]
        if table.columns and chosen.partition(".")[0] not in table.columns and chosen not in table.columns:
            wanted = f"column {column!r}" if column else f"column {' or '.join(COLUMNS)}"
            columns = ", ".join(sorted(table.columns))
            raise ConfigError(f"{file} has no {wanted}; its columns are {columns}. Give --column NAME")
        found = [
            _problem(row, chosen, f"{file}, row {number}") for number, row in enumerate(table.rows([chosen], limit))
        ]
    except (TableError, CellError) as error:
        raise ConfigError(f"--file {error}") from error
    if not found:
        raise ConfigError(f"{file} has no rows")
    return found


def _choice(number: int, row: dict[str, Any], where: str) -> str:
    try:
        question, letter = with_letters(number, row)
    except CellError as error:
        raise CellError(f"{where}: {error}") from error
    if not letter:
        raise ConfigError(f"{where}: a question of GPQA needs a text in each of {', '.join(sorted(GPQA_COLUMNS))}")
    return CHOICE_PROMPT.user.replace("{problem}", question)


def _problem(row: dict[str, Any], column: str, where: str) -> str | Chat:
    messages, whole = read_cell(row, column, chat, where)
    if not any(content.strip() for role, content in messages if role == "user"):
        raise ConfigError(f"{where}: column {column!r} must hold a text or a chat, and it is empty")
    return [{"role": role, "content": content} for role, content in messages] if whole else messages[0][1]


def typed_problems(source: TextIO, console: Console) -> Iterator[str]:
    """Yields the lines of standard input that hold something; on a terminal it asks for each."""
    while True:
        if source.isatty():
            console.print(Text("problem> ", "bold"), end="")
        line = source.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


@contextmanager
def rows_writer(output: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that writes a row as a line of JSON to the file, or to standard output.

    The file has `.part` at the end of its name until it is complete. Raises ConfigError for a file that exists or
    cannot be written.
    """
    if output is None:
        yield lambda row: print(json.dumps(row, ensure_ascii=False), flush=True)
        return
    for there in (output, output.with_name(f"{output.name}.part")):
        if there.exists():
            raise ConfigError(f"--output {output}: {there} exists already; give another name, or remove it")
    unfinished, written = output.with_name(f"{output.name}.part"), 0

    def refused(error: OSError) -> ConfigError:
        error.filename = str(output)
        kept = f"; the first {written:,} responses are in {unfinished}" if written else ""
        if not written:
            with suppress(OSError):
                unfinished.unlink()
        return ConfigError(f"--output {output} {unwritable(error)}; choose a file that is writable{kept}")

    try:
        file = unfinished.open("w", encoding="utf-8")
    except OSError as error:
        raise refused(error) from error

    def write(row: dict[str, Any]) -> None:
        nonlocal written
        try:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
        except OSError as error:
            raise refused(error) from error
        written += 1

    try:
        yield write
    except BaseException:
        with suppress(OSError):  # what could not be written is written once more, in vain
            file.close()
        raise
    try:
        file.close()
        unfinished.rename(output)
    except OSError as error:
        raise refused(error) from error


def thought_line(number: int, step: LatentStep) -> Text:
    """`  3  4 0.81  5 0.12  ...`: the components of a latent step with their weights, the strongest first."""
    line = Text(f"{number:>4}  ", style="cyan")
    for text, weight in zip(step.texts, step.weights, strict=True):
        if weight < LEAST_WEIGHT:
            break
        line.append(visible_token(text), style="bold magenta" if weight >= 0.5 else "magenta")
        line.append(f" {weight:.2f}  ", style="dim")
    return line


def _show_thoughts(thoughts: Sequence[LatentStep], console: Console) -> None:
    for number, step in enumerate(thoughts, start=1):
        console.print(thought_line(number, step))


def _lines(text: str) -> str:
    """Makes a response's text safe for a terminal; its line breaks stay."""
    return visible(text).replace("⏎", "\n")


def _summary(response: Response) -> Text:
    end = "" if response.finish_reason == "stop" else ", cut off by max_tokens"
    visible_steps = response.steps - response.latent_steps
    return Text(f"{response.latent_steps} latent and {visible_steps} visible steps{end}", style="dim")


def terminal() -> Console:
    """The console of responses: standard output, without highlighting."""
    return TextConsole(file=sys.stdout, highlight=False, soft_wrap=True)
