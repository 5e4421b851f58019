"""Sections about how the policy changes: noise, clipping, optimizers, and Latent-SFT."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from latent_grpo.common.config.rules import Rule
from latent_grpo.common.config.section import Section, Share
from latent_grpo.common.types import NoiseMode


class NoiseConfig(Section):
    """Gumbel noise, which makes the latent steps of rollouts differ (METHOD §2.1)."""

    mode: Annotated[NoiseMode | None, Rule.OBJECTIVE] = None
    """Noise in training: shifted to be at least 0 (`one_sided`), not shifted (`two_sided`), or none (`off`)."""
    scale: Annotated[float, Field(ge=0)] = 1.0
    """Factor applied to the noise before it is added to log-probs (METHOD §2.1.3)."""


class ClipConfig(Section):
    """PPO clipping of the policy ratio (METHOD §5)."""

    low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower clip range: the policy ratio is clipped at 1 - low."""
    high: Annotated[float, Field(gt=0)] = 0.2
    """Upper clip range: the policy ratio is clipped at 1 + high."""
    dual: Annotated[float, Field(gt=1)] = 3.0
    """Dual clip: ratio at which the loss of a negative advantage is bounded; at least 1 + high."""


class OptimizerConfig(Section):
    """AdamW with float32 master weights. The schedule counts steps of the run, not updates (METHOD symbols)."""

    lr: Annotated[float, Field(gt=0)] = 1e-6
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's running means of the gradient and of its square, each in [0, 1)."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Constant added to the denominator of AdamW's update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay: every update shrinks weights by `weight_decay` times the learning rate, apart from the
    gradient."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Upper bound on the global gradient norm; a gradient with a larger norm is scaled down to it."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Number of steps over which the learning rate rises linearly; 0: no warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or decaying to zero at `decay_steps`, linearly or along a cosine."""
    decay_steps: PositiveInt | None = None
    """Step at which the decay ends; null: the run's last step, `steps`."""
    max_bad_updates: PositiveInt = 3
    """Number of non-finite updates in a row that stops the run. Each non-finite update is skipped, dumped and
    counted."""

    def fit_lora(self) -> None:
        """Sets the learning rate to :data:`LORA_RATE` where it was left open."""
        if "lr" not in self.model_fields_set:
            object.__setattr__(self, "lr", LORA_RATE)


class SFTOptimizerConfig(OptimizerConfig):
    """AdamW for Latent-SFT, with its own defaults: setting one key leaves the others as they are. The schedule counts
    steps of Latent-SFT."""

    lr: Annotated[float, Field(gt=0)] = 3e-3
    """Learning rate after warm-up. The default is for models of a million parameters, which `model.new` makes; with
    `model.path` it is 2e-5, and 1e-4 with `lora`."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of AdamW's running means of the gradient and of its square, each in [0, 1)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Number of steps over which the learning rate rises linearly; 0: no warm-up."""
    decay_steps: PositiveInt | None = None
    """Step at which the decay ends; null: the last step that the schedule counts."""


class InductionOptimizerConfig(SFTOptimizerConfig):
    """AdamW for stage 1, with the same values in each of its three parts. The schedule counts the steps of the part."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate after warm-up. The default is for models of a million parameters, which `model.new` makes; with
    `model.path` it is 2e-5."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Number of steps over which the learning rate rises linearly; 0: no warm-up."""


class InductionConfig(Section):
    """Stage 1 of Latent-SFT with induced labels: an encoder learns to compress the chain of thought (METHOD §7b). Used
    with `source` `induced`."""

    encoder_steps: PositiveInt = 200
    """First part: number of steps in which only the encoder is trained, against the initial model as decoder."""
    decoder_steps: PositiveInt = 200
    """Second part: number of steps in which only the decoder is trained."""
    union_steps: PositiveInt = 200
    """Third part: number of steps in which encoder and decoder are trained together."""
    batch_size: PositiveInt = 192
    """Number of rows per step, over all ranks. The default is 64 with `model.path`."""
    anchor: Annotated[float, Field(ge=0)] = 1.0
    """Weight of KL(uniform label || encoder's label) in the loss while only the encoder is trained; 0: no such term, as
    in the paper."""
    optimizer: InductionOptimizerConfig = InductionOptimizerConfig()


