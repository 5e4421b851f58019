"""The loop of Latent-SFT (METHOD §7): train on chains, watch held-out pass@1, stop where RL can begin.

rows of the next step are made here ──► ranks train ──► every `evaluate_every` steps: publish, generate, grade
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.config import ConfigError, LatentSFTConfig, RunConfig
from common.metrics import MetricsWriter
from common.tasks import PromptStream, StoredTask, load_task
from common.types import Problem, TokenFacts
from deploy.controller import Pool, gather
from deploy.problems import PreparedTask, group_request
from deploy.progress import Reporter
from deploy.run import Run, save_whole, started
from deploy.run_folder import RunFolder, create_run
from deploy.scores import TaskResult, results
from learner.latent_sft import SFTRow, make_row
from learner.sft_learner import SFTLearner

HELD_OUT_SEED = 7919  # added to the run's: other problems than the evaluation's, which must not choose anything
HELD_OUT_SHARE = 0.1
TOO_LONG = "chain over max_response_tokens"


@dataclass(frozen=True, slots=True)
class SFTOutcome:
    steps: int
    held_out: TaskResult
    reached: bool  # stop_at was reached, or was not asked for


@dataclass(frozen=True, slots=True)
class SFTData:
    """Rows to learn from, and problems to be judged on that are never among them."""

    stream: PromptStream
    tasks: list[PreparedTask]
    held_out: list[tuple[PreparedTask, Problem]]
    row: Callable[[PreparedTask, Problem], SFTRow]

    def rows(self, step: int, count: int) -> list[SFTRow]:
        draws = [self.stream[step * count + i] for i in range(count)]
        return [self.row(self.tasks[draw.task], draw.problem) for draw in draws]


def prepare_sft(config: RunConfig, tasks: list[PreparedTask], tokenizer, facts: TokenFacts) -> SFTData:
    """Splits the tasks that have a chain of thought. Raises ConfigError if none has."""
    settings = _settings(config)

    def row(task: PreparedTask, problem: Problem) -> SFTRow:
        return make_row(
            tokenizer,
            task.prompt_ids(problem),
            problem.cot,
            problem.answer,
            c=settings.compression,
            k=config.k,
            latent_end_id=facts.latent_end_id,
            think_end=(task.source.config.prompt or config.model.prompt).think_end,
            explicit=settings.chain == "explicit",
        )

    found = [task for task in tasks if task.source.problem(0).cot.strip()]
    if not found:
        raise ConfigError(
            "warm_start needs an explicit chain of thought and no training task has one; set the task's columns.cot, "
            "or start from a model that thinks in latent steps already (model.path, no warm_start)"
        )
    share = -(-settings.evaluation_problems // len(found))
    training, held_out = [], []
    for task in found:
        rest, problems = _split(task, share, config, lambda t, p: _fits(row(t, p), t))
        training.append(rest)
        held_out += [(task, problem) for problem in problems]
    stream = PromptStream(
        [task.source for task in training], [task.source.config.weight for task in training], config.seed
    )
    return SFTData(stream, training, held_out, row)


def run_latent_sft(
    config: RunConfig, data: SFTData, learner: SFTLearner, pool: Pool, metrics: MetricsWriter, reporter: Reporter
) -> SFTOutcome:
    """Trains until the held-out pass@1 is `stop_at`, or for `max_steps`. The learner holds the result."""
    settings = _settings(config)
    result, done, reached = None, 0, False
    with reporter.phase("Latent-SFT", settings.max_steps) as advance:
        rows = data.rows(0, settings.batch_size)
        while done < settings.max_steps and not reached:
            learner.start_step(rows, done)
            rows = data.rows(done + 1, settings.batch_size)  # while the ranks train
            values = learner.finish_step()
            done += 1
            if done % settings.evaluate_every == 0 or done == settings.max_steps:
                result = _evaluate(config, data, learner, pool, done)
                values |= {"pass_at_1": result.pass_at_1, "invalid_rate": result.invalid_rate}
                reached = settings.stop_at is not None and result.pass_at_1 >= settings.stop_at
            metrics.write(done, values, kind="sft")
            note = f"loss {values['loss']:.3f}" + (f" · held-out pass@1 {result.pass_at_1:.3f}" if result else "")
            advance(done, note)
    return SFTOutcome(done, result, reached or settings.stop_at is None)


def _evaluate(config: RunConfig, data: SFTData, learner: SFTLearner, pool: Pool, step: int) -> TaskResult:
    pool.publish(learner.publish(step))
    requests = [
        group_request(
            config, task, problem, samples=1, purpose="evaluation", uid=f"sft/{step}/{i}/{problem.uid}", noise="off"
        )
        for i, (task, problem) in enumerate(data.held_out)
    ]
    return results(gather(pool, requests), together="held-out")[0]


def _settings(config: RunConfig) -> LatentSFTConfig:
    if config.warm_start is None:
        raise ConfigError("Latent-SFT needs the section warm_start; add it (an empty one takes the defaults)")
    return config.warm_start


def _fits(row: SFTRow, task: PreparedTask) -> bool:
    return len(row.chain.ids) + len(row.hard_ids) <= task.source.config.max_response_tokens


def _split(
    task: PreparedTask, count: int, config: RunConfig, fits: Callable[[PreparedTask, Problem], bool]
) -> tuple[PreparedTask, list[Problem]]:
    """What to train on, and up to `count` held-out problems: of a generated task the other split, of a stored one
    its last problems."""
    source = task.source
    if not isinstance(source, StoredTask):
        options = {**source.config.options, "split": "evaluation", "seed": config.seed + HELD_OUT_SEED, "size": count}
        other = load_task(source.config.model_copy(update={"options": options}), config.seed)
        return task, [other.problem(i) for i in range(count)]
    usable = source.filtered(lambda p: bool(p.cot.strip()), "no chain of thought")
    usable = usable.filtered(lambda p: fits(task, p), TOO_LONG)
    count = min(count, max(int(usable.size * HELD_OUT_SHARE), 1))
    held_out = [usable.problem(i) for i in range(usable.size - count, usable.size)]
    names = {problem.uid for problem in held_out}
    return PreparedTask(usable.filtered(lambda p: p.uid not in names, "held out"), task.renderer), held_out


# --- as a command, and as the start of a run -----------------------------------------------------------------------


def sft(config: RunConfig, profile: str, reporter: Reporter | None = None) -> RunFolder:
    """Latent-SFT alone (METHOD §7): its model is in the run's `base/`, for `model.path` of later runs."""
    folder, reporter = create_run(config, profile), reporter or Reporter()
    if config.warm_start is None:
        raise ConfigError(f"profile {profile} has no section warm_start; add it (an empty one takes the defaults)")
    with started(folder, config, 0, reporter) as run:
        model = warm_start(run)
    reporter.say(f"model {model}; train it with model.path={model}")
    return folder


