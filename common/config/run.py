"""Every setting of a run: pydantic models, one YAML file and dotted command-line overrides.

Imports neither torch, Ray nor transformers, so `latent-grpo validate` answers in a second. The key names are a
public interface: profiles, the resolved `config.json` of a run and the documentation use them.

A setting that the algorithm decides (METHOD §9) is `None` until :class:`RunConfig` has filled it in; a user's
explicit value wins, which is how every ablation is one line.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PositiveInt, model_validator

from latent_grpo.common.config.sections import (
    Algorithm,
    CheckpointConfig,
    ClipConfig,
    DeadlineConfig,
    DumpConfig,
    EvaluationConfig,
    HealthConfig,
    LatentSFTConfig,
    LearnerConfig,
    MetricsConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    RolloutConfig,
    Section,
    TaskConfig,
    VerifierDefinition,
)


class RunConfig(Section):
    """One training run."""

    algorithm: Algorithm = "latent_grpo"
    seed: int = 0
    deterministic: bool = False
    """CPU only: each group is decoded alone at a fixed shape; runs repeat bit for bit at any number of workers."""
    steps: PositiveInt = 100

    # the policy's record (METHOD §2)
    k: PositiveInt = 10
    tau: Annotated[float, Field(gt=0)] = 1.0
    noise: NoiseConfig = NoiseConfig()
    temperature: Annotated[float, Field(gt=0)] = 0.6
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    top_k: PositiveInt = 30

    # density and advantages (METHOD §3, §4)
    component_weighting: Literal["mixture", "uniform"] | None = None
    flip: Literal["reference", "sign", "off"] | None = None
    first_token: bool | None = None
    masking: Literal["exclude", "include", "off"] | None = None
    """METHOD §4.1."""
    scale_by_std: bool = True
    centering_draws: Annotated[int, Field(ge=0, le=64)] = 0
    """Ours: other draws of each latent step whose mean log-density is subtracted (docs/centering.md); 0: none."""

    # the batch (METHOD symbols, §4.3, §6)
    group_size: Annotated[int, Field(ge=2)] = 8
    prompts_per_step: PositiveInt = 64
    minibatch_prompts: PositiveInt = 16
    dynamic_sampling: Literal["refill", "drop"] = "refill"
    max_dispatch_factor: PositiveInt = 50
    """More groups than this times `prompts_per_step` dispatched for one batch is an error (METHOD §4.3)."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    importance_cap: Annotated[float, Field(gt=0)] = 2.0
    """Cap of the truncated importance weight, used when max_staleness > 0 (METHOD §6)."""

    # objective (METHOD §5)
    clip: ClipConfig = ClipConfig()
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.0
    freeze_embeddings: bool = True
    optimizer: OptimizerConfig = OptimizerConfig()

    model: ModelConfig
    warm_start: LatentSFTConfig | None = None
    """Latent-SFT before the RL steps; the quickstart's model starts from nothing."""
    tasks: list[TaskConfig]
    verifiers: dict[str, VerifierDefinition] = Field(default_factory=dict)
    """Verifiers that `tasks.verifier` may name besides the registered ones."""
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    dump: DumpConfig = DumpConfig()
    metrics: MetricsConfig = MetricsConfig()
    health: HealthConfig = HealthConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    runs_folder: str = "runs"
    """Where run folders are made. On a cluster: shared storage."""
    self_test_groups: Annotated[int, Field(ge=0)] = 2
    """Groups replayed in the learner before training (METHOD §6's tolerance); 0 turns the self-test off."""

    @model_validator(mode="after")
    def _fill_and_check(self):
        for key, value in ALGORITHM_DEFAULTS[self.algorithm].items():
            owner, leaf = (self.noise, "mode") if key == "noise.mode" else (self, key)
            if getattr(owner, leaf) is None:
                object.__setattr__(owner, leaf, value)
        if found := conflicts(self):
            raise ValueError("; ".join(found))
        return self

    @property
    def latent(self) -> bool:
        """Whether responses start with latent steps."""
        return self.algorithm != "grpo"

    @property
    def schema_k(self) -> int:
        """K of the Arrow schema: 0 for `grpo`, whose records have no latent steps."""
        return self.k if self.latent else 0

    @property
    def latent_keys_set(self) -> list[str]:
        """Keys of latent steps that differ from the algorithm's defaults."""
        noise = (self.noise.mode, self.noise.scale) != (ALGORITHM_DEFAULTS[self.algorithm]["noise.mode"], 1.0)
        defaults = {key: type(self).model_fields[key].default for key in LATENT_ONLY_KEYS if key != "noise"}
        defaults |= {key: value for key, value in ALGORITHM_DEFAULTS[self.algorithm].items() if key in defaults}
        return [key for key, value in defaults.items() if getattr(self, key) != value] + (["noise"] if noise else [])

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.group_size

    def dump_due(self, step: int) -> bool:
        """Whether step `step` of the run (from 1) is dumped."""
        dump, checkpoints = self.dump, self.checkpoint.every
        if not dump.every:
            return False
        follows = step == 1 or (checkpoints > 0 and (step - 1) % checkpoints == 0)
        return step % dump.every == 0 or (dump.after_checkpoint and follows)


ALGORITHM_DEFAULTS: dict[str, dict[str, Any]] = {
    "latent_grpo": {
        "noise.mode": "one_sided",
        "component_weighting": "mixture",
        "flip": "reference",
        "first_token": True,
        "masking": "exclude",
    },
    "soft_grpo": {
        "noise.mode": "two_sided",
        "component_weighting": "uniform",
        "flip": "off",
        "first_token": False,
        "masking": "off",
    },
    "grpo": {
        "noise.mode": "off",
        "component_weighting": "uniform",
        "flip": "off",
        "first_token": False,
        "masking": "off",
    },
}
"""METHOD §9: an algorithm is nothing but these defaults (and, for `grpo`, a response that starts visible)."""

OBJECTIVE_KEYS = {"component_weighting", "flip", "first_token", "masking", "centering_draws"}
LATENT_ONLY_KEYS = ("k", "tau", "noise", "component_weighting", "flip", "centering_draws")


# --- rules across sections ----------------------------------------------------------------------------------------


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
    """Settings that the vLLM engine cannot serve; which vLLM and which models it can: `deploy.checks.validate`."""
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


# --- loading -----------------------------------------------------------------------------------------------------
