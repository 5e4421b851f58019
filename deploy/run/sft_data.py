"""The data of Latent-SFT (METHOD §7): rows of the tasks that have a chain of thought, and held-out problems.

A chain is encoded once for each stored problem, when it is checked; its soft labels are made where a row is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.common.encoding import TextEncoder, UnencodableText
from latent_grpo.common.tasks.sources import PromptStream, StoredTask, TaskError, TaskSource, load_task
from latent_grpo.common.types import Problem, TokenFacts
from latent_grpo.deploy.run.problems import PreparedTask
from latent_grpo.learner.sft.rows import ChainTooShort, EncodedChain, SFTRow, chain_of_ids, visible_text
from latent_grpo.reward.extraction import extract

HELD_OUT_SEED = 7919  # added to the run's seed, so that the evaluation's problems do not decide when to stop
HELD_OUT_SHARE = 0.1
NO_CHAIN = "no chain of thought"
TOO_SHORT = "chain of thought under warm_start.compression"
TOO_LONG = "chain over max_response_tokens"
NO_BOX = "solution without a boxed answer"
HELD_OUT = "held out"
MOST_DROPPED = 0.5  # of a task's chains, for their length: beyond it training would be on another data set


class NoChain(ConfigError):
    """A problem without a chain of thought."""


class Chains:
    """Encodes chains of thought: those of a stored task together, that of a generated problem where it is used."""

    def __init__(self, config: RunConfig, encoder: TextEncoder, facts: TokenFacts) -> None:
        self._config, self._settings = config, config.latent_sft
        self._encoder, self._facts = encoder, facts
        self._stored: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # by a stored problem's uid: ids of chain, answer

    def read(self, task: PreparedTask, source: StoredTask) -> None:
        """Encodes the chains of a stored task's problems. Raises ConfigError, which names the problem."""
        problems, chains = [], []
        for index in range(source.size):
            with contextlib.suppress(NoChain):
                problem = source.problem(index)
                chains.append(_chain_text(problem, self._think_end(task)))
                problems.append(problem)
        answers = [self._visible(task, problem) for problem in problems]
        of_chains = self._encoded(f"the chains of {task.name}", problems, chains)
        of_answers = self._encoded(f"the visible texts of {task.name}", problems, answers)
        uids = (problem.uid for problem in problems)
        self._stored |= dict(zip(uids, zip(of_chains, of_answers, strict=True), strict=True))

    def encoded(self, task: PreparedTask, problems: Sequence[Problem]) -> Iterator[EncodedChain]:
        """Yields the problems' chains as token ids. Raises ConfigError, which names the problem."""
        chains = [_chain_text(problem, self._think_end(task)) for problem in problems]
        new = [place for place, problem in enumerate(problems) if problem.uid not in self._stored]
        parts = ([chains[place] for place in new], [self._visible(task, problems[place]) for place in new])
        of_new = zip(*(self._encoded("chains", [problems[i] for i in new], texts) for texts in parts), strict=True)
        for problem, text in zip(problems, chains, strict=True):
            cot, visible = self._stored[problem.uid] if problem.uid in self._stored else next(of_new)
            try:
                yield chain_of_ids(
                    cot,
                    visible,
                    self._encoder.tokenizer.eos_token_id,
                    c=self._settings.compression,
                    latent_end_id=self._facts.latent_end_id,
                    think_end=self._think_end(task),
                    explicit=self._settings.chain == "explicit",
                )
            except ConfigError as error:
                raise type(error)(f"problem {problem.uid}: chain {text[:80]!r}: {error}") from error

    def _encoded(self, name: str, problems: Sequence[Problem], texts: Sequence[str]) -> Iterator[np.ndarray]:
        try:
            found = self._encoder.encode(name, texts, special_tokens=False)
        except UnencodableText as error:
            raise ConfigError(
                f"problem {problems[error.index].uid}: the model's tokenizer cannot encode {error.text[:80]!r} of its "
                f"chain of thought or visible text ({error.reason}); use a model whose tokenizer knows these texts"
            ) from error
        return (found[i] for i in range(len(found)))

    def _think_end(self, task: PreparedTask) -> str:
        return task.renderer.config.think_end

    def _visible(self, task: PreparedTask, problem: Problem) -> str:
        return visible_text(problem.answer, self._think_end(task), problem.solution)

    def rows(self, task: PreparedTask, problems: Sequence[Problem]) -> list[SFTRow]:
        """Returns the problems' training rows, with uniform labels; texts that are new are encoded together."""
        pairs = zip(self.encoded(task, problems), task.all_prompt_ids(problems), strict=True)
        return [chain.row(prompt, c=self._settings.compression, k=self._config.k) for chain, prompt in pairs]

    def fault(self, task: PreparedTask, problem: Problem) -> str | None:
        """Returns the reason why a stored problem cannot be used for training, or None if it can.

        A solution without a box would teach answers that no verifier reads.
        """
        try:
            (chain,) = self.encoded(task, [problem])
        except NoChain:
            return NO_CHAIN
        except ChainTooShort:
            return TOO_SHORT
        if problem.solution and extract(problem.solution).content is None:
            return NO_BOX
        return TOO_LONG if chain.steps(self._settings.compression) > task.source.config.max_response_tokens else None


