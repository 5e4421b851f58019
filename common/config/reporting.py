"""The sections about what a run measures, keeps and reports: evaluation, checkpoints, dumps, metrics, alarms."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from latent_grpo.common.config.problems_and_model import TaskConfig
from latent_grpo.common.config.rules import Rule
from latent_grpo.common.config.section import Section

PASS_AT_K = (1, 4, 8, 16, 32, 64)


class EvaluationConfig(Section):
    """Evaluation measures pass@1 with the noise off, and pass@k with the run's noise (METHOD §8)."""

    tasks: Annotated[list[TaskConfig], Rule.TOKENS] = Field(default_factory=list)
    """The model is evaluated on these tasks; without any there is no evaluation."""
    every: Annotated[int, Field(ge=0)] = 0
    """The model is evaluated after every so many steps; 0: only before and after training."""
    runs: PositiveInt = 5
    """pass@1 is the mean of this many repetitions."""
    samples: Annotated[int, Field(ge=0)] = 0
    """pass@k is estimated from this many samples a problem, with the run's noise; 0: there is no pass@k. During a
    training run it is measured before and after only."""
    pass_at_k: list[PositiveInt] | None = None
    """pass@k is given for these k; null: for those of 1, 4, 8, 16, 32 and 64 that `samples` allows."""
    sampled_problems: PositiveInt | None = None
    """pass@k is measured on this many problems of each task, the first ones; null: on all."""
    at_start: bool = True
    """The initial model is evaluated before training."""
    at_end: bool = True
    """The trained model is evaluated at the end."""

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
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
    """A checkpoint is the complete state of a run between two steps, from which `--resume` continues."""

    every: Annotated[int, Field(ge=0)] = 10
    """A checkpoint is written after every so many steps; 0: only at the end and at an interrupt."""
    keep: PositiveInt = 2
    """This many checkpoints are kept, the newest ones."""


class DumpConfig(Section):
    """Dumps keep trajectories on disk, with what the learner made of them (docs/dumps.md)."""

    every: Annotated[int, Field(ge=0)] = 1
    """One step of every so many is dumped; 0: none."""
    after_checkpoint: bool = True
    """The first step and those after a checkpoint are dumped too, whatever `every` says, since `replay` needs no other
    dumps for them."""
    which: Literal["all", "failures"] = "all"
    """Dumps hold all samples (`all`), or leave out those that ended by themselves and were graded right (`failures`),
    and cannot be replayed then."""
    keep_steps: PositiveInt | None = None
    """This many dumped steps are kept, the newest ones; null: all."""
    keep_bytes: PositiveInt | None = None
    """The oldest dumped steps are removed when all of them together exceed this many bytes; null: there is no limit."""
    queue: PositiveInt = 2
    """This many steps may wait for the disk; training waits when there would be more."""
    evaluation: bool = False
    """Trajectories of evaluations are dumped too if true."""


class MetricsConfig(Section):
    """Metrics always go to `metrics.jsonl` in the run's folder, and also to these sinks (docs/health.md)."""

    sinks: list[str] = Field(default_factory=lambda: ["console"])
    """A sink is `console`, `tensorboard`, `wandb`, `prometheus`, or an import path `package.module:Name`."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = ("console", "tensorboard", "wandb", "prometheus")
        if unknown := [name for name in self.sinks if name not in known and ":" not in name]:
            raise ValueError(f"sinks: unknown {unknown}; allowed: {', '.join(known)}, or package.module:Name")
        return self


Limit = Annotated[float, Field(ge=0)] | None


class HealthConfig(Section):
    """Each limit says what is healthy for the mean of one metric over the last `window` steps; beyond it an alarm is
    raised (docs/health.md). A limit of null turns its alarm off."""

    window: PositiveInt = 5
    """Metrics are averaged over this many steps; in a run's first steps, over those there are."""
    repeat: PositiveInt = 50
    """An alarm that lasts is reported again after this many steps."""
    min_thinking_end_rate: Limit = 0.1
    """The share of latent rollouts that leave latent mode is at least this."""
    max_truncated_share: Limit = 0.5
    """The share of rollouts that the token budget cuts off is at most this."""
    max_log_prob_gap: Limit = 0.05
    """The mean |log pi_learner - log pi_rollout| of a response step is at most this where `max_staleness` is 0
    (METHOD §6)."""
    max_stale_log_prob_gap: Limit = 0.5
    """The mean |log pi_learner - log pi_rollout| of a response step is at most this where `max_staleness` is above 0:
    the policy has moved between the two."""
    max_ratio_p99: Limit = 2.0
    """The 99th percentile of the policy ratio is at most this."""
    min_ratio_p01: Limit = 0.5
    """The 1st percentile of the policy ratio is at least this."""
    max_clipped_share: Limit = 0.3
    """The share of response steps whose gradient a clip bound stops is at most this."""
    max_zero_variance_share: Limit = 0.9
    """The share of groups whose rewards are all equal is at most this."""
    max_no_answer_share: Limit = 0.9
    """The share of rollouts in which the verifier finds no answer is at most this."""
    max_verifier_timeout_share: Limit = 0.05
    """The share of rollouts that are not graded in time is at most this."""
    max_ungraded_share: Limit = 0.01
    """The share of ungraded rollouts is at most this; `rollout.verifier.max_ungraded_share` stops the run."""
    max_staleness_mean: Limit = 8.0
    """Samples are at most this many policy versions old on average."""
    max_rollout_wait_share: Limit = 0.9
    """The learner waits for rollouts during at most this share of a step's time."""
    max_learner_share: Limit = 0.9
    """The learner trains during at most this share of a step's time."""
    max_publish_share: Limit = 0.25
    """The publication of weights takes at most this share of a step's time."""
    max_dump_wait_share: Limit = 0.01
    """Training waits for the disk during at most this share of a step's time."""
    min_effective_width: Limit = 1.02
    """The mean exp(entropy) of latent mixtures is at least this: 1 is a single token, K all alike."""
    max_relative_width: Limit = None
    """(effective width - 1) / (K - 1) is at most this: 1 is uniform. The alarm is off by default, since a start with K
    equal to its compression is uniform."""
    max_skipped_updates: Limit = 0.0
    """A step has at most this many updates that are skipped because they are not finite."""
    min_reward_retained: Limit = 0.5
    """The mean reward relative to its best mean so far is at least this."""
