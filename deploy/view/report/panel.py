"""The health panel: the run's metrics, judged again by the rules of `deploy.run.health`, and the run's alarms."""

from __future__ import annotations

from collections import Counter
from typing import Any

from latent_grpo.common.config import ConfigError, parse_config
from latent_grpo.deploy.run.health import Judge
from latent_grpo.deploy.view.run_view import RunView


def panel(run: RunView) -> tuple[dict[str, Any] | None, str]:
    """Returns every watched figure at the last step and all alarms in words; or None and why there is no panel."""
    rows = run.metric_rows("train")
    if not rows:
        return None, "No step has been recorded yet, so there is nothing to judge."
    try:
        config = parse_config(run.settings)
    except ConfigError as error:
        return None, f"The health panel needs settings that this program reads; this run's differ ({error})."
    judge = Judge(config, lineage=0)
    for row in rows:
        judge.judge(row["step"], {name: v for name, v in row["metrics"].items() if v is not None})
    raised = Counter(alarm.name for alarm in run.alarms if alarm.state == "raised")
    watched = [
        {
            "name": standing.rule.name.removeprefix("min_").removeprefix("max_").replace("_", " "),
            "low": standing.rule.low,
            "limit": standing.limit,
            "value": None if standing.value is None else float(f"{standing.value:.3g}"),
            "state": "unknown" if standing.value is None else "alarm" if standing.active else "fine",
            "message": standing.message,
            "cause": standing.rule.cause,
            "remedy": standing.rule.remedy,
            "raised": raised[standing.rule.name],
        }
        for standing in judge.standings()
    ]
    return {"watched": watched, "alarms": [{"step": a.step, "sentence": a.sentence} for a in run.alarms]}, ""
