"""What `latent-grpo validate` says: the resolved settings, the arithmetic of a step, and what would go wrong.

Needs no GPU, no Ray, no network and no weights: of a model on this machine its tokenizer and its configuration.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from latent_grpo.common.config import ConfigError, RunConfig

if TYPE_CHECKING:
    pass


def arithmetic(config: RunConfig) -> list[tuple[str, str]]:
    """(what, how much) of one step: prompts, samples, tokens, updates, slots, actors."""
    longest = max(t.max_response_tokens for t in config.tasks)
    prompt = max(t.max_prompt_tokens for t in config.tasks)
    samples = config.samples_per_step
    updates = config.prompts_per_step // config.minibatch_prompts
    slots = (config.max_staleness + 1) * config.prompts_per_step
    rollout, learner = config.rollout, config.learner
    cpus = rollout.workers * rollout.resources.num_cpus + learner.ranks * learner.resources.num_cpus
    gpus = rollout.workers * rollout.resources.num_gpus + learner.ranks * learner.resources.num_gpus
    at_most = "at most " if config.dynamic_sampling == "drop" else ""
    return [
        ("prompts a step", f"{at_most}{config.prompts_per_step}, {config.group_size} samples each"),
        ("samples a step", f"{at_most}{samples:,}"),
        ("response steps a step", f"at most {samples * longest:,} ({longest:,} a sample)"),
        ("tokens a step, prompts included", f"at most {samples * (longest + prompt):,}"),
        ("updates a step", f"{at_most}{updates}, {config.minibatch_prompts} prompts each"),
        ("longest sequence", f"{prompt + longest:,} tokens; a micro-batch holds {learner.tokens_per_microbatch:,}"),
        ("groups in flight", f"at most {slots} ({config.max_staleness} step(s) of staleness)"),
        ("whole run", f"{config.steps:,} steps, {at_most}{config.steps * samples:,} samples trained on"),
        ("actors", f"{rollout.workers} rollout worker(s), {learner.ranks} learner rank(s): {cpus:g} CPU, {gpus:g} GPU"),
    ]


def resource_rows(config: RunConfig, cpus: float | None, gpus: float | None) -> list[tuple[str, str]]:
    """Whether a cluster of that size can hold the run's actors. Raises ConfigError if not.

    Without a size it is this machine that a run would use; a cluster may be larger, so too little is only said.
    """
    from latent_grpo.deploy.run.ray_session import check_resources, needed_resources

    needed = needed_resources(config)
    given = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount is not None}
    unknown = {name: amount for name, amount in needed.items() if name not in given}
    check_resources(config, given | unknown, "a cluster of the given size")
    if not unknown:
        return [("resources", "the given cluster can hold all actors")]
    if given or set(unknown) != {"CPU"}:
        return [("resources", f"not checked for {', '.join(unknown)}: give the cluster's --cpus and --gpus")]
    try:
        check_resources(config, {"CPU": os.cpu_count()}, "this machine")
    except ConfigError as error:
        return [("warning", f"{error}. For a cluster give its --cpus")]
    return [("resources", f"this machine's {os.cpu_count()} CPUs can hold all actors")]
