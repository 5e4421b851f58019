"""Every setting of a run: pydantic models, one YAML file and dotted command-line overrides.

It imports neither torch, Ray nor transformers, so that `latent-grpo validate` answers in a second. The key names are a
public interface: profiles, the resolved `config.json` of a run and the documentation use them.

A setting that the algorithm decides (METHOD §9) is `None` until :class:`RunConfig` has filled it in; a user's
explicit value wins, so that every ablation is one line.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, PositiveInt, PrivateAttr, model_validator

from latent_grpo.common.config.conflicts import conflicts
from latent_grpo.common.config.learning import (
    ClipConfig,
    LatentSFTConfig,
    LoRAConfig,
    NoiseConfig,
    OptimizerConfig,
)
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
from latent_grpo.common.config.section import LocalPath, Section, Seed, StoragePlace
from latent_grpo.common.config.services import DeadlineConfig, LearnerConfig, RayConfig, RolloutConfig, WeightsConfig
from latent_grpo.common.config.stopping import StopConfig
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
    (`recompute`, METHOD §5), or the rollout's record (`behaviour`), which saves that pass (docs/measured.md) where
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
    lora: LoRAConfig | None = None
    """Train low-rank additions to the weights in RL instead of the weights; null: the weights. With additions
    `optimizer.lr` is 1e-5 unless it is set, and the initial model of the KL term takes no memory: it is the model
    without them."""

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
    weights: Annotated[WeightsConfig, Rule.MAY_CHANGE] = WeightsConfig()
    ray: Annotated[RayConfig, Rule.MAY_CHANGE] = RayConfig()
    run_name: Annotated[str | None, Field(pattern=r"^\w[\w.-]*$"), Rule.MAY_CHANGE] = None
    """Name of the run's folder below `runs_folder`; null: it is made of the profile's name and the time. `train`
    and `sft` go on with a named run that has begun, so that a job that a cluster starts again does."""
    runs_folder: Annotated[StoragePlace, Rule.MAY_CHANGE] = "runs"
    """Folder in which run folders are made; on a cluster it must be on shared storage. Or the URL of one in an object
    store, `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX` or `file:///FOLDER`: the run works in `work_folder` and is
    uploaded while it goes on (docs/cluster.md)."""
    work_folder: Annotated[LocalPath, Rule.MAY_CHANGE] = "runs"
    """Folder of this machine in which the folders of runs are made whose `runs_folder` is a URL; of a run on several
    nodes, one that all of them see."""
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
        if self.lora is not None:
            self.optimizer.fit_lora()
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
        """The number of responses that a step is trained on: prompts_per_step x group_size."""
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
