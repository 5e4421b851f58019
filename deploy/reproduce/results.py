"""The result of a finished unit of a suite: `result.json`, computed once from its run folder.

Figures are macro averages over the unit's evaluation tasks (METHOD §8); each task's own are kept beside them. Where an
evaluation was by both protocols, averages are those of this project's, and where noise was off and on, with it off.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latent_grpo.common.config import RunConfig
from latent_grpo.common.figure_names import by_label, of_first_protocol
from latent_grpo.common.files import write_atomically
from latent_grpo.common.metrics import read_metrics
from latent_grpo.deploy.evaluation.scores import average

FILE = "result.json"
CURVE_POINTS = 200
SHOWN = ("rollout/reward", "rollout/invalid_share", "learner/grad_norm", "learner/latent_mass", "batch/groups")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitResult:
    """The figures of a unit.

    `metrics` (macro averages) holds pass_at_1 with standard_error, chain_length, latent_length, latent_share (the part
    of a chain's steps that is latent), invalid_rate, and for each K sampled_pass_at_K with sampled_error_at_K.
    """

    unit: str
    seed: int
    is_start: bool
    metrics: dict[str, float]
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)  # by label (`common.figure_names`)
    protocol: str = "ours"  # of `metrics` and `evaluations`
    evaluations: list[dict[str, float]] = field(default_factory=list)  # step and the same figures, by step
    training: list[dict[str, float]] = field(default_factory=list)  # step and a step's own figures, thinned
    probe: list[dict[str, float]] = field(default_factory=list)  # step, answer, other_numbers, fillers
    seconds_per_step: float | None = None
    minutes: float = 0.0
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        """The figures that stand first."""
        return f"pass@1 {self.metrics['pass_at_1']:.3f}, chain length {self.metrics['chain_length']:.1f}"


def read_result(folder: Path) -> UnitResult | None:
    """Reads a unit's result; None if the unit has not finished."""
    path = folder / FILE
    return UnitResult(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def write_result(
    folder: Path, unit: Any, config: RunConfig, minutes: float, provenance: dict[str, Any], *, probe: int | None = None
) -> UnitResult:
    """Collects the unit's figures from its folder, with `probe` also the masses of the last latent step."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    evaluations = [{"step": row["step"], **_macro(row["metrics"])} for row in read_metrics(folder, kind="evaluation")]
    training = list(read_metrics(folder)) if not unit.is_start else []
    seconds = [row["metrics"]["time/step_s"] for row in training]
    result = UnitResult(
        unit=unit.name,
        seed=unit.seed,
        is_start=unit.is_start,
        metrics=_macro(summary["after"]),
        tasks=by_label(summary["after"]),
        protocol=of_first_protocol(by_label(summary["after"]))[0],
        evaluations=evaluations,
        training=thinned(training),
        probe=_probe(folder, config) if probe and config.latent else [],
        seconds_per_step=sum(seconds) / len(seconds) if seconds else None,
        minutes=minutes,
        provenance=provenance,
    )
    write_atomically(folder / FILE, json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    return result


def _macro(metrics: dict[str, float]) -> dict[str, float]:
    _, tasks = of_first_protocol(by_label(metrics))
    return average(
        [{**figures, "latent_share": figures["latent_length"] / figures["chain_length"]} for figures in tasks.values()]
    )


def is_proportion(name: str) -> bool:
    """Whether a metric lies between 0 and 1: pass@1, pass@k, the invalid rate, the latent share."""
    return has_error(name) or name in ("invalid_rate", "latent_share")


def has_error(name: str) -> bool:
    """Whether results hold a metric's standard error over problems: pass@1 and pass@k."""
    return name.removeprefix("sampled_").startswith("pass_at_")


def error_of(metrics: dict[str, float], name: str) -> float:
    """Returns the standard error over problems of the metric `name`; 0 if it is not known."""
    if name == "pass_at_1":
        return metrics.get("standard_error", 0.0)
    return metrics.get(name.replace("sampled_pass_at_", "sampled_error_at_"), 0.0) if "sampled" in name else 0.0


def thinned(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Returns at most CURVE_POINTS points, each the mean of its neighbours."""
    size = max(-(-len(rows) // CURVE_POINTS), 1)
    points = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        names = [n for n in SHOWN if all(row["metrics"].get(n) is not None for row in part)]
        means = {name: sum(row["metrics"][name] for row in part) / len(part) for name in names}
        points.append({"step": part[-1]["step"], **means})
    return points


def _probe(folder: Path, config: RunConfig) -> list[dict[str, float]]:
    from latent_grpo.common.models import load_tokenizer
    from latent_grpo.deploy.reproduce.probe import probe_run

    made = [path for path in (folder / "model", folder / "base") if path.is_dir()]
    tokenizer = load_tokenizer(made[0] if made else str(config.model.path))  # a given start makes neither
    found = probe_run(
        folder / "trajectories",
        lambda token: str(tokenizer.decode([token])),
        lambda gold: len(tokenizer.encode(gold, add_special_tokens=False)) == 1,
    )
    return [{"step": step, **dataclasses.asdict(masses)} for step, masses in found.items()]
