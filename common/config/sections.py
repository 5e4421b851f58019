"""Every section and key of a run's settings, each with its sentence; no rule between sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from latent_grpo.common.types import NoiseMode

Algorithm = Literal["latent_grpo", "soft_grpo", "grpo"]


Dtype = Literal["float32", "bfloat16"]


Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


class Columns(Section):
    """Column names of a problem file. verl's `prompt` + `reward_model.ground_truth` are found by themselves."""

    problem: str = "problem"
    answer: str = "answer"
    cot: str = "cot"


class PromptConfig(Section):
    """How a problem becomes a prompt (METHOD §8). The rendered prompt ends with the start-of-thinking text."""

    system: str | None = None
    """System message, if any."""
    user: str = "{problem}"
    """User message; `{problem}` is replaced."""
    format: str | None = None
    """Plain-text prompt with `{problem}`, used instead of the chat template if given."""
    think_start: str = "<think>"
    """Appended unless the rendered prompt already ends with it (for `grpo` too: its explicit chain is thinking)."""
    think_end: str = "</think>"
    """The text whose first token id is the latent-end token, resolved from the tokenizer at start."""


class TaskConfig(Section):
    """A source of problems. Named benchmarks (`common.tasks.sources.BENCHMARKS`) give defaults for verifier and prompt."""

    name: str
    path: str | None = None
    """`.parquet`, `.jsonl`, `hf:owner/dataset[:split]`, or `builtin:NAME` for a generated task."""
    options: dict[str, int | float | str | bool] = {}
    """Options of a generated task (see `common.tasks.sources`)."""
    columns: Columns = Columns()
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the run's prompts relative to the other tasks."""
    limit: PositiveInt | None = None
    """At most this many rows (the first ones)."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are dropped, counted and listed in the summary."""
    max_response_tokens: PositiveInt = 1024
    """Response steps, latent and hard together."""
    verifier: str = "math"
    """`math`, `number`, `choice`, another registered name, a name of `verifiers`, or an import path
    `package.module:Name`."""
    prompt: PromptConfig | None = None
    """Overrides `model.prompt` for this task."""


class NewModelConfig(Section):
    """A small randomly initialised model, made on the spot (quickstart, demonstrations, tests)."""

    architecture: Literal["llama", "qwen2", "qwen3", "gpt2"] = "llama"
    tokenizer: Literal["arithmetic", "bpe"] = "arithmetic"
    """`arithmetic`: the fixed vocabulary of the generated task; `bpe`: trained on the first task's text."""
    vocab_size: PositiveInt = 2048
    """Of the BPE tokenizer."""
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 384
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 4
    max_positions: PositiveInt = 512
    tie_embeddings: bool = False
    initializer_range: Annotated[float, Field(gt=0)] = 0.05


class ModelConfig(Section):
    """The policy. Exactly one of `path` and `new`."""

    path: str | None = None
    """Folder or hub id of a Hugging Face causal LM with its tokenizer."""
    new: NewModelConfig | None = None
    dtype: Dtype = "float32"
    """Of the forward pass; master weights are float32 always."""
    prompt: PromptConfig = PromptConfig()

    @model_validator(mode="after")
    def _one_source(self):
        if (self.path is None) == (self.new is None):
            given = "both" if self.path else "neither"
            raise ValueError(f"model: exactly one of `path` and `new` must be given, got {given}; set model.path")
        return self


class NoiseConfig(Section):
    mode: NoiseMode | None = None
    """Gumbel noise of latent steps in training. Default by algorithm."""
    scale: Annotated[float, Field(ge=0)] = 1.0


class ClipConfig(Section):
    low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    high: Annotated[float, Field(gt=0)] = 0.2
    dual: Annotated[float, Field(gt=1)] = 3.0


