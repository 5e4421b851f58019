"""Every setting of a run: pydantic models, one YAML file and dotted command-line overrides.

It imports neither torch, Ray nor transformers, so that `latent-grpo validate` answers in a second. The key names are a
public interface: profiles, the resolved `config.json` of a run and the documentation use them.

A setting that the algorithm decides (METHOD §9) is `None` until :class:`RunConfig` has filled it in; a user's
explicit value wins, so that every ablation is one line.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, PositiveInt, PrivateAttr, model_validator

from latent_grpo.common.config.learning import ClipConfig, LatentSFTConfig, NoiseConfig, OptimizerConfig
from latent_grpo.common.config.monitoring_and_checkpoints import (
    CheckpointConfig,
    DumpConfig,
    EvaluationConfig,
    HealthConfig,
    MetricsConfig,
)
from latent_grpo.common.config.objective import Objective
from latent_grpo.common.config.problems_and_model import ModelConfig, TaskConfig, VerifierDefinition
from latent_grpo.common.config.rules import Rule, keys_with
from latent_grpo.common.config.section import LocalPath, Section, Seed
from latent_grpo.common.config.services import DeadlineConfig, LearnerConfig, RayConfig, RolloutConfig
from latent_grpo.common.config.stopping import (
    EVALUATION,
    RISING,
    STEP_METRICS,
    StopConfig,
    evaluation_metrics,
    metric_problem,
)
from latent_grpo.common.errors import ConfigError
from latent_grpo.common.types import LatentExit

Algorithm = Literal["latent_grpo", "soft_grpo", "grpo"]
T = TypeVar("T")


def _decided(value: T | None) -> T:
    if value is None:
        raise ConfigError("a key that the algorithm decides was set to null after the settings were read; give a value")
    return value


class RunConfig(Section):
    """All settings of a training run. Where a default depends on the algorithm, an explicit value wins (METHOD §9)."""

    algorithm: Annotated[Algorithm, Rule.TOKENS] = "latent_grpo"
    """Training algorithm, which sets the defaults of other keys (METHOD §9). With `grpo`, responses start in visible
    mode."""
    seed: Seed = 0
    """Seed of noise, prompt order, generated problems and a new model's weights (METHOD §2.5)."""
    deterministic: bool = False
    """Whether the run repeats bit for bit at any number of workers. Needs CPU only, `max_staleness` 0 and the engine
    `transformers`, and decodes each group alone at a fixed shape."""
    steps: PositiveInt = 100
    """Number of steps, each of which trains on one batch (METHOD symbols). A resumed run may change it if
    `optimizer.schedule` is constant or `optimizer.decay_steps` is given."""

    # the policy's record (METHOD §2)
    k: Annotated[PositiveInt, Rule.LATENT_ONLY, Rule.TOKENS] = 10
    """Number of vocabulary entries that a latent step mixes: K of METHOD §1."""
    tau: Annotated[float, Field(gt=0), Rule.LATENT_ONLY, Rule.TOKENS] = 1.0
    """Temperature of mixture weights, which are softmax(scores / tau) (METHOD §2.1.5)."""
    noise: Annotated[NoiseConfig, Rule.LATENT_ONLY] = NoiseConfig()
    latent_exit: Annotated[LatentExit, Rule.LATENT_ONLY] = "argmax_or_first"
    """What ends latent mode: the latent-end token as the noise-free argmax or as the first selected id
    (`argmax_or_first`), or as the latter alone (`first`), as the reference does it for Qwen (METHOD §2.3)."""
    temperature: Annotated[float, Field(gt=0)] = 0.6
    """Sampling temperature of hard steps, which divides their logits in rollouts and in the learner (METHOD §2.4,
    §3.3)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Cumulative probability of the nucleus of most likely tokens, in latent and in hard steps (METHOD §2.1.2,
    §2.4)."""
    top_k: Annotated[int, Field(ge=0)] = 30
    """Number of most likely tokens from which a hard step is drawn; 0: no bound (METHOD §2.4)."""

    # density and advantages (METHOD §3, §4)
    component_weighting: Annotated[Literal["mixture", "uniform"] | None, Rule.OBJECTIVE, Rule.LATENT_ONLY] = None
    """Weight of a component in a latent step's log-density: its mixture weight (`mixture`), or 1/K (`uniform`) (METHOD
    §3.1)."""
    flip: Annotated[Literal["reference", "sign", "off"] | None, Rule.OBJECTIVE, Rule.LATENT_ONLY] = None
    """Straight-through gradient of components with d < 0 and no positive advantage: bounded (`reference`), flipped to
    the advantage's sign (`sign`), or unchanged (`off`) (METHOD §3.2)."""
    first_token: Annotated[bool | None, Rule.OBJECTIVE] = None
    """Whether the first response step is learned from the most likely correct sample of a group alone (METHOD §4.2)."""
    learn_exit: Annotated[bool, Rule.LATENT_ONLY] = True
    """Whether the step that leaves latent mode has its sample's advantage, as in the paper; false: it has none, so
    rewards do not teach where to leave. An addition of this project against reasoning that moves out of latent mode
    (METHOD §5, docs/study.md)."""
    masking: Annotated[Literal["exclude", "include", "off"] | None, Rule.OBJECTIVE] = None
    """Treatment of invalid samples: advantage 0 and left out of the group's statistics (`exclude`), advantage 0 and
    counted in them (`include`), or their own advantage (`off`) (METHOD §4.1)."""
    scale_by_std: bool = True
    """Whether advantages are divided by the standard deviation of the group's rewards; false: Dr. GRPO (METHOD
    §4.1)."""
    centering_draws: Annotated[int, Field(ge=0, le=64), Rule.OBJECTIVE, Rule.LATENT_ONLY] = 0
    """Number of other draws of a latent step whose mean log-density is subtracted from its own; 0: none. An addition of
    this project (docs/centering.md)."""

    # the batch (METHOD symbols, §4.3, §6)
    group_size: Annotated[int, Field(ge=2)] = 8
    """Number of samples per prompt: G of METHOD symbols."""
    prompts_per_step: PositiveInt = 64
    """Number of prompts per batch; each gives one group."""
    minibatch_prompts: PositiveInt = 16
    """Number of prompts per update (mini-batch); must divide `prompts_per_step`."""
    dynamic_sampling: Literal["refill", "drop"] = "refill"
    """What becomes of groups that teach nothing: they are replaced by fresh prompts (`refill`), or leave the batch
    smaller (`drop`) (METHOD §4.3)."""
    max_dispatch_factor: Annotated[PositiveInt, Rule.MAY_CHANGE] = 50
    """Upper bound on the groups dispatched for one batch, in multiples of `prompts_per_step`; more are an error. Used
    with `dynamic_sampling` `refill` (METHOD §4.3)."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Upper bound on the staleness of a group that is trained on, in policy versions; 0: rollouts and training take
    turns (METHOD §6)."""
    batch_window: Annotated[int, Field(ge=0)] = 0
    """Number W of groups that a batch may pass over, at most `prompts_per_step`, so that the learner need not wait for
    long rollouts: it takes those that have arrived among the next W + `prompts_per_step`. The batch after it waits for
    the ones passed over, which may be a version older than `max_staleness` says. 0: batches are in prompt order."""
    old_log_probs: Literal["recompute", "behaviour"] = "recompute"
    """Source of the log-probs that a policy ratio is taken to: a pass of the learner before the first update
    (`recompute`, METHOD §5), or the rollout's record (`behaviour`), which saves a quarter of the learner's work where
    engine and learner agree. `behaviour` needs `max_staleness` 0 and no `centering_draws`."""
    importance: Literal["off", "truncate", "mask"] | None = None
    """Importance weight of a response step, which corrects what the rollout's policy and the learner's differ by: none
    (`off`), their ratio up to `importance_cap` (`truncate`, METHOD §6), or their ratio between `importance_floor` and
    `importance_cap` and 0 beyond (`mask`). null: `off` with `max_staleness` 0, where they differ by the engine's
    arithmetic alone, else `truncate`."""
    importance_cap: Annotated[float, Field(gt=0)] = 2.0
    """Upper bound on the importance weight of a response step (METHOD §6)."""
    importance_floor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Ratio below which `importance` `mask` leaves a response step out."""

    # objective (METHOD §5)
    clip: ClipConfig = ClipConfig()
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of the KL divergence from the initial model in the loss; 0: no KL term (METHOD §5)."""
    freeze_embeddings: bool = True
    """Whether input embeddings are frozen, and with them an output layer that is tied to them (METHOD §5)."""
    optimizer: OptimizerConfig = OptimizerConfig()

    model: Annotated[ModelConfig, Rule.TOKENS]
    warm_start: Annotated[LatentSFTConfig | None, Rule.TOKENS] = None
    """Warm start before the RL steps; null: the model already has a latent start."""
    tasks: Annotated[list[TaskConfig], Rule.TOKENS]
    """Tasks that the policy is trained on."""
    verifiers: dict[str, VerifierDefinition] = Field(default_factory=dict)
    """Verifiers that `tasks.N.verifier` may name besides the registered ones."""
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: Annotated[EvaluationConfig, Rule.MAY_CHANGE] = EvaluationConfig()
    checkpoint: Annotated[CheckpointConfig, Rule.MAY_CHANGE] = CheckpointConfig()
    stop_on: Annotated[StopConfig | None, Rule.MAY_CHANGE] = None
    """Whether the run may end before its last step, on a metric; null: it takes all its `steps`."""
    dump: Annotated[DumpConfig, Rule.MAY_CHANGE] = DumpConfig()
    metrics: Annotated[MetricsConfig, Rule.MAY_CHANGE] = MetricsConfig()
    health: Annotated[HealthConfig, Rule.MAY_CHANGE] = HealthConfig()
    deadlines: Annotated[DeadlineConfig, Rule.MAY_CHANGE] = DeadlineConfig()
    max_recoveries: Annotated[int, Field(ge=0), Rule.MAY_CHANGE] = 3
    """Maximum number of times within an hour that a run goes on by itself from its last checkpoint, after it lost a
    learner rank or its controller; one more ends it. Lost rollout workers are replaced (`rollout.max_restarts`)."""
    ray: Annotated[RayConfig, Rule.MAY_CHANGE] = RayConfig()
    run_name: Annotated[str | None, Field(pattern=r"^\w[\w.-]*$"), Rule.MAY_CHANGE] = None
    """Name of the run's folder below `runs_folder`; null: it is made of the profile's name and the time. `train` goes
    on with a named run that has begun, so that a job that a cluster starts again does."""
    runs_folder: Annotated[LocalPath, Rule.MAY_CHANGE] = "runs"
    """Folder in which run folders are made; on a cluster it must be on shared storage."""
    self_test_groups: Annotated[int, Field(ge=0), Rule.MAY_CHANGE] = 2
    """Number of groups that are replayed in the learner before training, whose log-probs must agree within the
    tolerance of METHOD §6; 0: no self-test."""

    _fitted: dict[str, float] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _fill_and_check(self) -> Self:
        for key, value in ALGORITHM_DEFAULTS[self.algorithm].items():
            owner, leaf = (self.noise, "mode") if key == "noise.mode" else (self, key)
            if getattr(owner, leaf) is None:
                object.__setattr__(owner, leaf, value)
        if self.warm_start is not None and self.model.path is not None:
            self._fitted = self.warm_start.fit_given_model()
        if found := conflicts(self):
            raise ValueError("; ".join(found))
        return self

    @property
    def fitted_defaults(self) -> dict[str, float]:
        """Keys of `warm_start` that the settings leave open and whose defaults fit a given model, with their values."""
        return self._fitted

    @property
    def latent(self) -> bool:
        """Whether responses start with latent steps."""
        return self.algorithm != "grpo"

    @property
    def latent_sft(self) -> LatentSFTConfig:
        """The section `warm_start`. Raises ConfigError where the settings have none."""
        if self.warm_start is None:
            raise ConfigError("Latent-SFT needs the section warm_start; add it (an empty section uses the defaults)")
        return self.warm_start

    @property
    def importance_mode(self) -> Literal["off", "truncate", "mask"]:
        """The value of `importance`, decided by `max_staleness` where it is null."""
        return self.importance or ("truncate" if self.max_staleness else "off")

    @property
    def objective(self) -> Objective:
        """The keys that the algorithm has decided where the settings do not."""
        return Objective(
            noise_mode=_decided(self.noise.mode),
            component_weighting=_decided(self.component_weighting),
            flip=_decided(self.flip),
            first_token=_decided(self.first_token),
            masking=_decided(self.masking),
        )

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
"""The defaults of each algorithm, which are all that defines it, with the visible start of `grpo` (METHOD §9)."""

OBJECTIVE_KEYS = frozenset(keys_with(RunConfig, Rule.OBJECTIVE))
LATENT_ONLY_KEYS = keys_with(RunConfig, Rule.LATENT_ONLY)


# --- rules across sections ----------------------------------------------------------------------------------------


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
    return [f"rollout.in_flight_updates needs {need}" for need, lacking in needs.items() if in_flight and lacking] + [
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
