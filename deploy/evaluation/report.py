"""The results of an evaluation: `evaluation.json`, with everything that decided its numbers, and a table for people."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from latent_grpo.common.config import RunConfig
from latent_grpo.common.config.monitoring_and_checkpoints import EvaluationProtocol
from latent_grpo.common.config.problems_and_model import BENCHMARK_DEFAULTS
from latent_grpo.common.files import file_hash
from latent_grpo.common.model_chain import ChainSettings
from latent_grpo.common.tasks.benchmarks import BENCHMARKS, REFERENCE_TEMPERATURE, REFERENCE_TOP_P, reference_rules
from latent_grpo.deploy.evaluation.rows import Row, rows_of
from latent_grpo.deploy.evaluation.scores import TaskResult, macro_average
from latent_grpo.deploy.run.problems import PreparedTask
from latent_grpo.rollout_workers.engine_choice import choose_engine

WIDEST = 400  # columns of a table in a log


def report(
    results: Sequence[TaskResult],
    tasks: Sequence[PreparedTask],
    config: RunConfig,
    *,
    model: str,
    checksum: str,
    chain: ChainSettings | None,
    versions: dict[str, str],
) -> dict[str, Any]:
    """Returns the contents of :data:`EVALUATION_FILE`.

    `checksum` is that of the published weights, `versions` are those of program and packages.
    """
    numbers, evaluation = published(results), config.evaluation
    rows = [row for task in tasks for row in rows_of(config, task, evaluation)]
    averages = [
        {**dataclasses.asdict(average), "published": _published(numbers.get(average.label, ()))}
        for average in map(macro_average, alike(results))
    ]
    return {
        "model": model,
        "weights_checksum": checksum,
        "chain": chain.model_dump(mode="json") if chain else None,
        "evaluated": time.strftime("%FT%T%z"),
        "versions": versions,
        "settings": {
            "algorithm": config.algorithm,
            "seed": config.seed,
            "dtype": config.model.dtype,
            "engine": choose_engine(config).name,
            "k": config.schema_k,
            "latent_exit": config.latent_exit if config.latent else None,
            "tau": config.tau,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "protocol": evaluation.protocol,
            "runs": evaluation.runs,
            "samples": evaluation.samples,
            "sampled_problems": evaluation.sampled_problems,
            "sampled_noise": {"mode": config.noise.mode, "scale": config.noise.scale},
            "answer_fallback": config.rollout.verifier.fallback,
        },
        "tasks": [
            {**dataclasses.asdict(result), **_origin(row), "published": _published(numbers.get(result.label, ()))}
            for result, row in zip(results, rows, strict=True)
        ],
        "macro_average": averages[0],
        "macro_averages": averages,
    }


def _origin(row: Row) -> dict[str, Any]:
    """Describes the source of a row's problems, their prompt, their sampling and their verifier."""
    config, renderer = row.task.source.config, row.task.renderer.config
    asked = row.pass_at_1
    file = Path(config.path or "")  # of several files the run's manifest has a hash
    return {
        "path": config.path,
        "options": config.options,
        "sha256": file_hash(file, hashlib.sha256) if file.is_file() else None,
        "verifier": row.grading or config.verifier,
        "graded_text": "whole, with proxy tokens" if row.grading else "visible",
        "lengths": "samples that the budget did not cut" if row.uncut_lengths else "all samples",
        "sampling": {"runs": asked.samples, **dataclasses.asdict(asked.sampling)},
        "prompt": {name: getattr(renderer, name) for name in type(renderer).model_fields},  # also what nobody set
        "max_prompt_tokens": config.max_prompt_tokens,
        "max_response_tokens": config.max_response_tokens,
        "dropped": {reason: len(rows) for reason, rows in row.task.source.dropped.items()},
    }


def _published(numbers: Iterable[Published]) -> list[dict[str, Any]]:
    return [{k: v for k, v in dataclasses.asdict(n).items() if v is not None} for n in numbers]


def table(results: Sequence[TaskResult], title: str) -> Table:
    """Returns a table with one row per task and protocol, and the macro average below two or more that are alike."""
    numbers = published(results)
    ks = list(dict.fromkeys(at.k for result in results for at in result.pass_at_k))
    shown = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    others = any(result.other_rewards for result in results)
    rewards = ("reward",) if others else ()
    sampled = [f"pass@{k} ~" for k in ks]
    for name in ("task", "protocol", "problems", "pass@1", "95 %", *rewards, *sampled, "steps", "latent", "invalid"):
        if name == "task":
            shown.add_column(name, min_width=len("gsm8k-aug"), overflow="fold")
        elif name == "protocol":
            shown.add_column(name, no_wrap=True)
        else:
            shown.add_column(name, justify="right", no_wrap=True)
    if numbers:
        shown.add_column("published, percent")
    averages = [macro_average(group) for group in alike(results) if len(group) > 1]
    for place, result in enumerate([*results, *averages]):
        if place == len(results):
            shown.add_section()
        low, high = result.interval
        at_k = {at.k: at for at in result.pass_at_k}
        cells = [
            result.task + (f" ({result.ungraded} samples ungraded)" if result.ungraded else ""),
            result.rules,
            f"{result.problems:,}",
            f"{result.pass_at_1:.3f}",
            f"{low:.3f}-{high:.3f}",
            *([f"{result.mean_reward:.3f}"] if others else []),
            *(f"{at_k[k].value:.3f}" if k in at_k else "-" for k in ks),
            f"{result.chain_length:.1f}",
            f"{result.latent_length:.1f}",
            f"{result.invalid_rate:.1%}",
        ]
        if numbers:
            of_task = numbers.get(result.label, ())
            cells.append("\n".join(p.describe() for p in of_task) + (f" ({of_task[0].model})" if of_task else ""))
        shown.add_row(*cells)
    captions = [PROTOCOLS[name] for name in PROTOCOLS if any(result.protocol == name for result in results)]
    shown.caption = "; ".join([*captions, *(["~: sampled with noise"] if ks else [])])
    return shown


