"""Sections about how the policy changes: noise, clipping, optimizers, and Latent-SFT."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from latent_grpo.common.config.rules import Rule
from latent_grpo.common.config.section import Section, Share
from latent_grpo.common.types import NoiseMode


class NoiseConfig(Section):
    """Gumbel noise makes the latent steps of rollouts differ (METHOD §2.1)."""

    mode: Annotated[NoiseMode | None, Rule.OBJECTIVE] = None
    """Noise in training is at least 0 (`one_sided`), not shifted (`two_sided`), or absent (`off`)."""
    scale: Annotated[float, Field(ge=0)] = 1.0
    """The noise is multiplied by this before it is added to log-probs (METHOD §2.1.3)."""


class ClipConfig(Section):
    """The policy ratio is clipped as in PPO (METHOD §5)."""

    low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The lower bound of the policy ratio is 1 - low."""
    high: Annotated[float, Field(gt=0)] = 0.2
    """The upper bound of the policy ratio is 1 + high."""
    dual: Annotated[float, Field(gt=1)] = 3.0
    """The dual clip bounds the loss of a negative advantage at this ratio, which must be at least 1 + high."""


class OptimizerConfig(Section):
    """AdamW updates float32 master weights; the schedule counts steps of the run, not updates (METHOD symbols)."""

    lr: Annotated[float, Field(gt=0)] = 1e-6
    """The learning rate after warm-up is this."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's running means of gradients and of their squares decay at these rates, each in [0, 1)."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW adds this to the denominator of an update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW shrinks weights by this times the learning rate at every update, apart from the gradient."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """A gradient with a larger global norm than this is scaled down to it."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """The learning rate rises linearly over this many steps; 0: it starts at its full value."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after warm-up is constant, or decays to zero at `decay_steps`, linearly or along a cosine."""
    decay_steps: PositiveInt | None = None
    """The decay ends at this step; null: at the run's last step, `steps`."""
    max_bad_updates: PositiveInt = 3
    """This many non-finite updates in a row stop the run; each single one is skipped, dumped and counted."""


class SFTOptimizerConfig(OptimizerConfig):
    """AdamW of Latent-SFT has its own defaults, so that setting one key leaves the others; its schedule counts steps of
    Latent-SFT."""

    lr: Annotated[float, Field(gt=0)] = 3e-3
    """The learning rate after warm-up is this. The default is for models of a million parameters; a pretrained model
    needs a far smaller one."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's running means of gradients and of their squares decay at these rates, each in [0, 1)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """The learning rate rises linearly over this many steps; 0: it starts at its full value."""
    decay_steps: PositiveInt | None = None
    """The decay ends at this step; null: at the last step of this training."""


class InductionOptimizerConfig(SFTOptimizerConfig):
    """AdamW has these defaults in each of the three parts of stage 1; its schedule counts the steps of the part."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """The learning rate after warm-up is this. The default is for models of a million parameters."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """The learning rate rises linearly over this many steps; 0: it starts at its full value."""


class InductionConfig(Section):
    """Stage 1 of Latent-SFT with induced labels: an encoder learns to compress the chain of thought (METHOD §7b). It is
    used with `source` `induced`."""

    encoder_steps: PositiveInt = 200
    """The encoder learns alone for this many steps first, against the initial model as decoder."""
    decoder_steps: PositiveInt = 200
    """The decoder then learns alone for this many steps."""
    union_steps: PositiveInt = 200
    """Both learn together for this many steps at the end."""
    batch_size: PositiveInt = 192
    """A step trains on this many rows, over all ranks."""
    anchor: Annotated[float, Field(ge=0)] = 1.0
    """KL(uniform label || encoder's label) has this weight in the loss while the encoder learns alone; 0: it has none,
    as in the paper."""
    optimizer: InductionOptimizerConfig = InductionOptimizerConfig()


class LatentSFTConfig(Section):
    """Latent-SFT is the initialisation that latent RL needs (METHOD §7)."""

    chain: Literal["latent", "explicit"] = "latent"
    """The chain of thought is learned as latent steps (`latent`), or as text (`explicit`), which is the start of
    `grpo`."""
    source: Literal["uniform", "induced"] = "uniform"
    """Soft labels are uniform over a step's tokens (`uniform`, METHOD §7a), or an encoder's (`induced`, METHOD §7b, see
    `induction`)."""
    induction: InductionConfig = InductionConfig()
    compression: PositiveInt = 2
    """A latent step stands for this many tokens of the chain of thought: c of METHOD §7. `k` must be at least c."""
    max_steps: PositiveInt = 400
    """The training ends after this many steps at the latest."""
    batch_size: PositiveInt = 192
    """A step trains on this many rows, over all ranks."""
    optimizer: SFTOptimizerConfig = SFTOptimizerConfig()
    perturb_share: Share = 0.5
    """This share of rows has its input mixtures perturbed with Gumbel noise (METHOD §7c)."""
    perturb_scale: Annotated[float, Field(ge=0)] = 1.0
    """The noise of perturbed rows, and of noisy self-feeding, is multiplied by this."""
    self_feeding: Share = 0.5
    """A latent step's input is the model's own mixture at that step with this probability (METHOD §7c)."""
    self_feeding_ramp: Annotated[int, Field(ge=0)] = 0
    """The probability of self-feeding rises from 0 over this many steps; 0: it is constant."""
    evaluate_every: PositiveInt = 10
    """The held-out pass@1 is measured after every so many steps, with the noise off."""
    evaluation_problems: PositiveInt = 512
    """This many problems of all tasks together are held out to measure pass@1; of a stored task at most a tenth of its
    rows."""
    stop_at: Share | None = None
    """The training ends early when the held-out pass@1 reaches this; null: it ends after `max_steps`."""
