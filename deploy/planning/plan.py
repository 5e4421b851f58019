"""The plan of a run: memory, slots, seconds of each stage, balance, waiting and hours, before anything starts.

    settings ──► memory of a rank and of a worker (deploy.checks.memory) ──► does it fit the card? how many samples?
       └──────► rates (rates.py) ──► seconds of rollouts, learner, publication ──► simulation.py ──► waiting, hours

Memory follows from the model's shape. Times need rates that a run has measured; without them none are said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.deploy.checks.memory import BYTES, GIB, ModelShape
from latent_grpo.deploy.checks.validate import arithmetic, memory_rows
from latent_grpo.deploy.planning.rates import DEVICES, MEMORY_GIB, Rates
from latent_grpo.deploy.planning.simulation import WARM_UP, Simulated, Times, driver_speed, growth, simulate
from latent_grpo.deploy.run.foreign_code import left_out_sentence, without_code
from latent_grpo.deploy.run.preparation import check

Row = tuple[str, str]
SIMULATED = 20  # steps of a simulation that count; fewer of large ones, and at least two
USUAL_SIMULATED = 50_000  # groups of a simulation, where that is two steps
MOST_SIMULATED = 500_000  # groups of one: a minute on one core
MOST_SCALED = 1.5  # times the parameters of the measured model
FAR = (
    "the rates are of a model of another size; time is taken as proportional to parameters, which is far too long for "
    "small models: give --rates of a run with this model"
)
VLLM_SHARE = 0.9  # of a card's memory, which vLLM takes where the settings say nothing else


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Seconds of the parts of one step, predicted; `simulated` is the loop that they make together."""

    rollout_s: float  # with all workers
    learner_s: float  # with all ranks
    publish_s: float
    times: Times
    simulated: Simulated
    worker_seconds: float  # of all rollouts of a step, on one worker
    rank_seconds: float  # of a learner's step, on one rank

    def hours(self, config: RunConfig) -> float:
        """Returns the hours of the run's steps, without its start and its evaluations."""
        return config.steps * self.simulated.step_s / 3600


class TooLarge(ConfigError):
    """A loop that would take too long to simulate."""


