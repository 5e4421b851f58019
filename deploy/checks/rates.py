"""How long a run will take, by the seconds that an earlier run measured for its steps; without one no time is said.

The seconds of a step depend on the machine, so they come from `metrics.jsonl` of a run: one that the user names, or the
newest one beside the new run's folder whose settings agree in all that decides a step's length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.common.errors import LatentGRPOError
from latent_grpo.common.metrics import FILE, read_metrics
from latent_grpo.deploy.run.folder import RunFolder, local_root

LOOKED_AT = 50  # runs, the newest ones
Row = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Rate:
    """The seconds of a step that a run measured, means over its steps but the first, which starts things up."""

    steps: int  # that were measured
    seconds: float  # rollouts, training and publication
    between: float | None  # from one step's end to the next's, evaluations and checkpoints included; None: not known


def measured(folder: Path, kind: str = "train", name: str = "time/step_s") -> Rate | None:
    """Returns the rate of a run's steps of a `kind`, whose metric `name` has their seconds; None: it made too few."""
    rows = list(read_metrics(folder, kind=kind))
    later = [row for row in rows[1:] if row["metrics"].get(name) is not None]
    if not later:
        return None
    gaps = [
        b["time"] - a["time"]
        for a, b in itertools.pairwise(rows)
        if (b["step"], b["lineage"]) == (a["step"] + 1, a["lineage"])
    ]
    seconds = sum(row["metrics"][name] for row in later) / len(later)
    return Rate(len(later), seconds, sum(gaps) / len(gaps) if gaps else None)


def time_rows(config: RunConfig, run: str | Path | None = None) -> list[Row]:
    """Rows about the hours that the run will take, by the rates of `run` or of an earlier run like it.

    Raises ConfigError for a `run` without rates.
    """
    if run is None:
        found = next(_alike(config), None)
        if found is None:
            how = "train a few steps (steps=3) and validate again, or give a run with --measured RUN"
            return [("time", f"not estimated: no run in {local_root(config)}/ has measured steps like these; {how}")]
        folder, theirs = found
    else:
        folder, theirs = _given(Path(run))
    rows = []
    rate = measured(folder.path)
    if rate is not None:
        scale = config.samples_per_step / theirs.samples_per_step
        rows.append(("time", _sentence(config.steps, scale, rate, folder.path)))
    sft = measured(folder.path, "sft", "seconds")
    if config.warm_start is not None and theirs.warm_start is not None and sft is not None:
        scale = config.warm_start.batch_size / theirs.warm_start.batch_size
        rows.append(("time, Latent-SFT", _sentence(config.warm_start.max_steps, scale, sft, folder.path)))
    if not rows:
        raise ConfigError(f"--measured {folder.path}: it has fewer than two steps of the kind that this run makes")
    if differing := _differences(config, theirs):
        listed = ", ".join(differing)
        rows.append(("warning", f"{folder.path} had other {listed}, which the time leaves out of account"))
    return rows


def _sentence(steps: int, scale: float, rate: Rate, folder: Path) -> str:
    """`about 23.1 hours: 500 steps of 166 s, as measured in runs/a (12 steps); 25.3 hours with its ...`."""
    scaled = "" if scale == 1 else f", scaled by {scale:.3g} to the size of a step"
    found = (
        f"about {_hours(steps * scale * rate.seconds)}: {steps:,} steps of {scale * rate.seconds:,.3g} s, as measured "
        f"in {folder} ({rate.steps:,} steps{scaled})"
    )
    if rate.between is None:
        return found
    whole = steps * (scale * rate.seconds + max(rate.between - rate.seconds, 0.0))
    return f"{found}; {_hours(whole)} with evaluations and checkpoints as often as there"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _given(path: Path) -> tuple[RunFolder, RunConfig]:
    if not (path / FILE).exists():
        raise ConfigError(f"--measured {path}: no {FILE} there; give the folder of a run")
    folder = RunFolder(path)
    return folder, folder.config()


def _alike(config: RunConfig) -> Iterator[tuple[RunFolder, RunConfig]]:
    """Yields the runs of the runs folder that measured steps like this run's, the newest first."""
    files = sorted(local_root(config).glob(f"*/{FILE}"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[:LOOKED_AT]:
        folder = RunFolder(file.parent)
        try:
            theirs = folder.config()
            if not _differences(config, theirs) and measured(folder.path) is not None:
                yield folder, theirs
        except (LatentGRPOError, OSError, ValueError):  # a run of another version, or a damaged one, is like no run
            continue


def _differences(config: RunConfig, other: RunConfig) -> Sequence[str]:
    """Returns the names of what decides a step's seconds and differs between two runs."""
    mine, theirs = _decides_speed(config), _decides_speed(other)
    return [name for name in mine if mine[name] != theirs[name]]


def _decides_speed(config: RunConfig) -> dict[str, Any]:
    model, rollout, learner = config.model, config.rollout, config.learner
    return {
        "algorithm": config.algorithm,
        "model": model.path or model.new,
        "model.dtype": model.dtype,
        "model.train_layers": model.train_layers,
        "k": config.k,
        "group_size": config.group_size,
        "prompts_per_step": config.prompts_per_step,
        "minibatch_prompts": config.minibatch_prompts,
        "dynamic_sampling": config.dynamic_sampling,
        "max_staleness": config.max_staleness,
        "kl_coefficient": config.kl_coefficient > 0,
        "tasks (names and token budgets)": [(t.name, t.max_prompt_tokens, t.max_response_tokens) for t in config.tasks],
        "rollout.engine": rollout.engine,
        "rollout.workers": (rollout.workers, rollout.resources, rollout.max_rows),
        "learner": learner,
    }
