"""The rules across sections: which settings cannot work together, and which have no effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel

from latent_grpo.common.config.stopping import EVALUATION, RISING, STEP_METRICS, evaluation_metrics, metric_problem

if TYPE_CHECKING:
    from latent_grpo.common.config.run import RunConfig


def conflicts(config: RunConfig) -> list[str]:
    """Returns what cannot work or has no effect; each sentence names the keys, the values and what to set."""
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
    if config.rollout.workers < config.rollout.min_workers:
        problems.append(
            f"rollout.workers ({config.rollout.workers}) is below rollout.min_workers ({config.rollout.min_workers}); "
            "raise the former or lower the latter"
        )
    most = config.rollout.max_workers
    if most is not None and config.rollout.workers > most:
        problems.append(
            f"rollout.workers ({config.rollout.workers}) is above rollout.max_workers ({most}); lower the former or "
            "raise the latter"
        )
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
    gpus = {"learner": config.learner.resources.num_gpus, "rollout": config.rollout.resources.num_gpus}
    if config.weights.backend == "nccl" and (lacking := [end for end, number in gpus.items() if not number]):
        problems.append(
            f"weights.backend nccl needs GPUs at both ends, and {' and '.join(lacking)} have none; set "
            f"{' and '.join(f'{end}.resources.num_gpus' for end in lacking)}, or weights.backend to gloo"
        )
    if config.deterministic and config.max_staleness:
        problems.append(f"deterministic: true needs max_staleness 0, got {config.max_staleness}")
    if not config.dump.every and (
        limits := [k for k in ("which", "keep_steps", "keep_bytes") if changed(config.dump, k)]
    ):
        problems.append(f"dump.{', dump.'.join(limits)} would have no effect with dump.every 0; remove it")
    if config.optimizer.schedule == "constant" and config.optimizer.decay_steps is not None:
        problems.append("optimizer.decay_steps has no effect with optimizer.schedule constant; remove it")
    if config.model.train_layers and config.warm_start is not None and config.warm_start.source == "induced":
        problems.append(
            f"model.train_layers ({config.model.train_layers}) has no effect on stage 1 of warm_start.source induced, "
            "which trains whole models; leave it out, or take uniform labels"
        )
    if config.warm_start is not None and config.warm_start.lora is not None and config.warm_start.source == "induced":
        problems.append(
            "warm_start.lora has no effect on stage 1 of warm_start.source induced, which trains whole models; leave "
            "it out, or take uniform labels"
        )
    if config.lora is not None and not config.freeze_embeddings:
        problems.append(
            "freeze_embeddings: false has no effect with lora, which trains its additions to linear layers alone; "
            "leave one of them out"
        )
    if config.batch_window > config.prompts_per_step * min(config.max_staleness, 1):
        problems.append(
            f"batch_window ({config.batch_window}) can be at most prompts_per_step ({config.prompts_per_step}), and "
            f"needs max_staleness of 1 or more, got {config.max_staleness}"
        )
    problems += _vllm_problems(config)
    problems += _engine_problems(config)
    problems += _objective_problems(config)
    problems += _without_effect(config)
    problems += _metric_problems(config)
    longest = max((t.max_prompt_tokens + t.max_response_tokens for t in config.tasks), default=0)
    if config.model.new is not None and config.model.max_positions is not None:
        problems.append(
            f"model.max_positions ({config.model.max_positions}) is for a model that is given; set "
            "model.new.max_positions"
        )
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
    """Returns the settings with which a rollout engine would refuse every group."""
    largest = {
        "group_size": config.group_size,
        "evaluation.runs": config.evaluation.runs if config.evaluation.tasks else 0,
        "evaluation.samples": config.evaluation.samples if config.evaluation.tasks else 0,
    }
    rows, in_flight = config.rollout.max_rows, config.rollout.in_flight_updates
    needs = {
        "max_staleness of 1 or more, got 0": config.max_staleness == 0,
        "deterministic: false, since it is time that decides which weights draw a step": config.deterministic,
    }
    graphs = {
        "a GPU for each rollout worker; set rollout.resources.num_gpus": not config.rollout.resources.num_gpus,
        f"rollout.device auto or cuda, got {config.rollout.device}": config.rollout.device.startswith("cpu"),
        "deterministic: false, since graphs have padded shapes": config.deterministic,
        "rollout.engine transformers; vLLM captures its own (rollout.vllm.eager)": config.rollout.engine
        != "transformers",
    }
    problems = [
        f"rollout.compile=on needs {need}" for need, no in graphs.items() if config.rollout.compile == "on" and no
    ]
    problems += [f"rollout.in_flight_updates needs {need}" for need, lacking in needs.items() if in_flight and lacking]
    return problems + [
        f"rollout.max_rows ({rows}) is smaller than {key} ({samples}), and a group is decoded as a whole; raise it"
        for key, samples in largest.items()
        if samples > rows
    ]


def _objective_problems(config: RunConfig) -> list[str]:
    """Returns faults that the learner would otherwise find only after the warm start."""
    problems, clip = [], config.clip
    if clip.dual < 1 + clip.high:
        problems.append(f"clip.dual ({clip.dual:g}) must be at least 1 + clip.high ({1 + clip.high:g})")
    if config.old_log_probs == "behaviour":
        needs = {
            "max_staleness 0": config.max_staleness > 0,
            "centering_draws 0": config.centering_draws > 0,
            "importance off": config.importance_mode != "off",
        }
        lacking = [need for need, lacks in needs.items() if lacks]
        if lacking:
            problems.append(f"old_log_probs behaviour needs {' and '.join(lacking)}: these take the learner's own pass")
    if config.importance_mode == "mask" and config.importance_floor >= config.importance_cap:
        problems.append(
            f"importance mask needs importance_floor below importance_cap, got {config.importance_floor:g} and "
            f"{config.importance_cap:g}"
        )
    if config.centering_draws and config.latent and (config.noise.mode == "off" or not config.noise.scale):
        problems.append(
            f"centering_draws ({config.centering_draws}) needs noise, got noise.mode {config.noise.mode} and "
            f"noise.scale {config.noise.scale:g}: other draws would be the same; set it to 0"
        )
    if config.model.dtype == "bfloat16" and config.learner.zero_stage == 0:
        problems.append(
            "model.dtype bfloat16 with learner.zero_stage 0 has no float32 master weights; set learner.zero_stage to 1"
        )
    if config.learner.offload != "none" and config.learner.zero_stage < 3:
        problems.append(  # below, DeepSpeed adds up offloaded gradients in the parameters' dtype, not in float32
            f"learner.offload {config.learner.offload} needs learner.zero_stage 3, got {config.learner.zero_stage}"
        )
    if config.learner.overlap_communication is True and not config.learner.resources.num_gpus:
        problems.append(
            "learner.overlap_communication true needs GPUs (learner.resources.num_gpus, got 0): a CPU does one thing "
            "after the other; set it to auto"
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


def _metric_problems(config: RunConfig) -> list[str]:
    """Returns what is wrong with the metrics that choose the best checkpoint and end the run."""
    best, stop = config.checkpoint.keep_best, config.stop_on
    tasks = [task.name for task in config.evaluation.tasks]
    problems: list[str | None] = []
    if best is not None and changed(config.checkpoint, "keep_best"):
        problems.append(metric_problem("checkpoint.keep_best", best, evaluation_metrics(tasks, RISING)))
        if not tasks or not (config.evaluation.every or config.evaluation.at_end):
            problems.append(
                "checkpoint.keep_best needs evaluation.tasks, and evaluation.every for more than one value; set them, "
                "or checkpoint.keep_best to null"
            )
    if stop is not None:
        latent = [name for name in STEP_METRICS if config.latent or "latent" not in name]
        problems.append(metric_problem("stop_on.metric", stop.metric, [*evaluation_metrics(tasks), *latent]))
        if stop.metric.startswith(EVALUATION) and not (tasks and config.evaluation.every):
            problems.append(
                f"stop_on.metric {stop.metric} is measured by evaluations, and there are none while the run goes on: "
                "set evaluation.every and evaluation.tasks"
            )
    return [problem for problem in problems if problem is not None]


def _without_effect(config: RunConfig) -> list[str]:
    """Returns keys that differ from their defaults and have no effect with the other settings."""
    weights = config.weights
    idle = {
        "importance_cap": (changed(config, "importance_cap") and config.importance_mode == "off", "importance off"),
        "importance_floor": (
            changed(config, "importance_floor") and config.importance_mode != "mask",
            f"importance {config.importance_mode}",
        ),
        "max_dispatch_factor": (
            changed(config, "max_dispatch_factor") and config.dynamic_sampling == "drop",
            "dynamic_sampling drop",
        ),
        "noise.scale": (
            config.latent and changed(config.noise, "scale") and config.noise.mode == "off",
            "noise.mode off",
        ),
        "evaluation.interim_problems and interim_runs": (
            config.evaluation.interim and not config.evaluation.every,
            "evaluation.every 0",
        ),
        "evaluation.blocking": (
            not config.evaluation.blocking and not config.evaluation.every,
            "evaluation.every 0",
        ),
        "evaluation.sampled_problems": (
            changed(config.evaluation, "sampled_problems") and not config.evaluation.samples,
            "evaluation.samples 0",
        ),
        "weights.nccl": (bool(weights.nccl) and weights.backend == "gloo", "weights.backend gloo"),
        **{
            f"weights.{key}": (changed(weights, key), f"weights.transport {weights.transport}")
            for key in ("backend", "interface", "timeout_s")
            if weights.transport != "collective"
        },
    }
    problems = [f"{key} has no effect with {why}; remove it" for key, (given, why) in idle.items() if given]
    end = config.model.prompt.think_end
    problems += [
        f"task {task.name}: prompt.think_end {task.prompt.think_end!r} differs from model.prompt.think_end {end!r}; "
        "a run has one latent-end token for all tasks: set model.prompt.think_end"
        for task in (*config.tasks, *config.evaluation.tasks)
        if task.prompt is not None and changed(task.prompt, "think_end") and task.prompt.think_end != end
    ]
    return problems


def _vllm_problems(config: RunConfig) -> list[str]:
    """Returns settings that the vLLM engine cannot serve; `deploy.run.preparation` checks its version and the model."""
    rollout, vllm = config.rollout, config.rollout.vllm
    if rollout.engine != "vllm":
        if vllm != type(vllm)():
            return [
                f"rollout.vllm has no effect with rollout.engine {rollout.engine}; remove it or set rollout.engine=vllm"
            ]
        return []
    problems = []
    if config.deterministic:
        problems.append("deterministic: true needs rollout.engine transformers, since vLLM's batches depend on timing")
    if rollout.device != "auto":
        problems.append(
            f"rollout.device ({rollout.device}) has no effect with rollout.engine vllm, whose build decides; remove it"
        )
    gpus = rollout.resources.num_gpus
    if vllm.tensor_parallel > 1 and gpus != vllm.tensor_parallel:
        problems.append(
            f"rollout.vllm.tensor_parallel ({vllm.tensor_parallel}) needs as many GPUs per worker; set "
            f"rollout.resources.num_gpus to {vllm.tensor_parallel}, got {gpus:g}"
        )
    if vllm.memory_share is not None and not gpus:
        problems.append(
            "rollout.vllm.memory_share needs a GPU and rollout.resources.num_gpus is 0; set rollout.vllm.kv_cache_bytes"
        )
    return problems
