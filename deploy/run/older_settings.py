"""Settings as earlier versions stored them, in the meaning of today."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from latent_grpo.common.config import Columns, PromptConfig, TaskConfig
from latent_grpo.common.config.problems_and_model import BENCHMARK_DEFAULTS

GAP_OF_OLD_RUNS = 0.05  # the default of health.max_log_prob_gap up to version 0.2.0


def of_today(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns stored settings as they are meant today.

    Earlier versions wrote defaults into every file that nobody chose. Some of them would now be demands: for columns
    that a file need not have, and for verifier and budgets of a task that is a benchmark. Those up to 0.2.0, which had
    no section `ray`, wrote `health.max_log_prob_gap`, a bound on whole steps, and the keys of prompts besides.
    """
    stored = _rewritten(stored, _without_default_tasks)
    if "ray" in stored:
        return stored
    health = stored.get("health")
    if isinstance(health, dict) and health.get("max_log_prob_gap") == GAP_OF_OLD_RUNS:
        stored = {**stored, "health": {**health, "max_log_prob_gap": "auto"}}
    found: dict[str, Any] = _rewritten(stored, _without_default_prompts)
    return found


def _rewritten(node: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    """Returns a copy of settings in which `change` has changed each mapping, the inner ones first."""
    if isinstance(node, list):
        return [_rewritten(item, change) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: _rewritten(value, change) for key, value in node.items()}
    change(found)
    return found


def _without_default_tasks(found: dict[str, Any]) -> None:
    columns, fields = found.get("columns"), Columns.model_fields
    if isinstance(columns, dict) and {"problem", "answer", "cot"} <= columns.keys():  # written by a version before
        found["columns"] = {key: v for key, v in columns.items() if key not in fields or v != fields[key].default}
        for key in BENCHMARK_DEFAULTS.get(str(found.get("name")), ()):
            if found.get(key) == TaskConfig.model_fields[key].default:
                del found[key]


def _without_default_prompts(found: dict[str, Any]) -> None:
    if isinstance(prompt := found.get("prompt"), dict):
        fields = PromptConfig.model_fields
        found["prompt"] = {key: v for key, v in prompt.items() if key not in fields or v != fields[key].default}
