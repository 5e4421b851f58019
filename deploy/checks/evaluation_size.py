"""The arithmetic of a run's evaluations for `latent-grpo validate`: rows, problems, samples and tokens.

The counts come from the same plan that an evaluation follows (`deploy.evaluation.rows`), so samples that two rows share
count once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from latent_grpo.common.config import RunConfig, TaskConfig
from latent_grpo.common.prompts import PromptRenderer
from latent_grpo.common.tasks.benchmarks import BENCHMARKS
from latent_grpo.common.tasks.sources import GeneratedTask
from latent_grpo.common.types import Problem
from latent_grpo.deploy.evaluation.rows import Row, interim_rows, planned, rows_of
from latent_grpo.deploy.run.preparation import Checked
from latent_grpo.deploy.run.problems import PreparedTask, protocols_of


def size_rows(config: RunConfig, found: Checked) -> list[tuple[str, str]]:
    """Rows on what evaluations measure and how much they sample. Tasks that were not read count as published.

    A task that was not read and is no benchmark has no known size; it is named, and left out of the sums.
    """
    settings = config.evaluation
    tasks, unknown = _tasks(config, found)
    whole = [row for task in tasks for row in rows_of(config, task, settings)]
    if not whole or not (settings.at_start or settings.at_end or settings.every):
        return []
    between = (config.steps - 1) // settings.every if settings.every else 0
    fewer = interim_rows(whole, settings) if settings.interim else whole
    amounts = [
        ("before and after training", settings.at_start + settings.at_end, _amount(whole)),
        (f"every {settings.every} steps", between, _amount(fewer)),
    ]
    parts = [
        f"{name}, {times:,} time(s): {samples:,} samples each, at most {tokens:,} tokens"
        for name, times, (samples, tokens) in amounts
        if times
    ]
    samples, tokens = (sum(times * amount[i] for _, times, amount in amounts) for i in (0, 1))
    left_out = f"; not counted, since not read: {', '.join(unknown)}" if unknown else ""
    return [
        ("evaluation rows", "; ".join(_describe(row) for row in whole)),
        ("evaluation samples", "; ".join(parts) + left_out),
        ("all evaluations", f"{samples:,} samples, at most {tokens:,} tokens, prompts included{left_out}"),
    ]


def _describe(row: Row) -> str:
    """`aime2024 by reference, noise off: 30 problems, 64 repetition(s)`."""
    asked, noise = row.pass_at_1, "off" if row.noise == "off" else "on"
    more = f", and {row.pass_at_k.samples} samples for pass@k" if row.pass_at_k and row.protocol == "ours" else ""
    return (
        f"{row.task.name} by {row.protocol}, noise {noise}: {asked.problems:,} problems, {asked.samples} repetition(s)"
        + more
    )


def _amount(rows: Sequence[Row]) -> tuple[int, int]:
    """Returns the samples of an evaluation, and the most tokens that they have, prompts included."""
    _, sets = planned(rows)
    samples = [(found.samples, found.task.source.config) for found in sets]
    tokens = sum(count * (task.max_prompt_tokens + task.max_response_tokens) for count, task in samples)
    return sum(count for count, _ in samples), tokens


def _tasks(config: RunConfig, found: Checked) -> tuple[list[PreparedTask], list[str]]:
    """Returns the evaluation's tasks with their sizes, and the names of those whose size is not known."""
    asked = zip(found.sources.evaluation, found.sources.protocols, strict=True)
    # only sizes, budgets and protocols are read of these tasks, so no tokenizer is needed to render their prompts
    renderer = cast(PromptRenderer, None)
    tasks = [PreparedTask(source, renderer, protocols=protocols) for source, protocols in asked]
    read, unknown = {task.name for task in tasks}, []
    for task in config.evaluation.tasks:
        if task.name in read:
            continue
        if task.name not in BENCHMARKS:
            unknown.append(task.name)
            continue
        for protocols in protocols_of(task, config):
            tasks.append(PreparedTask(_published(task), renderer, protocols=protocols))
    return tasks, unknown


def _published(task: TaskConfig) -> GeneratedTask:
    """A stand-in for a benchmark's file that is not here, of the published number of problems, which has none."""

    def missing(index: int) -> Problem:
        raise ValueError(f"problem {index} of {task.name} was not read")

    problems = BENCHMARKS[task.name].problems
    return GeneratedTask(task, missing, min(problems, task.limit or problems))
