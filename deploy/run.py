"""What every command that generates needs: Ray, a model with its tokenizer, problems, and workers; and their end."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from common.chain import CHAIN_FILE, ChainSettings, chain_of, check_chain, read_chain, write_chain
from common.config import ConfigError, RunConfig, config_as_json
from common.interrupts import terminated_is_interrupted
from common.metrics import MetricsWriter
from common.models import load_tokenizer, make_model, make_tokenizer, output_facts, position_limit, save_model
from common.prompts import check_think_start, check_width, resolve_tokens
from common.store import TrajectoryStore
from common.tasks import load_task
from common.types import TokenFacts
from deploy.preflight import check_before_start, engine_rows
from deploy.problems import PreparedTask, Problems
from deploy.progress import Reporter
from deploy.ray_session import Services, ray_session
from deploy.run_folder import RunFolder
from deploy.run_lock import run_lock
from deploy.run_manifest import data_facts, write_manifest
from deploy.versions import differences
from deploy.workers import WorkerFactory
from rollout_workers.pool import RolloutPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS_FOR_TOKENIZER = 20_000


@dataclass(slots=True)
class Run:
    """What the parts of a run share, once its workers are there."""

    folder: RunFolder
    config: RunConfig
    lineage: int
    reporter: Reporter
    metrics: MetricsWriter
    initial: str | Path  # folder or hub id of the model that the run starts from
    tokenizer: PreTrainedTokenizerBase
    facts: TokenFacts
    problems: Problems
    pool: RolloutPool
    chain: ChainSettings | None = None  # of the initial model, where it says so
    summary: dict = field(default_factory=dict)

    @property
    def store(self) -> TrajectoryStore:
        return TrajectoryStore(self.folder.trajectories)

    def export(self, target: Path, write: Callable[[Path], None]) -> None:
        """A model folder that appears whole, with the chain's settings in it (`common.chain`)."""

        def all_of_it(folder: Path) -> None:
            write(folder)
            write_chain(folder, chain_of(self.config, self.tokenizer, self.chain))

        save_whole(target, all_of_it)

    def record(self, **entries) -> None:
        self.summary |= entries
        self.folder.write_json("summary.json", self.summary)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run is made of, read and checked before anything is started for it."""

    initial: str | Path | None  # None: a `model.new` that `placed` makes in the run's folder
    tokenizer: PreTrainedTokenizerBase
    facts: TokenFacts
    chain: ChainSettings | None
    problems: Problems

    def placed(self, folder: RunFolder, config: RunConfig, reporter: Reporter) -> Parts:
        """With a model that workers can load."""
        if self.initial is not None:
            return self
        model = make_model(config.model.new, self.tokenizer, config.seed)
        reporter.say(f"made a new {config.model.new.architecture} of {model.num_parameters():,} parameters")
        target = _place_of_new(config, folder)
        save_whole(target, lambda unfinished: save_model(unfinished, model, self.tokenizer))
        return replace(self, initial=target)

    def run(self, folder: RunFolder, config: RunConfig, lineage: int, reporter: Reporter, metrics, pool) -> Run:
        initial, tokenizer, facts, problems = self.initial, self.tokenizer, self.facts, self.problems
        return Run(folder, config, lineage, reporter, metrics, initial, tokenizer, facts, problems, pool, self.chain)


def ready(config: RunConfig, reporter: Reporter) -> Parts:
    """What every command that makes a run does first: whatever can be refused is, and nothing is left behind."""
    check_before_start(config)
    return prepare(config, reporter)


def prepare(config: RunConfig, reporter: Reporter, folder: RunFolder | None = None) -> Parts:
    """The tokenizer, the model's chain and the problems, checked against the settings; writes nothing.

    `folder`: the run's, where it has one and may hold its `model.new` already.
    """
    initial = _initial_model(config, folder)
    if initial is None:
        tokenizer = make_tokenizer(config.model.new, _texts(config))
        vocab_size, eos_ids, limit = len(tokenizer), (), config.model.new.max_positions
    else:
        tokenizer = load_tokenizer(initial)
        (vocab_size, eos_ids), limit = output_facts(initial), position_limit(initial)
    facts = resolve_tokens(tokenizer, vocab_size, config.latent, config.model.prompt.think_end, eos_ids)
    check_width(config, facts)
    check_think_start(config, tokenizer)
    chain = None if initial is None else read_chain(initial)
    if chain is not None:
        for line in check_chain(chain, initial, config, tokenizer):
            reporter.say(f"[yellow]{line}[/]")
    elif config.model.new is None and config.latent and config.warm_start is None:
        reporter.say(
            f"[yellow]model {escape(str(initial))} has no {CHAIN_FILE}: k ({config.k}), tau ({config.tau:g}) and "
            f"think_end ({escape(repr(config.model.prompt.think_end))}) are the settings' and must be those that it "
            "was trained with[/]"
        )
    problems = Problems(config, tokenizer)
    check_positions((*problems.training, *problems.evaluation), limit, initial or "model.new")
    for line in problems.summaries:
        reporter.say(line)
    return Parts(initial, tokenizer, facts, chain, problems)


@contextlib.contextmanager
def started(
    folder: RunFolder,
    config: RunConfig,
    lineage: int,
    reporter: Reporter,
    services: Services = "both",
    parts: Parts | None = None,
) -> Iterator[Run]:
    """Ray and the workers of a run; all of it gone afterwards.

    `services`: which of the two the cluster must have room for. `parts`: of :func:`ready`, where the run is a new one.
    """
    engine_rows(config)  # raises before anything is started
    folder = RunFolder(folder.path.resolve())
    reporter.say(f"run folder {folder.path}")
    for difference in differences():
        reporter.say(f"[yellow]{difference}[/]")
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_lock(folder.path))
        parts = (parts or prepare(config, reporter, folder)).placed(folder, config, reporter)
        metrics = stack.enter_context(MetricsWriter(folder.path, config.metrics.sinks))
        stack.enter_context(ray_session(config, services))
        stack.enter_context(terminated_is_interrupted())
        write_manifest(folder, config, lineage, parts.initial, data_facts(parts.problems))
        reporter.say(f"starting {config.rollout.workers} rollout worker(s)")
        factory = WorkerFactory(config_as_json(config), str(parts.initial), folder.name)
        pool = stack.enter_context(RolloutPool(factory, config.rollout, config.deadlines))
        run = parts.run(folder, config, lineage, reporter, metrics, pool)
        if lineage and (folder.path / "summary.json").is_file():
            run.summary = folder.read_json("summary.json")
        yield run


def _initial_model(config: RunConfig, folder: RunFolder | None) -> str | Path | None:
    """The folder or hub id that the run starts from; None where it is still to be made."""
    if config.model.new is None:
        return config.model.path
    made = None if folder is None else _place_of_new(config, folder)
    return made if made is not None and (made / "config.json").is_file() else None


def _place_of_new(config: RunConfig, folder: RunFolder) -> Path:
    return folder.base_model if config.warm_start is None else folder.path / "initial"


def _texts(config: RunConfig) -> Iterator[str]:
    """What a new model's tokenizer is trained on: the first task's problems, chains and answers."""
    if config.model.new.tokenizer == "arithmetic":
        return
    source = load_task(config.tasks[0], config.seed)
    for index in range(min(source.size or TEXTS_FOR_TOKENIZER, TEXTS_FOR_TOKENIZER)):
        problem = source.problem(index)
        yield from (content for _, content in problem.messages)
        yield problem.cot
        yield f"\\boxed{{{problem.answer}}}"


def check_positions(tasks: Iterable[PreparedTask], limit: int | None, model: str | Path) -> None:
    """Raises ConfigError where a task's longest prompt and response need more positions than the model's `limit`."""
    for task in tasks:
        budget = task.source.config.max_response_tokens
        if limit is not None and task.longest_prompt + budget > limit:
            raise ConfigError(
                f"task {task.name}: its longest prompt ({task.longest_prompt:,} tokens) and max_response_tokens "
                f"({budget:,}) need {task.longest_prompt + budget:,} positions, model {model} has {limit:,}; "
                f"set its max_response_tokens to {max(limit - task.longest_prompt, 0):,} or less, or lower its "
                "max_prompt_tokens"
            )


def save_whole(target: Path, write: Callable[[Path], None]) -> None:
    """`write(folder)`, and only then the name: a killed run leaves no half a model under it."""
    unfinished = target.with_name(f".unfinished-{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    write(unfinished)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
