"""Settings as earlier versions stored them, in the meaning of today."""

from __future__ import annotations

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
    stored = _without_default_tasks(stored)
    if "ray" in stored:
        return stored
    health = stored.get("health")
    if isinstance(health, dict) and health.get("max_log_prob_gap") == GAP_OF_OLD_RUNS:
        stored = {**stored, "health": {**health, "max_log_prob_gap": "auto"}}
    return _without_default_prompts(stored)


def _without_default_tasks(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_default_tasks(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: _without_default_tasks(value) for key, value in node.items()}
    columns, fields = found.get("columns"), Columns.model_fields
    if isinstance(columns, dict) and {"problem", "answer", "cot"} <= columns.keys():  # written by a version before
        found["columns"] = {key: v for key, v in columns.items() if key not in fields or v != fields[key].default}
        for key in BENCHMARK_DEFAULTS.get(str(found.get("name")), ()):
            if found.get(key) == TaskConfig.model_fields[key].default:
                del found[key]
    return found


def _without_default_prompts(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_default_prompts(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: _without_default_prompts(value) for key, value in node.items()}
    if isinstance(prompt := found.get("prompt"), dict):
        fields = PromptConfig.model_fields
        chosen = {key: v for key, v in prompt.items() if key not in fields or v != fields[key].default}
        found["prompt"] = chosen
    return found