PROTOCOLS: dict[EvaluationProtocol, str] = {
    "ours": "protocol ours: pass@1 with the noise off, graded on the visible text",
    "reference": "protocol reference: the authors' sampling, repetitions and grading (docs/evaluate.md)",
}


def protocol_line(config: RunConfig) -> str | None:
    """A line about what the authors' protocol does with the tasks of an evaluation; None where it is not used."""
    if "reference" not in config.evaluation.protocols:
        return None
    rules = {task.name: found for task in config.evaluation.tasks if (found := reference_rules(task.name))}
    runs = ", ".join(f"{name} {found.runs}" for name, found in rules.items())
    others = [task.name for task in config.evaluation.tasks if task.name not in rules]
    return (
        f"protocol reference: temperature {REFERENCE_TEMPERATURE}, top_p {REFERENCE_TOP_P}, no top_k; repetitions: "
        f"{runs or 'none'}" + (f"; {', '.join(others)}: by protocol ours alone" if others else "")
    )


def alike(results: Sequence[TaskResult]) -> list[list[TaskResult]]:
    """Groups the results that may be averaged: those of one protocol, with the noise alike."""
    found: dict[tuple[str, bool], list[TaskResult]] = {}
    for result in results:
        found.setdefault((result.protocol, result.noise == "off"), []).append(result)
    return list(found.values())


def show(console: Console, shown: Table) -> None:
    """Prints a table. A log has no width of its own, so there the table is as wide as it needs."""
    width = console.width
    if not console.is_terminal:
        console.width = WIDEST
        console.width = max(width, console.measure(shown).maximum)
    console.print(shown)
    console.width = width


@dataclass(frozen=True, slots=True)
class Published:
    """A published result: rates in percent, and a chain length in response steps."""

    model: str
    method: str
    pass_at_1: float | None = None
    chain_length: float | None = None
    pass_at_64: float | None = None  # with noise

    def describe(self) -> str:
        """Returns the figures in words: `Latent-GRPO 58.32, 21.2 steps`."""
        parts = [f"{self.method} {self.pass_at_1:.2f}" if self.pass_at_1 is not None else self.method]
        parts += [f"pass@64 {self.pass_at_64:.1f}"] if self.pass_at_64 is not None else []
        parts += [f"{self.chain_length:g} steps"] if self.chain_length is not None else []
        return ", ".join(parts)


LOW, HIGH = "Llama-3.2-1B", "Qwen2.5-Math-7B"
AVERAGES = {
    "low": (
        Published(LOW, "Latent-SFT", 50.46),
        Published(LOW, "Soft-GRPO", 50.73),
        Published(LOW, "explicit GRPO", 57.98, chain_length=94.2),
        Published(LOW, "Latent-GRPO", 58.32, chain_length=21.2),
    ),
    "high": (
        Published(HIGH, "Latent-SFT", 26.95),
        Published(HIGH, "Soft-GRPO", 24.38),
        Published(HIGH, "explicit GRPO", 37.45, chain_length=5466),
        Published(HIGH, "Latent-GRPO", 41.72, chain_length=1649),
    ),
}
TASKS = {
    "math500": (
        Published(HIGH, "Latent-GRPO", 80.40, pass_at_64=87.8),
        Published(HIGH, "explicit GRPO", pass_at_64=84.2),
    ),
    "aime2024": (
        Published(HIGH, "Latent-GRPO", 26.56, pass_at_64=50.0),
        Published(HIGH, "explicit GRPO", pass_at_64=23.3),
    ),
    "aime2025": (
        Published(HIGH, "Latent-GRPO", 23.23, pass_at_64=53.3),
        Published(HIGH, "explicit GRPO", pass_at_64=30.0),
    ),
}


def published(results: Sequence[TaskResult]) -> dict[str, tuple[Published, ...]]:
    """Returns the label of a result (or of a macro average) -> published results.

    They stand beside figures of the authors' protocol alone, since they were made by it. A benchmark of another size or
    budget counts as another one, and an average is compared only with that of the same four.
    """
    found: dict[str, tuple[Published, ...]] = {}
    for group in alike(results):
        whole = [result for result in group if _as_published(result)]
        found |= {result.label: TASKS[result.task] for result in whole if result.task in TASKS}
        for level, numbers in AVERAGES.items():
            if len(whole) == len(group) and {r.task for r in group} == {
                name for name, benchmark in BENCHMARKS.items() if benchmark.level == level
            }:
                found[macro_average(group).label] = numbers
    return found


def _as_published(result: TaskResult) -> bool:
    benchmark = BENCHMARKS.get(result.task)
    if result.protocol != "reference" or benchmark is None or result.problems != benchmark.problems:
        return False
    return result.budget in (None, BENCHMARK_DEFAULTS[result.task]["max_response_tokens"])