class OptimizerConfig(Section):
    """AdamW with float32 master weights; the schedule counts steps of the run, not updates (METHOD symbols)."""

    lr: Annotated[float, Field(gt=0)] = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: constant, or decay to zero at `decay_steps`."""
    decay_steps: PositiveInt | None = None
    """Default: `steps` of the run."""
    max_bad_updates: PositiveInt = 3
    """So many non-finite updates in a row stop the run; each single one is skipped, dumped and counted."""


class SFTOptimizerConfig(OptimizerConfig):
    """Of Latent-SFT: its own defaults, so that setting one key leaves the others."""

    lr: Annotated[float, Field(gt=0)] = 3e-3
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    decay_steps: PositiveInt | None = None
    """Default: `max_steps` of the Latent-SFT."""


class InductionOptimizerConfig(SFTOptimizerConfig):
    """Of the three steps of stage 1."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 20


class ActorResources(Section):
    """What Ray reserves for one actor. Fractions share a device."""

    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    threads: PositiveInt = 1
    """Torch threads; fixed so that results do not depend on the machine."""
    custom: dict[str, float] = {}
    """Custom Ray resources."""


class VerifierConfig(Section):
    processes: PositiveInt = 1
    """Grader processes per rollout worker."""
    time_limit_s: Annotated[float, Field(gt=0)] = 5.0
    memory_limit_bytes: PositiveInt = 2**30
    fallback: Literal["none", "last_number"] = "none"
    """What counts as the answer when the response has no box."""
    max_ungraded_share: Share = 0.1
    """Above this share of ungraded samples in a step the run stops (infrastructure failure is never reward 0)."""


class VerifierDefinition(Section):
    """A verifier under a name that tasks can use: a plug-in with options, or a composition (docs/verifiers.md)."""

    kind: str
    """`weighted_sum`, `format`, `length_penalty`, `gate`, any other registered name, or an import path."""
    options: dict[str, Any] = {}
    """Arguments of its constructor. A verifier inside is a mapping with `kind` and `options` again."""


class VLLMConfig(Section):
    """The engine `vllm` (docs/vllm.md)."""

    tensor_parallel: PositiveInt = 1
    """GPUs of one engine; `rollout.resources.num_gpus` must be as many."""
    kv_cache_bytes: PositiveInt | None = None
    """Of keys and values per GPU. Default: what `memory_share` leaves; on CPU 1 GiB."""
    memory_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of a GPU's memory, weights included. Default: 0.9 of what `rollout.resources.num_gpus` reserves."""
    batched_tokens: PositiveInt = 8192
    """Tokens of one forward pass: longer prompts are prefilled in chunks."""
    eager: bool | None = None
    """No torch.compile and no CUDA graphs. Default: true on CPU, false on GPUs."""
    in_flight_updates: bool = False
    """New weights are applied at once, in the middle of rollouts (max_staleness >= 1)."""
    engine_args: dict[str, Any] = {}
    """Further arguments of vLLM's EngineArgs, as they are; docs/vllm.md lists the accepted ones."""


class RolloutConfig(Section):
    engine: Literal["transformers", "vllm"] = "transformers"
    vllm: VLLMConfig = VLLMConfig()
    workers: PositiveInt = 1
    resources: ActorResources = ActorResources()
    device: str = "auto"
    """`auto`: cuda where the actor has a GPU, else cpu."""
    max_rows: PositiveInt = 256
    """Samples decoded side by side in one worker."""
    max_restarts: Annotated[int, Field(ge=0)] = 10
    """Worker deaths over the whole run before it stops."""
    verifier: VerifierConfig = VerifierConfig()


class LearnerConfig(Section):
    ranks: PositiveInt = 1
    zero_stage: Literal[0, 1, 2, 3] = 2
    resources: ActorResources = ActorResources()
    device: str = "auto"
    tokens_per_microbatch: PositiveInt = 16384
    """Padded tokens (prompt and response) of one forward pass."""
    logprob_chunk_tokens: PositiveInt = 2048
    """Positions whose [.., V] float32 logits exist at once."""
    gradient_checkpointing: bool = False
    weight_bucket_bytes: PositiveInt = 64 * 2**20
    """Size of a bucket of published weights."""


PASS_AT_K = (1, 4, 8, 16, 32, 64)


