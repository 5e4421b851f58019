"""Evaluation (METHOD §8) on a rollout pool: pass@1 with noise off, pass@k with the run's noise, per task and averaged.

problems ─► groups of `runs` samples, noise off ─────► pass@1, lengths, invalid rate ─┐
        └─► groups of `samples`, the run's noise ────► pass@k ────────────────────────┴─► macro average

So it is by this project's protocol; `rows` says what that of the paper's authors asks for instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from latent_grpo.common.config import (
    ConfigError,
    EvaluationConfig,
    RunConfig,
    load_config,
    of_model,
    read_profile,
)
from latent_grpo.common.config.yaml_files import parse_override
from latent_grpo.common.hub import check_is_no_run
from latent_grpo.common.model_chain import CHAIN_FILE, ChainSettings, read_chain
from latent_grpo.common.schema import concat
from latent_grpo.common.tasks.benchmarks import BENCHMARKS, benchmark_tasks, reference_rules
from latent_grpo.common.tasks.present import with_present_files
from latent_grpo.common.types import GroupRequest
from latent_grpo.deploy.controller import gather
from latent_grpo.deploy.evaluation.report import protocol_line, report, show, table
from latent_grpo.deploy.evaluation.rows import Row, SampleSet, interim_rows, planned, rows_of
from latent_grpo.deploy.evaluation.scores import TaskResult
from latent_grpo.deploy.run.folder import RunFolder, create_run
from latent_grpo.deploy.run.foreign_code import check_origin
from latent_grpo.deploy.run.preparation import prepare
from latent_grpo.deploy.run.problems import PreparedTask
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.session import Run, run_session
from latent_grpo.deploy.run.storage.copy import model_copy
from latent_grpo.deploy.run.stored import EVALUATION_FILE
from latent_grpo.learner.publication import publish_model
from latent_grpo.rollout_workers.verifiers import used_definitions

SAMPLES_AT_ONCE = 8192  # samples requested together, which bounds the trajectories in memory

Result = TypeVar("Result")
Wish = tuple[list[GroupRequest], Callable[[int], None]]
"""Groups that an evaluation asks for together, and what is called with the number of those that have arrived."""
Asking = Generator[Wish, list[pa.RecordBatch], Result]
"""An evaluation as a generator: it yields what it asks for, is sent those groups in order, and returns its result."""
Gather = Callable[[list[GroupRequest], Callable[[int], None]], list[pa.RecordBatch]]
"""Generates groups with the pool's current weights and waits for all (`Controller.gather`, `controller.gather`)."""
Keep = Callable[[list[pa.RecordBatch]], None]
"""Called with trajectories as they arrive, for example to dump them."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of an evaluation: one for each task, protocol and, by the authors' protocol, noise off and on."""

    tasks: tuple[TaskResult, ...]

    @property
    def by_task(self) -> list[TaskResult]:
        """One result for each task: by this project's protocol where that was used, with the noise off."""
        found: dict[str, TaskResult] = {}
        for result in self.tasks:
            found.setdefault(result.task, result)
        return list(found.values())

    def metrics(self) -> dict[str, float]:
        """Returns the figures of all tasks, named `TASK/FIGURE`."""
        return {name: value for result in self.tasks for name, value in result.metrics().items()}


def measure(
    config: RunConfig,
    gather: Gather,
    tasks: Sequence[PreparedTask],
    tag: str,
    *,
    settings: EvaluationConfig | None = None,
    reporter: Reporter | None = None,
    keep: Keep | None = None,
    at_once: int = SAMPLES_AT_ONCE,
) -> Evaluation:
    """Evaluates the weights that the pool behind `gather` holds.

    `settings` (the run's own by default) ask for `runs` samples per problem with noise off, for pass@1, and for
    `samples` more with the run's noise, for pass@k, where that is above 0; by the authors' protocol for what
    :func:`rows_of` says. `tag` is part of the groups' identity and must be new for each evaluation of a run, while the
    draws depend on problem and sample index only (METHOD §2.5). At most `at_once` samples are requested together.
    """
    rows = [row for task in tasks for row in rows_of(config, task, settings or config.evaluation)]
    return Evaluation(tuple(measure_rows(config, gather, rows, tag, reporter, keep, at_once)))