def warm_start(run: Run, make_learner: Callable[..., SFTLearner] = SFTLearner) -> Path:
    """Latent-SFT of the initial model into `base/` (METHOD §7); a resumed run has it already.

    `make_learner(config, model)`: what trains, with the face of :class:`SFTLearner`.
    """
    config, base = run.config, run.folder.base_model
    if (base / "config.json").is_file():
        return base
    stage = min(config.learner.zero_stage, 2)
    if stage != config.learner.zero_stage:
        run.reporter.say(f"Latent-SFT runs at ZeRO stage {stage}; the RL steps at {config.learner.zero_stage}")
    sft_config = config.model_copy(update={"learner": config.learner.model_copy(update={"zero_stage": stage})})
    data = prepare_sft(sft_config, run.problems.training, run.tokenizer, run.facts)
    learner = make_learner(sft_config, run.initial)
    try:
        outcome = run_latent_sft(sft_config, data, learner, run.pool, run.metrics, run.reporter)
        save_whole(base, learner.export)
    finally:
        learner.close()
    run.record(sft={"steps": outcome.steps, "held_out_pass_at_1": outcome.held_out.pass_at_1})
    if not outcome.reached:
        run.reporter.say(
            f"[yellow]Latent-SFT stopped at warm_start.max_steps ({outcome.steps}) with a held-out pass@1 of "
            f"{outcome.held_out.pass_at_1:.3f}, below stop_at {config.warm_start.stop_at}; RL begins from there[/]"
        )
    return base
