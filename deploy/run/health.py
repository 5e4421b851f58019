"""The alarms of a run. Each says in plain words what is wrong, its likely cause and what to do.

Every alarm compares one metric, averaged over the last `health.window` steps, with one limit of the section `health`.
It is reported when it is raised, every `health.repeat` steps while it lasts, and when it is over; each of these is
a line of `alarms.jsonl`, which `inspect` and `report` show (:func:`read_alarms`).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from latent_grpo.common.agreement import TOLERANCES
from latent_grpo.common.config import RunConfig
from latent_grpo.common.errors import MetricsError
from latent_grpo.common.metrics import FILE as METRICS_FILE
from latent_grpo.common.metrics import FITS, LineFile, is_number, parsed_line, read_metrics, whole_lines

FILE = "alarms.jsonl"
State = Literal["raised", "lasting", "over"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One line of `alarms.jsonl`."""

    step: int
    lineage: int
    time: float  # seconds since 1970
    name: str  # the key of its limit in the section `health`
    state: State
    value: float  # the metric's mean over the window
    limit: float
    message: str
    cause: str
    remedy: str

    @property
    def sentence(self) -> str:
        """The alarm in one sentence, for people."""
        if self.state == "over":
            return f"over since step {self.step}: {self.message}"
        return f"{self.message}: {self.cause}; {self.remedy}"


@dataclass(frozen=True, slots=True)
class Rule:
    """The rule of one alarm.

    `name` is the limit's key in the section `health`. `metric` is a metric's name, or a function of the step's metrics
    that returns None where they lack it. `message` may hold `{value}`, `{share}` (in per cent), `{rest}` (100 % less
    the share) and `{limit}`.
    """

    name: str
    metric: str | Callable[[Mapping[str, float]], float | None]
    low: bool  # whether the alarm is for values below the limit
    message: str
    cause: str
    remedy: str
    when: Callable[[RunConfig], bool] = lambda config: True

    def value(self, metrics: Mapping[str, float]) -> float | None:
        """Returns the rule's figure in a step's metrics; None: they have none."""
        found = self.metric(metrics) if callable(self.metric) else metrics.get(self.metric)
        return None if found is None or math.isnan(found) else float(found)


def _share(part: str, whole: str) -> Callable[[Mapping[str, float]], float | None]:
    return lambda m: m[part] / m[whole] if part in m and m.get(whole) else None


def _clipped(metrics: Mapping[str, float]) -> float | None:
    names = [f"learner/clip_fraction_{side}" for side in ("low", "high", "dual")]
    return sum(metrics[name] for name in names) if all(name in metrics for name in names) else None


def log_prob_gap(metrics: Mapping[str, float | None]) -> float | None:
    """Returns the larger mean gap of latent and hard components, the quantity that the self-test judges."""
    gaps = (metrics.get(name) for name in ("learner/latent_gap_mean", "learner/hard_gap_mean"))
    return max((gap for gap in gaps if gap is not None), default=None)


