"""How fast the parts of a run are: measured, from a run's own metrics, or of a device on which a run was measured.

Nothing here is taken from a data sheet. A device without a measured run has no rates, and its plan no times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.common.metrics import FILE, read_metrics
from latent_grpo.common.model_files import stored_tensors
from latent_grpo.deploy.run.folder import RunFolder

LEAST_STEPS = 3  # after the first, which starts things up


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one worker and one rank did in a second, with a model of `parameters`. Medians over steps."""

    origin: str
    """Where they were measured."""
    parameters: int
    worker_steps_per_s: float
    """Response steps a second of a worker, all of its samples together, the wait for the longest included."""
    rank_tokens_per_s: float
    """Tokens of prompts and responses a second of a rank, in a whole step: replay, forward and backward pass."""
    publish_s: float
    """Of one publication."""
    response_share: float
    """Mean response steps over `max_response_tokens`."""
    prompt_share: float
    """Mean prompt tokens over `max_prompt_tokens`."""
    trained_share: float
    """Groups trained on over those generated."""


DEVICES: dict[str, Rates] = {
    "cpu": Rates(
        origin="two otherwise idle cores, 159 steps of the quickstart, 2026-11-28 (docs/measured.md)",
        parameters=432_512,
        worker_steps_per_s=13_890.0,
        rank_tokens_per_s=19_660.0,
        publish_s=0.0099,
        response_share=0.944,
        prompt_share=0.469,
        trained_share=0.5625,
    )
}
"""Rates by device. Another one is added with a run that was measured on it."""
MEMORY_GIB = {"a10g": 22.5, "a100": 79.3, "h100": 79.1, "h200": 139.8, "l40s": 44.5}
"""Memory of a card that programs can use, as torch reports it."""


def rates_of(path: Path) -> Rates:
    """Returns the rates that a run has measured. `path` is its folder, or its metrics file. Raises ConfigError."""
    folder = RunFolder(path if path.is_dir() else path.parent)
    if not (folder.path / FILE).exists():
        raise ConfigError(f"--rates {path}: no {FILE} there; give the folder of a run that has trained a few steps")
    config = folder.config()
    rows = [row["metrics"] for row in list(read_metrics(folder.path, kind="train"))[1:]]
    rows = [row for row in rows if "learner/tokens_per_s" in row and row.get("batch/groups")]
    if len(rows) < LEAST_STEPS:
        raise ConfigError(
            f"--rates {path}: it has {len(rows)} training step(s) after its first; {LEAST_STEPS} are needed"
        )
    task = config.tasks[0]
    trained = [row["batch/groups"] * config.group_size for row in rows]
    tokens = [row["learner/tokens_per_s"] * row["learner/seconds"] * config.learner.ranks for row in rows]
    per_sample = [t / n for t, n in zip(tokens, trained, strict=True)]
    steps = median(row["rollout/steps"] for row in rows)
    return Rates(
        origin=f"{folder.path} ({len(rows)} steps)",
        parameters=parameters_of(folder),
        worker_steps_per_s=median(_worker_rate(row, config) for row in rows),
        rank_tokens_per_s=median(
            t / max(row["time/learner_s"], 1e-9) / config.learner.ranks for t, row in zip(tokens, rows, strict=True)
        ),
        publish_s=median(row["time/publish_s"] for row in rows),
        response_share=steps / task.max_response_tokens,
        prompt_share=max(median(per_sample) - steps, 0.0) / task.max_prompt_tokens,
        trained_share=median(row["batch/groups"] for row in rows)
        / median(row["rollout/samples"] / config.group_size for row in rows),
    )


def _worker_rate(row: dict[str, Any], config: RunConfig) -> float:
    """Response steps a second of a worker. With staleness workers work beside the learner, as long as they are busy."""
    workers = row.get("rollout/workers", config.rollout.workers)
    seconds = row["time/rollout_wait_s"]
    if config.max_staleness:
        seconds = row.get("rollout/busy_share", 1.0) * row["time/step_s"]
    return row["rollout/samples"] * row["rollout/steps"] / max(seconds * workers, 1e-9)


def parameters_of(folder: RunFolder) -> int:
    """The number of parameters of a run's model, from the header of its weights. Raises ConfigError."""
    config = folder.config()
    given = [Path(config.model.path)] if config.model.path else []
    for place in (folder.model, folder.base_model, folder.path / "initial", *given):
        if any(place.glob("*.safetensors")):
            return sum(math.prod(tensor.shape) for tensor in stored_tensors(place).values())
    raise ConfigError(f"--rates {folder.path}: none of its model's weights are here, so its size is not known")