class LoRAConfig(Section):
    """LoRA: low-rank additions to the linear layers of the transformer are trained, and nothing else. Whoever takes the
    model gets them added to its weights, so engines and later stages see a plain model."""

    rank: PositiveInt = 64
    """Rank of the additions. The reference trains with 64 (METHOD §7)."""
    alpha: Annotated[float, Field(gt=0)] = 128.0
    """Factor of the additions, which are scaled by alpha / rank."""
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of the linear layers that get additions, such as `q_proj`; null: all of them, but for the output layer."""


class LatentSFTConfig(Section):
    """Latent-SFT, the supervised initialisation that latent RL needs (METHOD §7)."""

    chain: Literal["latent", "explicit"] = "latent"
    """Form in which the chain of thought is learned: latent steps (`latent`), or text (`explicit`), which is the start
    of `grpo`."""
    source: Literal["uniform", "induced"] = "uniform"
    """Source of the soft labels: uniform over a step's tokens (`uniform`, METHOD §7a), or an encoder (`induced`, METHOD
    §7b, see `induction`)."""
    induction: InductionConfig = InductionConfig()
    compression: PositiveInt = 2
    """Number of chain-of-thought tokens per latent step: c of METHOD §7. `k` must be at least c."""
    max_steps: PositiveInt = 400
    """Maximum number of steps; `stop_at` may end the training earlier."""
    batch_size: PositiveInt = 192
    """Number of rows per step, over all ranks. The default is 64 with `model.path`. The ranks take them in
    micro-batches of at most `learner.tokens_per_microbatch` tokens, which change memory and not the loss (METHOD
    §7)."""
    lora: LoRAConfig | None = None
    """Train low-rank additions to the weights instead of the weights; null: the weights. With `model.train_layers` only
    the uppermost layers get them."""
    optimizer: SFTOptimizerConfig = SFTOptimizerConfig()
    perturb_share: Share = 0.5
    """Share of rows whose input mixtures are perturbed with Gumbel noise (METHOD §7c)."""
    perturb_scale: Annotated[float, Field(ge=0)] = 1.0
    """Factor applied to the noise of perturbed rows and of noisy self-feeding."""
    self_feeding: Share = 0.5
    """Probability that the input of a latent step is the model's own mixture at that step (METHOD §7c)."""
    self_feeding_ramp: Annotated[int, Field(ge=0)] = 0
    """Number of steps over which the probability of self-feeding rises from 0; 0: it is constant."""
    evaluate_every: PositiveInt = 10
    """Interval at which the held-out pass@1 is measured, with the noise off, in steps."""
    evaluation_problems: PositiveInt = 512
    """Number of problems held out to measure pass@1, all tasks together; of a stored task at most a tenth of its
    rows."""
    stop_at: Share | None = None
    """Held-out pass@1 at which the training ends early; null: it ends after `max_steps`."""

    def fit_given_model(self) -> dict[str, float]:
        """Sets the keys that were left open to :data:`GIVEN_MODEL_DEFAULTS`, and returns them, by their dotted names.

        The class's own defaults suit a model of a million parameters with random weights. They would destroy a
        pretrained one.
        """
        filled = {}
        defaults = GIVEN_MODEL_DEFAULTS | ({} if self.lora is None else LORA_DEFAULTS)
        for key, value in defaults.items():
            *sections, leaf = key.split(".")
            if sections[:1] == ["induction"] and self.source != "induced":
                continue
            owner: Section = self
            for name in sections:
                owner = getattr(owner, name)
            if leaf not in owner.model_fields_set:
                object.__setattr__(owner, leaf, value)
                filled[key] = value
        return filled


GIVEN_MODEL_DEFAULTS: dict[str, float] = {
    "optimizer.lr": 2e-5,
    "batch_size": 64,
    "induction.optimizer.lr": 2e-5,
    "induction.batch_size": 64,
}
"""Keys of `warm_start` whose defaults are others for a model that is given (`model.path`) than for a new one."""
LORA_DEFAULTS = {"optimizer.lr": 1e-4}
"""Those that are others again with `warm_start.lora`: factors that begin at 0 need larger steps than weights do."""
LORA_RATE = 1e-5
"""The learning rate of RL with `lora`, where the settings leave it open: ten times that of whole weights."""
