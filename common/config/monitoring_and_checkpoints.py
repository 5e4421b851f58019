"""The sections about what a run measures and keeps: evaluation, checkpoints, dumps, metrics and alarms."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from latent_grpo.common.config.problems_and_model import TaskConfig
from latent_grpo.common.config.rules import Rule
from latent_grpo.common.config.section import Section

PASS_AT_K = (1, 4, 8, 16, 32, 64)
EvaluationProtocol = Literal["ours", "reference"]
"""By what rules a figure was computed: this project's, or those of the paper's authors (METHOD §8)."""


class EvaluationConfig(Section):
    """Evaluation: pass@1 with the noise off, and pass@k with the run's noise (METHOD §8)."""

    tasks: Annotated[list[TaskConfig], Rule.TOKENS] = Field(default_factory=list)
    """Tasks that the model is evaluated on; without any there is no evaluation."""
    every: Annotated[int, Field(ge=0)] = 0
    """Evaluation interval, in steps; 0: only before and after training."""
    blocking: Annotated[bool, Rule.MAY_CHANGE] = True
    """Whether the learner waits for the evaluations of `every`. false: one rollout worker keeps the weights of the step
    and evaluates them while the learner goes on with the others, where at least two serve; a checkpoint of the step is
    written first, from which an evaluation that was broken off is made up."""
    protocol: EvaluationProtocol | Literal["both"] = "ours"
    """Rules by which figures are computed: this project's (`ours`), or those of the paper's authors (`reference`),
    which fix prompts, sampling, repetitions, grading and lengths of the eight benchmarks (METHOD §8, docs/evaluate.md).
    `both`: by either, from the same samples where both sample alike. Published numbers are comparable with `reference`
    alone."""
    runs: PositiveInt = 5
    """Number of repetitions over which pass@1 is averaged. The protocol `reference` has its own."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Number of samples per problem from which pass@k is estimated, with the run's noise; 0: no pass@k. A training run
    measures pass@k before and after training only."""
    interim_problems: PositiveInt | None = None
    """Number of problems per task on which the evaluations of `every` measure, the first ones; null: all. Before and
    after training all problems are measured; the curve of a run, its best checkpoint and `stop_on` are of the first
    ones throughout, by the first protocol where there are two."""
    interim_runs: PositiveInt | None = None
    """Largest number of repetitions of those evaluations; null: that of the protocol, `runs` for this project's."""
    pass_at_k: list[PositiveInt] | None = None
    """Values of k for which pass@k is given; null: those of 1, 4, 8, 16, 32 and 64 that `samples` allows."""
    sampled_problems: PositiveInt | None = None
    """Number of problems per task on which pass@k is measured, the first ones; null: all."""
    at_start: bool = True
    """Whether the initial model is evaluated before training."""
    at_end: bool = True
    """Whether the trained model is evaluated at the end."""

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if self.pass_at_k and max(self.pass_at_k) > self.samples:
            raise ValueError(
                f"pass@{max(self.pass_at_k)} needs at least {max(self.pass_at_k)} samples per problem, "
                f"evaluation.samples is {self.samples}; raise it or leave that k out of evaluation.pass_at_k"
            )
        return self

    @property
    def protocols(self) -> tuple[EvaluationProtocol, ...]:
        """The protocols that figures are computed by."""
        return ("ours", "reference") if self.protocol == "both" else (self.protocol,)

    @property
    def interim(self) -> bool:
        """Whether evaluations between the start and the end measure less than these two do."""
        return self.interim_problems is not None or self.interim_runs is not None

    @property
    def ks(self) -> list[int]:
        """k of pass@k, ascending; empty without `samples`."""
        return sorted(set(self.pass_at_k or [k for k in PASS_AT_K if k <= self.samples])) if self.samples else []


class CheckpointConfig(Section):
    """Checkpoints: the complete state of a run between two steps, from which `--resume` continues."""

    every: Annotated[int, Field(ge=0)] = 10
    """Checkpoint interval, in steps; 0: only at the end and at an interrupt."""
    background: bool = True
    """Whether the learner goes on while a checkpoint is written. The ranks first copy the state into the memory of
    their nodes: 12 bytes for each trained parameter, over all ranks. A checkpoint that cannot be written ends the run
    at the next step."""
    keep: PositiveInt = 2
    """Number of checkpoints to keep, the newest ones."""
    keep_best: str | None = "evaluation/pass_at_1"
    """Metric of evaluations by whose highest value a checkpoint is kept besides those, and written if none is due:
    `evaluation/pass_at_1` (the mean over the evaluation tasks), `evaluation/TASK/pass_at_1`, or `mean_reward` in that
    place. Of equal values the earlier one stays. null: none is kept."""


