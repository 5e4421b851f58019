"""Which settings a resumed run may change."""

from __future__ import annotations

from typing import Any

from latent_grpo.common.config import RunConfig

HARMLESS = (
    "rollout.workers",
    "rollout.resources",
    "rollout.max_rows",
    "rollout.max_restarts",
    "rollout.device",
    "rollout.verifier.processes",
    "rollout.verifier.max_ungraded_share",
    "learner.resources",
    "learner.device",
    "learner.tokens_per_microbatch",
    "learner.logprob_chunk_tokens",
    "learner.gradient_checkpointing",
    "learner.weight_bucket_bytes",
    "evaluation",
    "checkpoint",
    "dump",
    "metrics",
    "health",
    "deadlines",
    "runs_folder",
    "self_test_groups",
    "max_dispatch_factor",
)
"""Keys (with all below them) that a resumed run may change: they decide where and how fast, not what is computed."""


DECIDE_THE_LAST_BIT = (
    "rollout.resources.threads",
    "learner.resources.threads",
    "learner.tokens_per_microbatch",
    "learner.logprob_chunk_tokens",
    "learner.gradient_checkpointing",
)
"""Harmless otherwise; a deterministic run keeps them, since it promises every bit."""


def refused_changes(stored: RunConfig, wanted: RunConfig) -> list[str]:
    """`key: old -> new` of every change that is not harmless."""
    before, after = _flat(stored.model_dump(mode="json")), _flat(wanted.model_dump(mode="json"))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}

    def passes(key: str) -> bool:
        if stored.deterministic and key in DECIDE_THE_LAST_BIT:
            return False
        return any(key == h or key.startswith(f"{h}.") for h in HARMLESS) or _more_steps(key, stored)

    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in sorted(changed) if not passes(key)]


def _more_steps(key: str, config: RunConfig) -> bool:
    """`steps` may change where the learning rate's schedule does not depend on it."""
    return key == "steps" and (config.optimizer.schedule == "constant" or config.optimizer.decay_steps is not None)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict):
        pairs = node.items()
    elif isinstance(node, list) and any(isinstance(v, dict) for v in node):
        pairs = enumerate(node)
    else:
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in pairs:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