def stages(config: RunConfig, parameters: int, rates: Rates) -> Stages:
    """Predicts the stages of a step of a model of so many `parameters`, whose time is taken as proportional to them.

    Raises :class:`TooLarge`.
    """
    weights = sum(task.weight for task in config.tasks)
    response = sum(t.weight * t.max_response_tokens for t in config.tasks) / weights * rates.response_share
    prompt = sum(t.weight * t.max_prompt_tokens for t in config.tasks) / weights * rates.prompt_share
    scale = parameters / rates.parameters
    samples = config.samples_per_step
    worker_seconds = samples * response / rates.worker_steps_per_s * scale
    rank_seconds = samples * rates.trained_share * (prompt + response) / rates.rank_tokens_per_s * scale
    workers, ranks = config.rollout.workers, config.learner.ranks
    before = WARM_UP + config.max_staleness
    steps = min(max(USUAL_SIMULATED // config.prompts_per_step - before, 2), SIMULATED)
    if max((before + steps) * config.prompts_per_step, config.group_size, workers) > MOST_SIMULATED:
        raise TooLarge(
            f"prompts_per_step {config.prompts_per_step:,}, max_staleness {config.max_staleness:,}, group_size "
            f"{config.group_size:,}, rollout.workers {workers:,}: more than a plan simulates ({MOST_SIMULATED:,} "
            "groups, samples in a group, or workers); lower them"
        )
    slots = (config.max_staleness + 1) * config.prompts_per_step
    side_by_side = max(min(config.rollout.max_rows // config.group_size, math.ceil(slots / workers)), 1)
    of_group = worker_seconds / config.prompts_per_step
    times = Times(
        group_s=of_group * side_by_side,
        side_by_side=side_by_side,
        learner_s=rank_seconds / ranks,
        publish_s=rates.publish_s * scale,
        spread=0.0,  # the rates have the wait for the longest in them
    )
    return Stages(
        rollout_s=worker_seconds / workers,
        learner_s=times.learner_s,
        publish_s=times.publish_s,
        times=times,
        simulated=simulate(config.model_copy(update={"dynamic_sampling": "refill"}), times, workers, steps),
        worker_seconds=worker_seconds,
        rank_seconds=rank_seconds,
    )


def plan(
    config: RunConfig,
    *,
    gpus: float = 0,
    gpu: str | None = None,
    rates: Rates | None = None,
    grow: bool = False,
    allowed: Sequence[str] = (),
) -> list[Row]:
    """Returns the rows of a run's plan on `gpus` cards of the kind `gpu`; none: on the CPU.

    It reads the model's files and no weights, and imports nothing that the settings name (`deploy.run.foreign_code`),
    unless its module is `allowed`. With `grow` it also simulates 1 to 1,024 workers. Raises ConfigError for what the
    run itself would be refused for.
    """
    left_out = without_code(config, allowed)
    found = check(config, elsewhere=True, stored=False, left_out=[code.path for code in left_out])
    rows: list[Row] = [("warning", left_out_sentence(left_out))] if left_out else []
    rows += [*arithmetic(config)[-1:], *memory_rows(config, found.model)]
    if found.model is not None:
        shape: ModelShape | None = ModelShape.of(config, found.model.source, found.model.tokenizer)
    else:
        known = ModelShape.published(str(config.model.source))
        shape = None if known is None else known[1]
    if shape is None:
        return [*rows, ("times", f"not predicted: the size of {config.model.source} is not known here")]
    rows += slot_rows(config, shape, gpu)
    if rates is None and not gpus:
        rates = DEVICES["cpu"]
    try:
        rows += time_rows(config, shape.parameters, rates, gpus)
    except TooLarge as error:  # which memory and slots do not depend on
        return [*rows, ("times", f"not predicted: {error}")]
    return rows + (growth_rows(config, shape.parameters, rates) if grow and rates is not None else [])


def time_rows(config: RunConfig, parameters: int, rates: Rates | None, gpus: float) -> list[Row]:
    """Rows on times, balance and hours; without `rates` one row that says how to get them."""
    if rates is None:
        return [
            (
                "times",
                "not predicted: no run was measured on this device; train a few steps there (steps=5) and give "
                "--rates RUN",
            )
        ]
    found = stages(config, parameters, rates)
    simulated, hours = found.simulated, found.hours(config)
    note = "" if parameters == rates.parameters else f", scaled from {rates.parameters:,} to {parameters:,} parameters"
    ratio = parameters / rates.parameters
    rows = [
        ("rates", f"of {rates.origin}{note}"),
        *([("warning", FAR)] if not 1 / MOST_SCALED <= ratio <= MOST_SCALED else []),
        ("rollouts of a step", f"{found.rollout_s:,.3g} s with {config.rollout.workers} worker(s)"),
        ("learner's step", f"{found.learner_s:,.3g} s with {config.learner.ranks} rank(s)"),
        ("publication", f"{found.publish_s:,.3g} s"),
        ("a step", f"{simulated.step_s:,.3g} s at max_staleness {config.max_staleness}"),
        (
            "waiting",
            f"the learner {simulated.learner_waits:.0%} of the time, workers {1 - simulated.workers_busy:.0%}",
        ),
        ("balance", _balance(config, found, gpus)),
        ("hours", f"{hours:,.2f} for {config.steps:,} steps"),
    ]
    return rows + ([("GPU-hours", f"{hours * gpus:,.1f} on {gpus:g} GPU(s)")] if gpus else [])


def _balance(config: RunConfig, found: Stages, gpus: float) -> str:
    """How many actors of each kind would take equally long, of as many as there are, with staleness."""
    actors = config.rollout.workers + config.learner.ranks
    share = found.worker_seconds / (found.worker_seconds + found.rank_seconds)
    workers = min(max(round(actors * share), 1), actors - 1)
    best = f"{workers} worker(s) and {actors - workers} rank(s)" if actors > 1 else "one of each"
    return (
        f"rollouts are {share:.0%} of the work; of {actors} actors {best} would take equally long (max_staleness 1 or "
        "more, so that they work at once)"
    )


def growth_rows(config: RunConfig, parameters: int, rates: Rates) -> list[Row]:
    """Rows on 1 to 1,024 workers with a learner that keeps up, and a driver that is as fast as this machine's core."""
    speed = driver_speed()
    times = replace(stages(config, parameters, rates).times, learner_s=0.0, publish_s=0.0, driver_group_s=1 / speed)
    times = replace(times, group_s=times.group_s / times.side_by_side, side_by_side=1)  # the same speed, fewer events
    rows = [("driver", f"{speed:,.0f} groups a second on one core of this machine, without Ray's calls")]
    first: float | None = None
    for found in growth(config, times):
        first = first or found.groups_per_s
        rows.append(
            (
                f"{found.workers:,} worker(s)",
                f"{found.groups_per_s:,.4g} groups/s, {found.groups_per_s / first / found.workers:.0%} of "
                f"{found.workers:,} times one worker's; workers {found.workers_busy:.0%} busy",
            )
        )
    return rows


def slot_rows(config: RunConfig, shape: ModelShape, gpu: str | None) -> list[Row]:
    """Rows on the samples whose keys and values a worker holds at once, on a card of the kind `gpu`.

    Raises ConfigError for a card that is not known.
    """
    longest = max(t.max_prompt_tokens + t.max_response_tokens for t in (*config.tasks, *config.evaluation.tasks))
    size = BYTES[config.model.dtype]
    each = longest * shape.kept * size
    if gpu is None:
        return [("keys and values", f"{each / 2**20:,.1f} MiB for a sample of {longest:,} tokens")]
    if gpu not in MEMORY_GIB:
        raise ConfigError(f"--gpu {gpu}: not known; give one of {', '.join(MEMORY_GIB)}")
    share = config.rollout.vllm.engine_args.get("gpu_memory_utilization", VLLM_SHARE)
    parallel = config.rollout.vllm.tensor_parallel
    room = parallel * MEMORY_GIB[gpu] * GIB * share * min(config.rollout.resources.num_gpus or 1.0, 1.0)
    slots = int(max(room - size * shape.parameters, 0) // each)
    wanted = config.rollout.max_rows
    verdict = "all of them" if slots >= wanted else f"the others of rollout.max_rows ({wanted:,}) wait"
    return [
        (
            "KV-cache slots",
            f"{slots:,} samples of {longest:,} tokens fit beside the weights ({share:.0%} of {parallel} {gpu}): "
            f"{verdict}",
        )
    ]
