"""Cross-field rules of a run's settings (`common.config`): combinations that cannot work, and keys without effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel

if TYPE_CHECKING:
    from common.config import RunConfig


def conflicts(config: RunConfig) -> list[str]:
    """What cannot work or has no effect; each sentence names the keys, the values received and what to set."""
    problems: list[str] = []
    prompts, mini = config.prompts_per_step, config.minibatch_prompts
    if prompts % mini:
        near = sorted({d for d in range(1, prompts + 1) if prompts % d == 0}, key=lambda d: abs(d - mini))[:3]
        problems.append(
            f"prompts_per_step ({prompts}) is not divisible by minibatch_prompts ({mini}); "
            f"set minibatch_prompts to one of {sorted(near)} or prompts_per_step to {prompts // mini * mini or mini}"
        )
    if not config.tasks:
        problems.append("tasks: at least one task is needed; add one with `name` and `path`")
    names = [t.name for t in config.tasks]
    if len(set(names)) != len(names):
        problems.append(f"tasks: names must be distinct, got {names}; a problem's identity is task name + row")
    evaluated = [t.name for t in config.evaluation.tasks]
    if len(set(evaluated)) != len(evaluated):
        problems.append(
            f"evaluation.tasks: names must be distinct, got {evaluated}; a problem's identity is task name + row"
        )
    if config.algorithm == "grpo":
        set_here = config.latent_keys_set
        if set_here:
            problems.append(
                f"algorithm grpo has no latent steps: {', '.join(set_here)} would have no effect; remove the key(s)"
            )
        if config.warm_start is not None and config.warm_start.chain == "latent":
            problems.append("algorithm grpo with a latent warm start: set warm_start.chain to explicit")
    elif config.warm_start is not None and config.warm_start.chain == "explicit":
        problems.append(f"algorithm {config.algorithm} with an explicit warm start: set warm_start.chain to latent")
    if (
        config.warm_start is not None
        and config.warm_start.chain == "explicit"
        and config.warm_start.source != "uniform"
    ):
        problems.append(
            "warm_start.source induced has no effect with warm_start.chain explicit (no soft labels); remove it"
        )
    if config.warm_start is not None and config.latent and config.k < config.warm_start.compression:
        problems.append(
            f"k ({config.k}) is smaller than warm_start.compression ({config.warm_start.compression}): a latent step "
            "could not hold its tokens; raise k or lower the compression"
        )
    if config.deterministic and (config.learner.resources.num_gpus or config.rollout.resources.num_gpus):
        problems.append("deterministic: true is a CPU guarantee; set num_gpus of rollout and learner to 0")
    if config.deterministic and config.max_staleness:
        problems.append(f"deterministic: true needs max_staleness 0, got {config.max_staleness}")
    if not config.dump.every and (
        limits := [k for k in ("which", "keep_steps", "keep_bytes") if changed(config.dump, k)]
    ):
        problems.append(f"dump.{', dump.'.join(limits)} would have no effect with dump.every 0; remove it")
    if config.optimizer.schedule == "constant" and config.optimizer.decay_steps is not None:
        problems.append("optimizer.decay_steps has no effect with optimizer.schedule constant; remove it")
    problems += _vllm_problems(config)
    problems += _engine_problems(config)
    problems += _objective_problems(config)
    problems += _without_effect(config)
    longest = max((t.max_prompt_tokens + t.max_response_tokens for t in config.tasks), default=0)
    if config.model.new is not None and longest > config.model.new.max_positions:
        problems.append(
            f"model.new.max_positions ({config.model.new.max_positions}) is smaller than the longest prompt plus "
            f"response ({longest}); raise it or lower the tasks' budgets"
        )
    return problems


def changed(section: BaseModel, key: str) -> bool:
    """Whether a key differs from its default."""
    return getattr(section, key) != type(section).model_fields[key].default


def _engine_problems(config: RunConfig) -> list[str]:
    """What a rollout engine refuses of every group."""
    largest = {
        "group_size": config.group_size,
        "evaluation.runs": config.evaluation.runs if config.evaluation.tasks else 0,
        "evaluation.samples": config.evaluation.samples if config.evaluation.tasks else 0,
    }
    rows = config.rollout.max_rows
    return [
        f"rollout.max_rows ({rows}) is smaller than {key} ({samples}), and a group is decoded as a whole; raise it"
        for key, samples in largest.items()
        if samples > rows
    ]


def _objective_problems(config: RunConfig) -> list[str]:
    """Settings that the learner could only refuse after the warm start."""
    problems, clip = [], config.clip
    if clip.dual < 1 + clip.high:
        problems.append(f"clip.dual ({clip.dual:g}) must be at least 1 + clip.high ({1 + clip.high:g})")
    if config.centering_draws and config.latent and (config.noise.mode == "off" or not config.noise.scale):
        problems.append(
            f"centering_draws ({config.centering_draws}) needs noise, got noise.mode {config.noise.mode} and "
            f"noise.scale {config.noise.scale:g}: other draws would be the same; set it to 0"
        )
    if config.model.dtype == "bfloat16" and config.learner.zero_stage == 0:
        problems.append(
            "model.dtype bfloat16 with learner.zero_stage 0 has no float32 master weights; set learner.zero_stage to 1"
        )
    optimizers = {"optimizer": config.optimizer}
    if config.warm_start is not None:
        optimizers["warm_start.optimizer"] = config.warm_start.optimizer
    for key, optimizer in optimizers.items():
        if not all(0 <= beta < 1 for beta in optimizer.betas):
            problems.append(f"{key}.betas must be in [0, 1), got {list(optimizer.betas)}")
    new = config.model.new
    if new is not None and new.hidden_size % new.num_heads:
        problems.append(f"model.new.hidden_size ({new.hidden_size}) is not divisible by num_heads ({new.num_heads})")
    return problems


def _without_effect(config: RunConfig) -> list[str]:
    """Keys that differ from their defaults and do nothing with the others."""
    idle = {
        "importance_cap": (changed(config, "importance_cap") and not config.max_staleness, "max_staleness 0"),
        "max_dispatch_factor": (
            changed(config, "max_dispatch_factor") and config.dynamic_sampling == "drop",
            "dynamic_sampling drop",
        ),
        "noise.scale": (
            config.latent and changed(config.noise, "scale") and config.noise.mode == "off",
            "noise.mode off",
        ),
        "evaluation.sampled_problems": (
            changed(config.evaluation, "sampled_problems") and not config.evaluation.samples,
            "evaluation.samples 0",
        ),
    }
    problems = [f"{key} has no effect with {why}; remove it" for key, (given, why) in idle.items() if given]
    end = config.model.prompt.think_end
    problems += [
        f"task {task.name}: prompt.think_end {task.prompt.think_end!r} differs from model.prompt.think_end {end!r}; "
        "the latent-end token is one for the whole run: set model.prompt.think_end"
        for task in (*config.tasks, *config.evaluation.tasks)
        if task.prompt is not None and changed(task.prompt, "think_end") and task.prompt.think_end != end
    ]
    return problems


def _vllm_problems(config: RunConfig) -> list[str]:
    """Settings that the vLLM engine cannot serve; which vLLM and which models it can: `deploy.preflight`."""
    rollout, vllm = config.rollout, config.rollout.vllm
    if rollout.engine != "vllm":
        if vllm != type(vllm)():
            return ["rollout.vllm has no effect with rollout.engine transformers; remove it or set rollout.engine=vllm"]
        return []
    problems = []
    if config.deterministic:
        problems.append("deterministic: true needs rollout.engine transformers; vLLM batches as it likes")
    if rollout.device != "auto":
        problems.append(f"rollout.device ({rollout.device}) has no effect with rollout.engine vllm: its build decides")
    if vllm.in_flight_updates and config.max_staleness == 0:
        problems.append("rollout.vllm.in_flight_updates needs max_staleness of 1 or more, got 0")
    gpus = rollout.resources.num_gpus
    if vllm.tensor_parallel > 1 and gpus != vllm.tensor_parallel:
        problems.append(
            f"rollout.vllm.tensor_parallel ({vllm.tensor_parallel}) needs as many GPUs per worker; set "
            f"rollout.resources.num_gpus to {vllm.tensor_parallel}, got {gpus:g}"
        )
    if vllm.memory_share is not None and not gpus:
        problems.append("rollout.vllm.memory_share is of a GPU and rollout.resources.num_gpus is 0; use kv_cache_bytes")
    return problems
