"""The sources of problems: files, hub datasets, the benchmarks, generators, and a user's own by import path."""

from __future__ import annotations

from latent_grpo.common.tasks.benchmarks import BENCHMARKS, Benchmark, benchmark_tasks
from latent_grpo.common.tasks.sources import (
    Draw,
    GeneratedTask,
    PromptStream,
    StoredTask,
    TaskError,
    TaskSource,
    describe_dropped,
    load_task,
)

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Draw",
    "GeneratedTask",
    "PromptStream",
    "StoredTask",
    "TaskError",
    "TaskSource",
    "benchmark_tasks",
    "describe_dropped",
    "load_task",
]