@dataclass(frozen=True, slots=True)
class SFTData:
    """Training rows, and held-out problems that are never among them."""

    stream: PromptStream
    tasks: list[PreparedTask]
    held_out: list[tuple[PreparedTask, Problem]]
    chains: Chains
    without_chain: list[PreparedTask]
    held_out_prompts: list[np.ndarray]  # [P] int32 each: their prompts, which every evaluation asks
    _made: dict[tuple[int, int], list[SFTRow]] = field(default_factory=dict)  # by (step, count): checked, not used yet

    @property
    def dropped(self) -> dict[str, dict[str, int | None]]:
        """Task -> reason -> how many of its rows are not used; None for all rows of an endless task."""
        found: dict[str, dict[str, int | None]] = {
            task.name: {why: len(rows) for why, rows in task.source.dropped.items() if why != HELD_OUT}
            for task in self.tasks
        }
        found |= {task.name: {NO_CHAIN: task.source.size} for task in self.without_chain}
        return {name: reasons for name, reasons in found.items() if reasons}

    @property
    def summaries(self) -> list[str]:
        """One line per task, in yellow where rows are not used."""
        dropped = self.dropped
        lines = {task.name: f"Latent-SFT on {task.summary}" for task in self.tasks}
        lines |= {task.name: f"Latent-SFT leaves out {task.name}: {NO_CHAIN}" for task in self.without_chain}
        return [f"[yellow]{line}[/]" if name in dropped else line for name, line in lines.items()]

    def row(self, task: PreparedTask, problem: Problem) -> SFTRow:
        """Returns a problem's training row."""
        (row,) = self.chains.rows(task, [problem])
        return row

    def rows(self, step: int, count: int) -> list[SFTRow]:
        """Returns the `count` rows of step `step` (from 0), which depend on nothing else."""
        made = self._made.pop((step, count), None)
        if made is not None:
            return made
        ordinals = range(step * count, (step + 1) * count)
        found: dict[int, SFTRow] = {}
        for task, drawn in self.stream.draws(ordinals):
            rows = self.chains.rows(self.tasks[task], [draw.problem for draw in drawn.values()])
            found |= zip(drawn, rows, strict=True)
        return [found[ordinal] for ordinal in ordinals]

    def check(self, count: int) -> None:
        """Makes the first rows now, since a generated task cannot drop problems later. Raises ConfigError."""
        self._made[0, count] = self.rows(0, count)


