"""Published numbers (METHOD §8, arXiv 2604.27998), to be shown beside one's own where the benchmark is the same one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.benchmarks import BENCHMARKS
from deploy.scores import MACRO, TaskResult


@dataclass(frozen=True, slots=True)
class Published:
    """Percent; a chain length in response steps."""

    model: str
    method: str
    pass_at_1: float | None = None
    chain_length: float | None = None
    pass_at_64: float | None = None  # with noise

    def describe(self) -> str:
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
    """Task name (or the macro average's) -> what was published for it. A benchmark of another size is another one, and
    an average is compared only with that of the same four."""
    whole = {r.task for r in results if r.task in BENCHMARKS and r.problems == BENCHMARKS[r.task].problems}
    found = {name: numbers for name, numbers in TASKS.items() if name in whole}
    for level, numbers in AVERAGES.items():
        if {r.task for r in results} == whole == {n for n, b in BENCHMARKS.items() if b.level == level}:
            found[MACRO] = numbers
    return found