def measure_rows(
    config: RunConfig,
    gather: Gather,
    rows: Sequence[Row],
    tag: str,
    reporter: Reporter | None = None,
    keep: Keep | None = None,
    at_once: int = SAMPLES_AT_ONCE,
) -> list[TaskResult]:
    """Measures rows as :func:`measure` does; those that sample a problem alike share its samples."""
    return answered(asking_for_rows(config, rows, tag, reporter or Reporter(), keep, at_once), gather)


def answered(asking: Asking[Result], gather: Gather) -> Result:
    """Returns the result of an evaluation that is given what it asks for at once."""
    with contextlib.closing(asking):
        try:
            wish = next(asking)
            while True:
                wish = asking.send(gather(*wish))
        except StopIteration as ended:
            result: Result = ended.value
            return result


def asking_for_rows(
    config: RunConfig, rows: Sequence[Row], tag: str, reporter: Reporter, keep: Keep | None, at_once: int
) -> Asking[list[TaskResult]]:
    """Measures rows with the groups that it is sent."""
    measured, sets = planned(rows)
    stages: dict[str, list[SampleSet]] = {}
    for found in sets:
        stages.setdefault(found.stage, []).append(found)
    for stage, of_stage in stages.items():
        yield from _generating(config, of_stage, stage.format(tag), tag, reporter, keep, at_once)
    return [found.result() for found in measured]


def _generating(
    config: RunConfig,
    sets: Sequence[SampleSet],
    name: str,
    tag: str,
    reporter: Reporter,
    keep: Keep | None,
    at_once: int,
) -> Asking[None]:
    """Asks for the samples of some sets, a part at a time, and counts them."""
    wanted = [(found, i, request) for found in sets for i, request in enumerate(found.requests(config, tag))]
    with reporter.phase(name, len(wanted), "problems") as advance:
        done = 0
        for part in _parts(wanted, at_once):

            def arrived(count: int, before: int = done) -> None:
                advance(before + count)

            groups = yield [request for _, _, request in part], arrived
            kept = [found.take(i, group) for (found, i, _), group in zip(part, groups, strict=True)]
            if keep is not None:
                keep(kept)
            done += len(part)


Wanted = tuple[SampleSet, int, GroupRequest]


def _parts(wanted: Sequence[Wanted], at_once: int) -> Iterator[list[Wanted]]:
    """Yields parts of at most `at_once` samples, or of one group that has more."""
    part: list[Wanted] = []
    samples = 0
    for one in wanted:
        size = len(one[2].sample_indices)
        if part and samples + size > at_once:
            yield part
            part, samples = [], 0
        part.append(one)
        samples += size
    if part:
        yield part


def evaluate(run: Run, gather: Gather, step: int, tag: str) -> list[TaskResult]:
    """Evaluates the workers' weights as :func:`evaluating` does, and waits for the figures."""
    return answered(evaluating(run, step, tag, run.reporter), gather)