RULES = (
    Rule(
        "min_thinking_end_rate", "latent/thinking_end_rate", True,
        "{rest} of rollouts never left latent mode",
        "the latent-end token is never reached: the model has no latent initialisation, or the budget is too small",
        "check with `latent-grpo validate` that model.prompt.think_end is the token the model was trained with, give "
        "the model a Latent-SFT start (warm_start), or raise tasks.*.max_response_tokens",
    ),
    Rule(
        "min_latent_share_retained", "health/latent_share_retained", True,
        "the share of latent steps has fallen to {share} of what it was in the run's first steps",
        "reasoning moves out of latent mode into the visible part: chains leave it earlier, or write more after it",
        "compare chains with `latent-grpo inspect RUN --sort exit` and the report's chart of the latent share; start "
        "again with learn_exit=false, with which rewards do not teach where to leave (docs/study.md), or lower "
        "optimizer.lr or noise.scale",
    ),
    Rule(
        "max_truncated_share", "rollout/truncated_share", False,
        "{share} of rollouts were cut off by the token budget",
        "responses are longer than the budget, or the model does not produce EOS",
        "raise tasks.*.max_response_tokens, or look at the longest: `latent-grpo inspect RUN --failed --sort length`",
    ),
    Rule(
        "max_log_prob_gap", log_prob_gap, False,
        "the learner's log-probs of single components differ from the rollout's by {value} on average (limit {limit})",
        "engine and learner do not compute the same policy: other weights, dtype or kernels",
        "stop and run the self-test (self_test_groups above 0); compare model.dtype and the engines' versions with "
        "`latent-grpo doctor`",
        lambda config: config.max_staleness == 0,
    ),
    Rule(
        "max_stale_log_prob_gap", "learner/drift_mean", False,
        "the policy that samples and the one that learns differ by {value} in log-prob on average (limit {limit})",
        "rollouts are too old for how fast the policy moves",
        "lower max_staleness or optimizer.lr",
        lambda config: config.max_staleness > 0,
    ),
    Rule(
        "max_ratio_p99", "learner/ratio_p99", False,
        "one in a hundred policy ratios is above {value} (limit {limit})",
        "the policy moves too far between the updates of one step",
        "lower optimizer.lr, or raise minibatch_prompts so that a step makes fewer updates",
    ),
    Rule(
        "min_ratio_p01", "learner/ratio_p01", True,
        "one in a hundred policy ratios is below {value} (limit {limit})",
        "the policy moves too far between the updates of one step, away from what was sampled",
        "lower optimizer.lr, raise minibatch_prompts, or (with latent steps) set flip to sign",
    ),
    Rule(
        "max_clipped_share", _clipped, False,
        "{share} of response steps were clipped",
        "the trust region stops most of what a step could teach",
        "lower optimizer.lr, or widen clip.low and clip.high",
    ),
    Rule(
        "max_zero_variance_share", "batch/zero_variance_share", False,
        "in {share} of groups all rewards were equal",
        "the task is too easy or too hard for the model, so most groups teach nothing",
        "choose other problems (tasks.*), raise group_size, or, where every reward is 0, check the verifier with "
        "`latent-grpo grade`",
    ),
    Rule(
        "max_no_answer_share", "rollout/reason_no_answer", False,
        "in {share} of rollouts the verifier found no answer",
        "responses do not contain the answer in the form that the verifier looks for",
        "look at a few with `latent-grpo inspect RUN --reason no_answer`; check model.prompt and "
        "rollout.verifier.fallback",
    ),
    Rule(
        "max_verifier_timeout_share", "rollout/verifier_timeout_share", False,
        "{share} of answers were not graded in time and were counted as wrong",
        "the verifier is too slow for these answers, or its processes get too little CPU",
        "raise rollout.verifier.time_limit_s or rollout.verifier.processes",
    ),
    Rule(
        "max_ungraded_share", "rollout/ungraded_share", False,
        "{share} of rollouts could not be graded and were left out",
        "the verifier's processes fail (such rollouts are never counted as wrong)",
        "read the workers' logs; above rollout.verifier.max_ungraded_share the run stops",
    ),
    Rule(
        "max_staleness_mean", "batch/staleness_mean", False,
        "the trajectories trained on are {value} policy versions old on average (limit {limit})",
        "rollout workers are far ahead of the learner",
        "lower max_staleness or rollout.workers, or give the learner more ranks",
    ),
    Rule(
        "max_rollout_wait_share", _share("time/rollout_wait_s", "time/step_s"), False,
        "the learner waits for rollouts in {share} of the time",
        "rollouts are the bottleneck",
        "add rollout.workers, raise rollout.max_rows, or let rollouts run ahead with max_staleness",
    ),
    Rule(
        "max_learner_share", _share("time/learner_s", "time/step_s"), False,
        "the learner takes {share} of a step while rollout workers wait",
        "the learner is the bottleneck",
        "add learner.ranks, raise learner.tokens_per_microbatch, or use fewer rollout.workers",
    ),
    Rule(
        "max_publish_share", _share("time/publish_s", "time/step_s"), False,
        "publishing weights takes {share} of a step",
        "gathering and checksumming the weights is slow compared with so short a step",
        "raise prompts_per_step or learner.weight_bucket_bytes, or use a ZeRO stage below 3",
    ),
    Rule(
        "max_dump_wait_share", _share("time/dump_wait_s", "time/step_s"), False,
        "training waits for the disk in {share} of the time",
        "the storage cannot write dumps of this size fast enough",
        "raise dump.every, set dump.which to failures, raise dump.queue, or choose a faster runs_folder",
    ),
    Rule(
        "min_effective_width", "latent/effective_width", True,
        "latent steps hold only {value} tokens in effect (limit {limit})",
        "the mixtures have collapsed to single tokens: latent reasoning has become ordinary text",
        "raise noise.scale or tau, lower optimizer.lr, or start from a checkpoint before the collapse",
        lambda config: config.k > 1,
    ),
    Rule(
        "max_relative_width", lambda m: m.get("latent/relative_width"), False,
        "latent mixtures are {share} of the way to being uniform over their K tokens",
        "latent steps carry hardly any information",
        "give the model a Latent-SFT start (warm_start), or lower noise.scale or tau",
    ),
    Rule(
        "max_skipped_updates", "learner/skipped_updates", False,
        "{value} updates per step were not finite and were not applied (limit {limit})",
        "a loss or gradient was not a finite number",
        "look at the batch, which is dumped under purpose=non_finite with the samples named; lower optimizer.lr",
    ),
    Rule(
        "min_reward_retained", "health/reward_retained", True,
        "the reward has fallen to {share} of its best level in this run",
        "training has become unstable",
        "resume from an earlier checkpoint with a lower optimizer.lr; look at log-prob gap, ratios and latent width",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The state of a rule after the last judged step. `value` is the metric's mean over the window, None if absent."""

    rule: Rule
    limit: float
    value: float | None
    active: bool
    message: str  # empty without a value


class Judge:
    """Judges the metrics of each step by the rules that the settings turn on. Writes nothing."""

    def __init__(self, config: RunConfig, lineage: int):
        self._config, self._lineage = config, lineage
        limits = {r.name: getattr(config.health, r.name) for r in RULES if r.when(config)}
        if limits.get("max_log_prob_gap") == "auto":
            limits["max_log_prob_gap"] = TOLERANCES[config.model.dtype].mean
        self._limits: dict[str, float] = {name: limit for name, limit in limits.items() if limit is not None}
        self._rules = [r for r in RULES if r.name in self._limits]
        self._seen: dict[str, deque[float]] = {r.name: deque(maxlen=config.health.window) for r in self._rules}
        self._raised_at: dict[str, int] = {}
        self._good: dict[str, int] = {}  # steps in a row within the limit, of active alarms
        self._rewards: deque[float] = deque(maxlen=config.health.window)
        self._best = 0.0
        self._first_shares: list[float] = []  # of latent steps, in the run's first steps

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the alarms that are raised."""
        return tuple(self._raised_at)

    def judge(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Returns the alarms to report at this step. Call it once per step, in order."""
        metrics = {**metrics, **self._derived(metrics)}
        return [alarm for rule in self._rules if (alarm := self._judged(rule, step, metrics)) is not None]

    def standings(self) -> list[Standing]:
        """How every rule stands after the last step."""
        return [self._standing(rule) for rule in self._rules]

    def _standing(self, rule: Rule) -> Standing:
        seen, limit = self._seen[rule.name], self._limits[rule.name]
        value = sum(seen) / len(seen) if seen else None
        message = "" if value is None else _words(rule, value, limit)
        return Standing(rule=rule, limit=limit, value=value, active=rule.name in self._raised_at, message=message)

    def _judged(self, rule: Rule, step: int, metrics: Mapping[str, float]) -> Alarm | None:
        value = rule.value(metrics)
        if value is None:
            return None
        seen = self._seen[rule.name]
        seen.append(value)
        mean, limit = sum(seen) / len(seen), self._limits[rule.name]
        raised_at = self._raised_at.get(rule.name)
        if not (mean < limit if rule.low else mean > limit):
            if raised_at is None:
                return None
            self._good[rule.name] = good = self._good.get(rule.name, 0) + 1
            if good < self._config.health.window:  # around a limit an alarm would come and go with every step
                return None
            del self._raised_at[rule.name]
            return self._alarm(rule, step, "over", mean)
        self._good[rule.name] = 0
        if raised_at is None:
            self._raised_at[rule.name] = step
            return self._alarm(rule, step, "raised", mean)
        return (
            self._alarm(rule, step, "lasting", mean) if (step - raised_at) % self._config.health.repeat == 0 else None
        )

    def _derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics that need the run's settings or its earlier steps."""
        derived = {}
        if "latent/effective_width" in metrics and self._config.k > 1:
            derived["latent/relative_width"] = (metrics["latent/effective_width"] - 1) / (self._config.k - 1)
        if (share := metrics.get("rollout/latent_share")) is not None:
            if len(self._first_shares) < self._config.health.window:
                self._first_shares.append(share)
            elif first := sum(self._first_shares) / len(self._first_shares):
                derived["health/latent_share_retained"] = share / first
        if "rollout/reward" in metrics:
            self._rewards.append(metrics["rollout/reward"])
            if len(self._rewards) == self._rewards.maxlen:
                mean = sum(self._rewards) / len(self._rewards)
                self._best = max(self._best, mean)
                if self._best > 0:
                    derived["health/reward_retained"] = mean / self._best
        return derived

    def _alarm(self, rule: Rule, step: int, state: State, value: float) -> Alarm:
        limit = self._limits[rule.name]
        return Alarm(
            step=step,
            lineage=self._lineage,
            time=round(time.time(), 3),
            name=rule.name,
            state=state,
            value=value,
            limit=limit,
            message=_words(rule, value, limit),
            cause=rule.cause,
            remedy=rule.remedy,
        )


class HealthMonitor(Judge):
    """A judge that keeps a record of its alarms in the run's `folder`."""

    def __init__(self, folder: Path, config: RunConfig, lineage: int):
        super().__init__(config, lineage)
        if lineage and (folder / METRICS_FILE).exists():  # the run's first steps, and not the resumed part's
            rows = islice(read_metrics(folder), config.health.window)
            shares = (row["metrics"].get("rollout/latent_share") for row in rows)
            self._first_shares = [share for share in shares if share is not None]
        self._record = LineFile(folder / FILE)

    def judge(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Records and returns the alarms to report at this step. Call it once per step, in order."""
        alarms = super().judge(step, metrics)
        for alarm in alarms:
            self._record.append(asdict(alarm))
        return alarms

    def close(self) -> None:
        """Closes the file of alarms."""
        self._record.close()


def _words(rule: Rule, value: float, limit: float) -> str:
    return rule.message.format(value=f"{value:.3g}", share=f"{value:.0%}", rest=f"{1 - value:.0%}", limit=f"{limit:g}")


@dataclass(frozen=True, slots=True)
class AlarmRecord:
    """A run's alarms, oldest first; `left_out` has a sentence for each line of the file that could not be read."""

    alarms: tuple[Alarm, ...]
    left_out: tuple[str, ...]


def read_alarms(run_folder: str | Path) -> AlarmRecord:
    """Reads the alarms of a run's live history. A damaged or foreign line is left out and reported.

    Raises :class:`MetricsError` where the run's metrics, which define its live history, cannot be read.
    """
    path = Path(run_folder) / FILE
    if not path.exists():
        return AlarmRecord((), ())
    live = {(row["step"], row["lineage"]) for row in read_metrics(path.parent, left_out=[])}  # named by who shows them
    alarms, left_out = [], []
    for number, line in whole_lines(path):
        try:
            alarm = _alarm(path, number, parsed_line(path, number, line))
        except MetricsError as error:
            left_out.append(str(error))
            continue
        if (alarm.step, alarm.lineage) in live:
            alarms.append(alarm)
    return AlarmRecord(tuple(alarms), tuple(left_out))


def _alarm(path: Path, number: int, row: Any) -> Alarm:
    """Parses one line. Raises :class:`MetricsError` for anything but an alarm of this version of the program."""
    place = f"{path}, line {number}: not an alarm that this program reads"
    if not isinstance(row, dict):
        raise MetricsError(f"{place}: expected an object, got {type(row).__name__}")
    names = {field.name for field in fields(Alarm)}
    if missing := sorted(names - row.keys()):
        raise MetricsError(f"{place}: it has no {', '.join(missing)}; another program or version wrote it")
    if unknown := sorted(row.keys() - names):
        raise MetricsError(f"{place}: unknown {', '.join(map(repr, unknown))}; another program or version wrote it")
    wrong = [name for name, fits in _FITS.items() if not fits(row[name])]
    if wrong:
        raise MetricsError(f"{place}: {wrong[0]} is {row[wrong[0]]!r:.100}")
    return Alarm(**row)


_FITS: dict[str, Callable[[Any], bool]] = {
    **{name: FITS[name][0] for name in ("step", "lineage", "time")},
    **dict.fromkeys(("value", "limit"), is_number),
    **dict.fromkeys(("name", "message", "cause", "remedy"), lambda value: isinstance(value, str)),
    "state": lambda value: value in ("raised", "lasting", "over"),
}


def last_active(alarms: Iterable[Alarm]) -> list[Alarm]:
    """Returns the newest line of each alarm that was not over at the end."""
    newest = {alarm.name: alarm for alarm in alarms}
    return [alarm for alarm in newest.values() if alarm.state != "over"]
