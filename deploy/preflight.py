"""What `latent-grpo validate` says: the resolved settings, the arithmetic of a step, and what would go wrong.

Needs no GPU, no Ray and no weights: a tokenizer is read where the profile names one, tables and problem files are not.
"""

from __future__ import annotations

from pathlib import Path

from common.config import ConfigError, RunConfig


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


def check_files(config: RunConfig) -> None:
    """Raises :class:`common.config.ConfigError` for a problem file that is named and not there."""
    for task in [*config.tasks, *config.evaluation.tasks]:
        path = task.path
        if path is None:
            raise ConfigError(f"task {task.name}: set its `path` (.parquet, .jsonl, hf:... or builtin:...)")
        if not path.startswith(("hf:", "builtin:")) and not Path(path).is_file():
            raise ConfigError(f"task {task.name}: {path} does not exist; set its `path` to a .parquet or .jsonl file")