class EvaluationConfig(Section):
    """pass@1 with noise off, and pass@k with the run's noise (METHOD §8)."""

    tasks: list[TaskConfig] = []
    every: Annotated[int, Field(ge=0)] = 0
    """Evaluate after every so many steps; 0: only before and after training."""
    runs: PositiveInt = 5
    """Repetitions of pass@1 averaged."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Samples a problem for pass@k, with the run's noise; 0: no pass@k. In training: before and after only."""
    pass_at_k: list[PositiveInt] | None = None
    """k of pass@k; default: those of 1, 4, 8, 16, 32, 64 that `samples` allows."""
    sampled_problems: PositiveInt | None = None
    """pass@k on the first so many problems of each task only."""
    at_start: bool = True
    at_end: bool = True

    @model_validator(mode="after")
    def _enough_samples(self):
        if self.pass_at_k and max(self.pass_at_k) > self.samples:
            raise ValueError(
                f"pass@{max(self.pass_at_k)} needs at least {max(self.pass_at_k)} samples a problem, "
                f"evaluation.samples is {self.samples}; raise it or leave that k out of evaluation.pass_at_k"
            )
        return self

    @property
    def ks(self) -> list[int]:
        """k of pass@k, ascending; empty without `samples`."""
        return sorted(set(self.pass_at_k or [k for k in PASS_AT_K if k <= self.samples])) if self.samples else []


class CheckpointConfig(Section):
    every: Annotated[int, Field(ge=0)] = 10
    """Steps between checkpoints; 0: only at the end and at an interrupt."""
    keep: PositiveInt = 2


class DumpConfig(Section):
    """Which trajectories, with what the learner made of them, are kept on disk, and how many."""

    every: Annotated[int, Field(ge=0)] = 1
    """Dump every so many steps; 0: none."""
    after_checkpoint: bool = True
    """Dump the first step and those after a checkpoint too, whatever `every`: the ones `replay` needs no other for."""
    which: Literal["all", "failures"] = "all"
    """`failures`: only samples that ended by themselves and were graded right are left out; not replayable."""
    keep_steps: PositiveInt | None = None
    """Only the newest so many dumped steps stay; None: all."""
    keep_bytes: PositiveInt | None = None
    """The oldest dumped steps are removed when all together are larger; None: no limit."""
    queue: PositiveInt = 2
    """Steps that may wait for the disk; training waits when more would."""
    evaluation: bool = False
    """Dump evaluation trajectories too."""


class MetricsConfig(Section):
    sinks: list[str] = ["console"]
    """`console`, `tensorboard`, `wandb`, `prometheus`, or an import path `package.module:Name`. JSONL always is."""

    @model_validator(mode="after")
    def _known(self):
        known = ("console", "tensorboard", "wandb", "prometheus")
        if unknown := [name for name in self.sinks if name not in known and ":" not in name]:
            raise ValueError(f"sinks: unknown {unknown}; allowed: {', '.join(known)}, or package.module:Name")
        return self


Limit = Annotated[float, Field(ge=0)] | None


