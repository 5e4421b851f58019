"""The rule for the settings that a resumed run may change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from latent_grpo.common.config.learning import OptimizerConfig
from latent_grpo.common.config.rules import Rule, rules_of
from latent_grpo.common.config.run import RunConfig


def refused_changes(stored: RunConfig, wanted: RunConfig) -> list[str]:
    """Returns `key: old -> new` for every change that the key's rules do not allow."""
    before, after = _flat(stored.model_dump(mode="json")), _flat(wanted.model_dump(mode="json"))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}

    def passes(key: str) -> bool:
        rules = rules_of(RunConfig, key)
        if stored.deterministic and Rule.LAST_BIT in rules:
            return False
        return Rule.MAY_CHANGE in rules or _more_steps(key, stored)

    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in sorted(changed) if not passes(key)]


def _more_steps(key: str, config: RunConfig) -> bool:
    """A number of steps may change where the learning rate's schedule does not depend on it."""
    optimizers: dict[str, OptimizerConfig] = {"steps": config.optimizer}
    if config.warm_start is not None:
        optimizers["warm_start.max_steps"] = config.warm_start.optimizer
    optimizer = optimizers.get(key)
    return optimizer is not None and (optimizer.schedule == "constant" or optimizer.decay_steps is not None)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict):
        pairs: Iterable[tuple[Any, Any]] = node.items()
    elif isinstance(node, list) and any(isinstance(v, dict) for v in node):
        pairs = enumerate(node)
    else:
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in pairs:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