class DumpConfig(Section):
    """Dumps of trajectories, with what the learner made of them (docs/dumps.md)."""

    every: Annotated[int, Field(ge=0)] = 1
    """Dump interval, in steps; 0: no dumps."""
    after_checkpoint: bool = True
    """Whether the first step and those after a checkpoint are dumped too, whatever `every` is, unless it is 0. `replay`
    needs no other dumps for them."""
    which: Literal["all", "failures"] = "all"
    """Samples to dump: all of them (`all`), or all but those that ended by themselves and were graded `correct`
    (`failures`). Dumps of `failures` cannot be replayed."""
    keep_steps: PositiveInt | None = None
    """Number of dumped steps to keep, the newest ones; null: all."""
    keep_bytes: PositiveInt | None = None
    """Upper bound on the size of all dumped steps together, in bytes; beyond it the oldest are removed. null: no
    bound."""
    queue: PositiveInt = 2
    """Number of steps that may wait for the disk; training waits when there would be more."""
    evaluation: bool = False
    """Whether trajectories of evaluations are dumped too."""


class MetricsConfig(Section):
    """Where metrics go besides `metrics.jsonl` in the run folder, which always has them (docs/health.md)."""

    sinks: list[str] = Field(default_factory=lambda: ["console"])
    """Metric sinks: `console`, `tensorboard`, `wandb`, `mlflow`, `trackio`, `prometheus`, or an import path
    `package.module:Name`."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = ("console", "tensorboard", "wandb", "mlflow", "trackio", "prometheus")
        if unknown := [name for name in self.sinks if name not in known and ":" not in name]:
            raise ValueError(f"sinks: unknown {unknown}; allowed: {', '.join(known)}, or package.module:Name")
        return self


Limit = Annotated[float, Field(ge=0)] | None


class HealthConfig(Section):
    """Alarms. Each limit bounds the mean of one metric over the last `window` steps; beyond it an alarm is raised
    (docs/health.md). A limit of null turns its alarm off."""

    window: PositiveInt = 5
    """Number of steps that metrics are averaged over; in a run's first steps, as many as there are."""
    repeat: PositiveInt = 50
    """Number of steps after which an alarm that lasts is reported again."""
    min_thinking_end_rate: Limit = 0.1
    """Lower bound on the share of latent rollouts that leave latent mode."""
    min_latent_share_retained: Limit = 0.7
    """Lower bound on the share of latent steps among all response steps, relative to that of the run's first steps."""
    max_truncated_share: Limit = 0.5
    """Upper bound on the share of rollouts that the token budget cuts off."""
    max_log_prob_gap: Limit | Literal["auto"] = "auto"
    """Upper bound on the mean |log p_learner - log p_rollout| of single components, latent or hard, if `max_staleness`
    is 0 (METHOD §6). The self-test at the start holds the same bound, and scales its bounds of single
    components with it. `auto`: the bound of `model.dtype` (docs/numerics.md)."""
    max_stale_log_prob_gap: Limit = 0.5
    """Upper bound on the mean |log pi_learner - log pi_rollout| of a response step if `max_staleness` is above 0, where
    the policy has moved between the two."""
    max_ratio_p99: Limit = 2.0
    """Upper bound on the 99th percentile of the policy ratio."""
    min_ratio_p01: Limit = 0.5
    """Lower bound on the 1st percentile of the policy ratio."""
    max_clipped_share: Limit = 0.3
    """Upper bound on the share of response steps whose gradient a clip bound stops."""
    max_zero_variance_share: Limit = 0.9
    """Upper bound on the share of groups whose rewards are all equal."""
    max_no_answer_share: Limit = 0.9
    """Upper bound on the share of rollouts in which the verifier finds no answer."""
    max_verifier_timeout_share: Limit = 0.05
    """Upper bound on the share of rollouts that are not graded in time."""
    max_ungraded_share: Limit = 0.01
    """Upper bound on the share of ungraded rollouts. The limit that stops the run is
    `rollout.verifier.max_ungraded_share`."""
    max_staleness_mean: Limit = 8.0
    """Upper bound on the mean staleness of samples, in policy versions."""
    max_rollout_wait_share: Limit = 0.9
    """Upper bound on the share of a step's time in which the learner waits for rollouts."""
    max_learner_share: Limit = 0.9
    """Upper bound on the share of a step's time in which the learner trains."""
    max_publish_share: Limit = 0.25
    """Upper bound on the share of a step's time that the publication of weights takes."""
    max_dump_wait_share: Limit = 0.01
    """Upper bound on the share of a step's time in which training waits for the disk."""
    min_effective_width: Limit = 1.02
    """Lower bound on the mean effective width of latent mixtures, exp(entropy): 1 is a single token, K is uniform."""
    max_relative_width: Limit = None
    """Upper bound on (effective width - 1) / (K - 1), where 1 is uniform. Off by default, since a start with K equal to
    its compression is uniform."""
    max_skipped_updates: Limit = 0.0
    """Upper bound on the number of updates in a step that are skipped because they are not finite."""
    min_reward_retained: Limit = 0.5
    """Lower bound on the mean reward relative to its best mean so far."""