class HealthConfig(Section):
    """Limits of the alarms (`deploy.run.health`), each for one metric's mean over `window` steps. null: no such alarm."""

    window: PositiveInt = 5
    """Steps averaged; in a run's first steps, those there are."""
    repeat: PositiveInt = 50
    """Steps after which an alarm that lasts is said again."""
    min_thinking_end_rate: Limit = 0.1
    """Share of latent rollouts that left latent mode."""
    max_truncated_share: Limit = 0.5
    """Share of rollouts cut off by the token budget."""
    max_log_prob_gap: Limit = 0.05
    """Mean |log pi_learner - log pi_rollout| of a response step at max_staleness 0 (METHOD §6)."""
    max_stale_log_prob_gap: Limit = 0.5
    """The same with max_staleness above 0, where the policy has moved since."""
    max_ratio_p99: Limit = 2.0
    """99th percentile of the policy ratio."""
    min_ratio_p01: Limit = 0.5
    """1st percentile of the policy ratio."""
    max_clipped_share: Limit = 0.3
    """Share of response steps that a clip bound holds back."""
    max_zero_variance_share: Limit = 0.9
    """Share of groups whose rewards are all equal."""
    max_no_answer_share: Limit = 0.9
    max_verifier_timeout_share: Limit = 0.05
    max_ungraded_share: Limit = 0.01
    """Of all rollouts; `rollout.verifier.max_ungraded_share` stops the run."""
    max_staleness_mean: Limit = 8.0
    """Policy versions."""
    max_rollout_wait_share: Limit = 0.9
    """Share of a step in which the learner waits for rollouts."""
    max_learner_share: Limit = 0.9
    max_publish_share: Limit = 0.25
    max_dump_wait_share: Limit = 0.01
    """Share of a step in which training waits for the disk."""
    min_effective_width: Limit = 1.02
    """Mean exp(entropy) of latent mixtures: 1 is a single token, K all alike."""
    max_relative_width: Limit = None
    """(effective width - 1) / (K - 1): 1 is uniform. Off: a start with K equal to its compression is uniform."""
    max_skipped_updates: Limit = 0.0
    """Non-finite updates a step."""
    min_reward_retained: Limit = 0.5
    """Mean reward relative to its best mean so far."""


class DeadlineConfig(Section):
    """Every wait has one; seconds. A component that misses its deadline is restarted or the run stops and says so."""

    start_s: Annotated[float, Field(gt=0)] = 300.0
    """Until an actor is scheduled, has its model loaded and answers."""
    rollout_s: Annotated[float, Field(gt=0)] = 600.0
    """Without any progress of a worker that has work."""
    learner_s: Annotated[float, Field(gt=0)] = 1800.0
    """For one step of the learner."""
    weights_s: Annotated[float, Field(gt=0)] = 300.0
    """For fetching and verifying one publication on a worker."""
    dump_s: Annotated[float, Field(gt=0)] = 600.0
    """Until the disk has taken the dumps that wait for it."""


class InductionConfig(Section):
    """Stage 1 of Latent-SFT with induced labels (METHOD §7b): an encoder learns to compress the chain of thought."""

    encoder_steps: PositiveInt = 200
    """First the encoder alone, against the initial model as decoder."""
    decoder_steps: PositiveInt = 200
    """Then the decoder alone."""
    union_steps: PositiveInt = 200
    """Then both."""
    batch_size: PositiveInt = 192
    anchor: Annotated[float, Field(ge=0)] = 1.0
    """Weight of KL(uniform label || encoder's) while the encoder learns alone; 0: without, as in the paper."""
    optimizer: InductionOptimizerConfig = InductionOptimizerConfig()


class LatentSFTConfig(Section):
    """The initialisation latent RL needs (METHOD §7)."""

    chain: Literal["latent", "explicit"] = "latent"
    """`explicit`: the same data with hard CoT tokens, the baseline's start."""
    source: Literal["uniform", "induced"] = "uniform"
    """Of the soft labels: uniform over a step's tokens (METHOD §7a), or an encoder's (§7b, see `induction`)."""
    induction: InductionConfig = InductionConfig()
    """Used with source `induced`."""
    compression: PositiveInt = 2
    """c: CoT tokens per latent step."""
    max_steps: PositiveInt = 400
    batch_size: PositiveInt = 192
    optimizer: SFTOptimizerConfig = SFTOptimizerConfig()
    perturb_share: Share = 0.5
    """Share of rows whose input mixtures are perturbed with Gumbel noise."""
    perturb_scale: Annotated[float, Field(ge=0)] = 1.0
    self_feeding: Share = 0.5
    """Probability that a step's input is the model's own mixture at that step."""
    self_feeding_ramp: Annotated[int, Field(ge=0)] = 0
    """Steps over which that probability rises from 0; 0: it is constant."""
    evaluate_every: PositiveInt = 10
    evaluation_problems: PositiveInt = 512
    stop_at: Share | None = None
    """Held-out pass@1 at which it stops; None: after max_steps."""