def prepare_sft(config: RunConfig, tasks: list[PreparedTask], encoder: TextEncoder, facts: TokenFacts) -> SFTData:
    """Splits the tasks that have a chain of thought. Raises ConfigError if none has, or where a first row fails."""
    settings, chains = config.latent_sft, Chains(config, encoder, facts)
    found: list[PreparedTask] = []
    without: list[PreparedTask] = []
    for task in tasks:
        (found if has_chain(task.source) else without).append(task)
    if not found:
        raise ConfigError(
            "warm_start needs an explicit chain of thought, but no training task has one; set the task's columns.cot, "
            "or start from a model that already thinks in latent steps (model.path, and no warm_start)"
        )
    share = -(-settings.evaluation_problems // len(found))
    training: list[PreparedTask] = []
    held_out: list[tuple[PreparedTask, Problem]] = []
    prompts: list[np.ndarray] = []
    for task in found:
        rest, problems = _split(task, share, config, chains)
        training.append(rest)
        held_out += [(task, problem) for problem in problems]
        prompts += task.all_prompt_ids(problems)
    stream = PromptStream(
        [task.source for task in training], [task.source.config.weight for task in training], config.seed
    )
    data = SFTData(stream, training, held_out, chains, without, prompts)
    data.check(settings.batch_size)
    return data


def _chain_text(problem: Problem, think_end: str) -> str:
    """Returns a problem's chain without the end of thinking, which the row adds and which would end the chain early.

    Raises :class:`NoChain` where no other text is left.
    """
    text = problem.cot.replace(think_end, "") if think_end else problem.cot
    if not text.strip():
        raise NoChain(
            f"Latent-SFT needs an explicit chain of thought, got {problem.cot!r}; set the task's columns.cot or leave "
            "the problem out"
        )
    return text


def has_chain(source: TaskSource) -> bool:
    """Whether any problem has a chain of thought; a generated task is judged by its first problem."""
    inspected = source.size if isinstance(source, StoredTask) else 1
    return any(source.problem(i).cot.strip() for i in range(inspected))


def _split(task: PreparedTask, count: int, config: RunConfig, chains: Chains) -> tuple[PreparedTask, list[Problem]]:
    """Splits a task into what to train on and up to `count` held-out problems.

    A generated task holds out its other split, a stored task its last problems. A stored task's unusable problems are
    dropped and counted; a generated task cannot drop any.
    """
    source = task.source
    if not isinstance(source, StoredTask):
        options = {**source.config.options, "split": "evaluation", "seed": config.seed + HELD_OUT_SEED, "size": count}
        other = load_task(source.config.model_copy(update={"options": options}), config.seed)
        return task, [other.problem(i) for i in range(other.size or count)]
    chains.read(task, source)
    problems = (source.problem(i) for i in range(source.size))
    faults = {problem.uid: chains.fault(task, problem) for problem in problems}
    _check_boxes(source, sum(fault == NO_BOX for fault in faults.values()))
    for reason in (NO_CHAIN, TOO_SHORT, NO_BOX, TOO_LONG):
        faulty = {uid for uid, fault in faults.items() if fault == reason}
        source = source.filtered(partial(_is_not_of, faulty), reason)
    _check_lengths(source, config.latent_sft.compression)
    count = min(count, max(int(source.size * HELD_OUT_SHARE), 1))
    if source.size <= count:
        raise TaskError(
            f"task {task.name}: {source.size} usable problem(s) are too few for Latent-SFT, which holds out {count} "
            "to measure pass@1; give the task more problems"
        )
    held_out = [source.problem(i) for i in range(source.size - count, source.size)]
    names = {problem.uid for problem in held_out}
    rest = source.filtered(partial(_is_not_of, names), HELD_OUT, faulty=False)
    return dataclasses.replace(task, source=rest), held_out


def _is_not_of(uids: set[str], problem: Problem) -> bool:
    return problem.uid not in uids


def _check_boxes(source: StoredTask, without: int) -> None:
    """Raises TaskError where most of a task's solutions have no boxed answer, `without` of them."""
    solutions = sum(bool(source.problem(i).solution) for i in range(source.size))
    if without > MOST_DROPPED * solutions:
        raise TaskError(
            f"task {source.config.name}: {without:,} of {solutions:,} solutions have no \\boxed{{}} answer, so a model "
            "that learned them would give none; at most half may have none. Set columns.solution to a column whose "
            "texts end with the box, or to null to train the boxed answer alone"
        )


def _check_lengths(source: StoredTask, compression: int) -> None:
    """Raises TaskError where most of a task's chains were dropped for their length."""
    short, long = (len(source.dropped.get(reason, ())) for reason in (TOO_SHORT, TOO_LONG))
    chains, budget = source.size + short + long, source.config.max_response_tokens
    if short + long > MOST_DROPPED * chains:
        raise TaskError(
            f"task {source.config.name}: {short + long:,} of {chains:,} rows with a chain of thought would be dropped "
            f"for its length; at most half may be: {short:,} are shorter than warm_start.compression ({compression} "
            f"tokens), {long:,} do not fit into max_response_tokens ({budget}). Lower warm_start.compression for "
            "short chains, raise the task's max_response_tokens for long ones, or give a file of the rows that fit"
        )
