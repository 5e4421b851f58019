"""What an evaluation leaves: `evaluation.json` with everything that decided its numbers, and a table for people."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from common.chain import ChainSettings
from common.config import RunConfig
from deploy.problems import PreparedTask
from deploy.published import published
from deploy.scores import MACRO, TaskResult, macro_average

REPORT_FILE = "evaluation.json"
READ_BYTES = 2**20
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
    """Contents of :data:`REPORT_FILE`. `checksum`: of the published weights; `versions`: of program and packages."""
    numbers = published(results)
    evaluation = config.evaluation
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
            "engine": config.rollout.engine,
            "k": config.schema_k,
            "tau": config.tau,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "runs": evaluation.runs,
            "samples": evaluation.samples,
            "sampled_problems": evaluation.sampled_problems,
            "sampled_noise": {"mode": config.noise.mode, "scale": config.noise.scale},
            "answer_fallback": config.rollout.verifier.fallback,
        },
        "tasks": [
            {**dataclasses.asdict(result), **_origin(task), "published": _published(numbers.get(result.task, ()))}
            for result, task in zip(results, tasks, strict=True)
        ],
        "macro_average": {
            **dataclasses.asdict(macro_average(results)),
            "published": _published(numbers.get(MACRO, ())),
        },
    }


def _origin(task: PreparedTask) -> dict[str, Any]:
    """Where a task's problems came from, and how they were asked and graded."""
    config, renderer = task.source.config, task.renderer.config
    file = Path(config.path)
    return {
        "path": config.path,
        "options": config.options,
        "sha256": _sha256(file) if file.is_file() else None,
        "verifier": config.verifier,
        "prompt": renderer.model_dump(mode="json"),
        "max_prompt_tokens": config.max_prompt_tokens,
        "max_response_tokens": config.max_response_tokens,
        "dropped": {reason: len(rows) for reason, rows in task.source.dropped.items()},
    }


def _published(numbers) -> list[dict[str, Any]]:
    return [{k: v for k, v in dataclasses.asdict(n).items() if v is not None} for n in numbers]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def table(results: Sequence[TaskResult], title: str) -> Table:
    """One row a task, and the macro average below two or more."""
    numbers = published(results)
    ks = list(dict.fromkeys(at.k for result in results for at in result.pass_at_k))
    shown = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("task", "problems", "pass@1", "95 %", *(f"pass@{k} ~" for k in ks), "steps", "latent", "invalid"):
        if name == "task":
            shown.add_column(name, min_width=len("gsm8k-aug"), overflow="fold")
        else:
            shown.add_column(name, justify="right", no_wrap=True)
    if numbers:
        shown.add_column("published, percent")
    rows = [*results, macro_average(results)] if len(results) > 1 else list(results)
    for result in rows:
        if result.task == MACRO:
            shown.add_section()
        low, high = result.interval
        at_k = {at.k: at for at in result.pass_at_k}
        cells = [
            result.task + (f" ({result.ungraded} samples ungraded)" if result.ungraded else ""),
            f"{result.problems:,}",
            f"{result.pass_at_1:.3f}",
            f"{low:.3f}-{high:.3f}",
            *(f"{at_k[k].value:.3f}" if k in at_k else "-" for k in ks),
            f"{result.chain_length:.1f}",
            f"{result.latent_length:.1f}",
            f"{result.invalid_rate:.1%}",
        ]
        if numbers:
            of_task = numbers.get(result.task, ())
            cells.append("\n".join(p.describe() for p in of_task) + (f" ({of_task[0].model})" if of_task else ""))
        shown.add_row(*cells)
    if ks:
        shown.caption = "pass@1: noise off; ~: sampled with noise"
    return shown


def show(console: Console, shown: Table) -> None:
    """A log has no width of its own: there the table is as wide as it needs."""
    width = console.width
    if not console.is_terminal:
        console.width = WIDEST
        console.width = max(width, console.measure(shown).maximum)
    console.print(shown)
    console.width = width