def evaluating(run: Run, step: int, tag: str, reporter: Reporter) -> Asking[list[TaskResult]]:
    """Evaluates weights on every evaluation task and records the results, as those of `step`, in metrics and summary.

    `reporter` shows the progress. The weights are those of the workers that generate what it asks for.

    Before and after training (`tag`) the summary gets figures of all problems, with pass@k. The run's curve (metrics of
    the kind `evaluation`) and the result are of :func:`interim_rows` throughout, where the settings have them, so that
    its points compare with each other. Returns one result for each task (:attr:`Evaluation.by_task`).
    """
    ends, settings = tag in ("before", "after"), run.config.evaluation
    asked = settings if ends else settings.model_copy(update={"samples": 0})
    whole = [row for task in run.problems.evaluation for row in rows_of(run.config, task, asked)]
    if not whole:
        return []
    fewer = interim_rows(whole, settings) if settings.interim else []
    rows = [*whole, *fewer] if ends or not fewer else fewer

    def keep(groups: list[pa.RecordBatch]) -> None:
        run.store.write(step, concat(groups), "evaluation", run.lineage)

    kept = keep if run.config.dump.evaluation else None
    results = tuple((yield from asking_for_rows(run.config, rows, tag, reporter, kept, SAMPLES_AT_ONCE)))
    curve = Evaluation(results[len(rows) - len(fewer) :] if fewer else results)
    run.metrics.write(step, curve.metrics(), kind="evaluation", lineage=run.lineage)
    shown = Evaluation(results[: len(whole)]) if ends else curve
    if ends:
        run.record(**{tag: shown.metrics(), "evaluation_protocol": settings.protocol})
    for result in shown.tasks:
        low, high = result.interval
        first = f" (first {result.problems:,} problems)" if fewer and not ends else ""
        run.reporter.say(
            f"{result.title}{first}: pass@1 {result.pass_at_1:.3f} (95 % {low:.3f} to {high:.3f}), chain length "
            f"{result.chain_length:.1f} ({result.latent_length:.1f} latent), invalid {result.invalid_rate:.1%}"
            + (f", mean reward {result.mean_reward:.3f}" if result.other_rewards else "")
            + "".join(f", pass@{at.k} {at.value:.3f}" for at in result.pass_at_k)
        )
    return curve.by_task


# --- as a command --------------------------------------------------------------------------------------------------


class EvaluationPlan(NamedTuple):
    """The settings of an evaluation, a name for it, and the origin of its noise."""

    config: RunConfig
    name: str
    noise: str | None
    """Where the noise scale of pass@k comes from; None: it is the default."""


def evaluation_config(
    model: str,
    overrides: list[str],
    *,
    profile: str | None = None,
    tasks: Sequence[str] = (),
    data: str = "data",
    limit: int | None = None,
    allowed: Sequence[str] = (),
) -> EvaluationPlan:
    """Returns the plan of an evaluation of `model`. Raises ConfigError.

    Settings come from `profile`; without one, from the run in whose folder the model lies; without that, for named
    benchmarks, from the model's own chain (`common.model_chain`) and the defaults. `tasks` replaces the evaluation
    tasks by named benchmarks with the files of the folder `data`; `limit` takes the first problems of each. Training
    tasks are not loaded. `allowed` are modules or import paths that may be imported for a run of another user
    (`deploy.run.foreign_code`). The URL of a model in a remote run is one too.
    """
    model = model_copy(model)
    check_is_no_run(model)
    origin: Path | None = None  # the run whose settings are taken
    run_config = Path(model).parent / "config.json"
    if profile is not None:
        settings, name = read_profile(profile), Path(profile).stem
        noise = f"profile {name}"
    elif (Path(model).parent / "run.json").exists() and run_config.exists():
        origin = run_config.parent
        settings, name = RunFolder(origin).placed_settings(), Path(model).resolve().parent.name
        noise = f"run {name}"
    elif tasks:
        settings, name, noise = _settings_of(read_chain(model)), "benchmarks", None
    else:
        raise ConfigError(
            f"no task to evaluate {model} on: give --tasks (of {', '.join(BENCHMARKS)}), or --profile with "
            "evaluation.tasks"
        )
    evaluation = dict(settings.get("evaluation") or {})
    if tasks:
        evaluation["tasks"] = [task.model_dump(exclude_unset=True) for task in benchmark_tasks(tasks, data)]
        name = "-".join(tasks) if len(tasks) < 4 else f"{len(tasks)}-benchmarks"
    if not evaluation.get("tasks"):
        raise ConfigError(f"{name} has no evaluation.tasks; give --tasks, or add one with `name` and `path`")
    if limit is not None:
        evaluation["tasks"] = [{**task, "limit": limit} for task in evaluation["tasks"]]
    # what a run keeps and where it ends may name tasks that are not evaluated here
    checkpoint = {**(settings.get("checkpoint") or {}), "keep_best": None}
    settings |= {"evaluation": evaluation, "tasks": evaluation["tasks"], "checkpoint": checkpoint, "stop_on": None}
    config = with_present_files(load_config(settings, [*overrides, *of_model(model)]))
    if any(parse_override(override)[0] in (["noise"], ["noise", "scale"]) for override in overrides):
        noise = "the command"
    if "scale" not in config.noise.model_fields_set:
        noise = None
    config = config.model_copy(update={"tasks": config.evaluation.tasks})
    used = used_definitions(config)  # those of the training tasks alone are of no use here
    verifiers = {name: definition for name, definition in config.verifiers.items() if name in used}
    config = config.model_copy(update={"verifiers": verifiers})
    if origin is not None:
        check_origin(origin, config, overrides, allowed)
    return EvaluationPlan(config, name, noise)


def _settings_of(chain: ChainSettings | None) -> dict[str, Any]:
    """Settings from a model's own chain."""
    if chain is None:
        return {}
    model = {"prompt": {**(chain.prompt or {}), "think_end": chain.think_end}}
    if chain.chain == "explicit":
        return {"algorithm": "grpo", "model": model}
    exits = {} if chain.latent_exit is None else {"latent_exit": chain.latent_exit}
    return {"k": chain.k, "tau": chain.tau, "model": model, **exits}


def noise_line(config: RunConfig, noise: str | None) -> str | None:
    """A line about the noise of pass@k and its origin (:class:`EvaluationPlan`); None where no noise is used."""
    rules = [reference_rules(task.name) for task in config.evaluation.tasks]
    too = "reference" in config.evaluation.protocols and any(found is not None and found.noise_too for found in rules)
    if not (config.evaluation.samples or too) or config.noise.mode == "off":
        return None
    what = "what has the noise on" if too else "pass@k"
    used = f"{what} is sampled with noise.scale {config.noise.scale:g} ({config.noise.mode})"
    if noise is not None:
        return f"{used}, from {noise}"
    return (
        f"[yellow]{used}, the default: the settings have no noise scale, and {CHAIN_FILE} does not store the one that "
        "the model was trained with; give it as noise.scale=...[/]"
    )


def evaluate_model(
    config: RunConfig, name: str, reporter: Reporter | None = None, noise: str | None = None
) -> Evaluation:
    """Evaluates a finished model on `config.evaluation.tasks`.

    A run folder of its own gets `evaluation.json` and all trajectories, and a table is printed. `noise` is that of
    :class:`EvaluationPlan`.
    """
    if not config.evaluation.tasks:
        raise ConfigError(f"{name} has no evaluation.tasks; add one with `name` and `path`")
    reporter = reporter or Reporter()
    prepared = prepare(config, reporter)
    for line in filter(None, (protocol_line(config), noise_line(config, noise))):
        reporter.say(line)
    folder = create_run(config, f"evaluate-{name}", kind="evaluate")
    with run_session(folder, config, 0, reporter, prepared, "rollout") as run:
        publication = publish_model(run.initial, 0, config)
        run.pool.publish(publication)

        def keep(groups: list[pa.RecordBatch]) -> None:
            run.store.write(0, concat(groups), "evaluation", run.lineage)

        ask = partial(gather, run.pool)
        found = measure(config, ask, run.problems.evaluation, "model", reporter=reporter, keep=keep)
        run.metrics.write(0, found.metrics(), kind="evaluation")
        content = report(
            found.tasks,
            run.problems.evaluation,
            config,
            model=str(run.initial),
            checksum=publication.manifest.version.checksum,
            chain=run.prepared.model.chain,
            versions=folder.read_json("run.json")["versions"],
        )
        run.folder.write_json(EVALUATION_FILE, content)
    show(reporter.console, table(found.tasks, str(config.model.path)))
    reporter.say(f"{run.folder.path / EVALUATION_FILE} · trajectories in {run.folder.trajectories}")
    return found
