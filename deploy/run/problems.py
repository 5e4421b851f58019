"""Turns a run's tasks into the requests that workers generate: one group for every place in the prompt order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from latent_grpo.common.config import ConfigError, RunConfig, TaskConfig
from latent_grpo.common.config.conflicts import changed
from latent_grpo.common.config.monitoring_and_checkpoints import EvaluationProtocol
from latent_grpo.common.encoding import TextEncoder
from latent_grpo.common.prompts import EncodedPrompts, PromptRenderer, repeated_sentences
from latent_grpo.common.tasks.benchmarks import (
    BENCHMARKS,
    CHOICE_PROMPT,
    prompt_of,
    prompt_of_messages,
    reference_rules,
)
from latent_grpo.common.tasks.generator import PREFIX
from latent_grpo.common.tasks.sources import (
    EMPTY_ANSWER,
    EMPTY_PROBLEM,
    UNREADABLE_ANSWER,
    PromptStream,
    StoredTask,
    TaskError,
    TaskSource,
    describe_dropped,
    is_generated,
    load_task,
)
from latent_grpo.common.types import GroupRequest, NoiseMode, Problem, Purpose, SamplingSettings
from latent_grpo.deploy.run.findings import notes
from latent_grpo.reward.answers import gold_is_parsable
from latent_grpo.reward.extraction import extract
from latent_grpo.rollout_workers.verifiers import build_verifier, code_of

if TYPE_CHECKING:
    import numpy as np

Protocols = tuple[EvaluationProtocol, ...]
LAST_TOKENS = 4  # of a prompt, which are shown one by one
TOO_LONG = "prompt over max_prompt_tokens"


@dataclass(frozen=True, slots=True)
class PreparedTask:
    """A task whose problems all have an encoded prompt that fits; dropped ones are counted in `source.dropped`."""

    source: TaskSource
    renderer: PromptRenderer
    longest_prompt: int = 0  # tokens; for a generated task, max_prompt_tokens
    prompts: EncodedPrompts | None = None  # of a stored task's problems
    protocols: Protocols = ("ours",)  # by which an evaluation measures it

    @property
    def name(self) -> str:
        return self.source.config.name

    @property
    def summary(self) -> str:
        """The task's size and what was dropped, in a line."""
        return describe(self.source)

    def first_prompt(self) -> tuple[str, list[str]]:
        """Returns the first problem's prompt in full, after a line about its tokens, and warnings about it."""
        problem = self.source.problem(0)
        ids, text = self.prompt_ids(problem), self.renderer.render(problem)
        last = " ".join(repr(self.renderer.tokenizer.decode([i])) for i in ids[-LAST_TOKENS:].tolist())
        warnings = [
            f"task {self.name}: its prompt says twice: {sentence!r}; look at model.prompt and tasks.N.prompt"
            for sentence in repeated_sentences(text)
        ]
        config = self.source.config
        rules = reference_rules(self.name) if self.protocols == ("reference",) else None
        asked = [line for line in ((rules and rules.prompt) or CHOICE_PROMPT).user.split("\n") if line != "{problem}"]
        if config.verifier == "choice" and not problem.whole and not any(line in text for line in asked):
            warnings.append(
                f"task {self.name}: verifier choice grades a letter, and its prompt does not ask for one as the "
                f"benchmark's does ({asked[0]!r}); say it in tasks.N.prompt.user"
            )
        known = reference_rules(self.name)
        if problem.whole and "ours" in self.protocols and known is not None and known.prompt is not None:
            warnings.append(
                f"task {self.name}: the rows of {config.path} bring whole prompts, so figures by the protocol ours are "
                "of the file's prompt, not of this project's; a file with the raw columns gives those"
            )
        return f"{len(ids)} tokens, the last of them {last}:\n{text}", warnings

    def prompt_ids(self, problem: Problem) -> np.ndarray:
        """Returns the prompt's token ids, int32 [P]. Raises TaskError for a generated problem that is too long."""
        (ids,) = self.all_prompt_ids([problem])
        return ids

    def all_prompt_ids(self, problems: Sequence[Problem]) -> list[np.ndarray]:
        """Returns :meth:`prompt_ids` of each problem; those of a generated task are encoded together."""
        prompts = self.renderer.encode_all(problems) if self.prompts is None else self.prompts
        found, limit = [prompts[problem.uid] for problem in problems], self.source.config.max_prompt_tokens
        for problem, ids in zip(problems, found, strict=True):
            if len(ids) > limit:
                raise TaskError(
                    f"task {self.name}: the prompt of {problem.uid} has {len(ids)} tokens, max_prompt_tokens is "
                    f"{limit}; raise max_prompt_tokens (a generated task cannot drop problems)"
                )
        return found


def renderer_of(
    task: TaskConfig, config: RunConfig, encoder: TextEncoder, protocol: EvaluationProtocol = "ours"
) -> PromptRenderer:
    """Returns the renderer of a task's prompts."""
    prompt, date = config.model.prompt, config.model.date_string
    plain, whole = prompt_of(task, prompt, protocol), prompt_of_messages(task, prompt)
    try:
        return PromptRenderer(encoder.tokenizer, plain, whole, rows=encoder.rows, date=date)
    except ConfigError as error:
        raise ConfigError(f"task {task.name}: {error}") from error


def prepare_task(
    source: TaskSource, config: RunConfig, encoder: TextEncoder, protocols: Protocols = ("ours",)
) -> PreparedTask:
    """Encodes a task's prompts; prompts of a stored task that are too long are dropped and counted.

    Raises TaskError when nothing is left.
    """
    renderer = renderer_of(source.config, config, encoder, protocols[0])
    limit = source.config.max_prompt_tokens
    if not isinstance(source, StoredTask):
        return PreparedTask(source, renderer, limit, protocols=protocols)
    name = f"the prompts of {source.config.name}"
    prompts = renderer.encode_all([source.problem(i) for i in range(source.size)], encoder, name)
    fitting = source.filtered(lambda problem: len(prompts[problem.uid]) <= limit, TOO_LONG)
    fitting.check_dropped()
    longest = int(prompts.lengths[prompts.lengths <= limit].max())
    return PreparedTask(fitting, renderer, longest, prompts, protocols)


def protocols_of(task: TaskConfig, config: RunConfig) -> list[Protocols]:
    """Returns the protocols by which an evaluation measures a task, those together that ask it the same prompts.

    Raises TaskError for the protocol `reference` alone and a task that it does not know, or other repetitions than its
    own, and where a worker cannot hold those; with both protocols a task that it does not know is measured by this
    project's.
    """
    wanted, rules = config.evaluation.protocols, reference_rules(task.name)
    if rules is None:
        if "ours" not in wanted:
            raise TaskError(
                f"evaluation task {task.name}: evaluation.protocol reference measures {', '.join(BENCHMARKS)} alone; "
                "leave the task out, or set evaluation.protocol to ours or both"
            )
        return [("ours",)]
    if wanted == ("reference",) and changed(config.evaluation, "runs"):
        raise TaskError(
            f"evaluation.runs ({config.evaluation.runs}) has no effect with evaluation.protocol reference, which has "
            "its own number of repetitions for each benchmark; remove it, or, where a profile sets it, set it back to "
            f"{type(config.evaluation).model_fields['runs'].default}"
        )
    if "reference" in wanted and rules.runs > config.rollout.max_rows:
        raise TaskError(
            f"evaluation task {task.name}: rollout.max_rows ({config.rollout.max_rows}) is smaller than the "
            f"{rules.runs} repetitions of evaluation.protocol reference, and a group is decoded as a whole; raise it"
        )
    return [wanted] if rules.prompt is None else [(protocol,) for protocol in wanted]


def read_task(
    task: TaskConfig,
    config: RunConfig,
    *,
    whole: bool = False,
    protocol: EvaluationProtocol = "ours",
    left_out: Collection[str] = (),
) -> TaskSource:
    """Loads a task and drops, with a count, the rows that are empty or that its verifier cannot grade.

    A `whole` task is an evaluation's and must not lack a row. A verifier that needs an import path of `left_out` is
    not asked. Raises TaskError when nothing is left, and for a `whole` task that is endless or that has such rows.
    """
    gradable: Callable[[str], bool] | None = None
    if code_of(config, task.verifier).isdisjoint(left_out):
        gradable = partial(gold_is_parsable, build_verifier(config, task.verifier))
    source = load_task(task, config.seed, gradable, lambda text: extract(text).content, protocol)
    if whole:
        _check_whole(source)
    if isinstance(source, StoredTask):
        source.check_dropped()
    return source


def _check_whole(source: TaskSource) -> None:
    """Raises TaskError for an evaluation task that is endless, or that lacks problems or answers.

    The rows that remain would be another benchmark.
    """
    if source.size is None:
        raise TaskError(f"evaluation task {source.config.name} is endless; set its options.size, or its limit")
    faults = (EMPTY_PROBLEM, EMPTY_ANSWER, UNREADABLE_ANSWER)
    faulty = {reason: source.dropped[reason] for reason in faults if reason in source.dropped}
    if faulty:
        config, found = source.config, describe_dropped(faulty, examples_of(source)).removeprefix("dropped ")
        raise TaskError(
            f"evaluation task {config.name}: {config.path} has rows that cannot be graded with verifier "
            f"{config.verifier!r} ({found}), and figures for the other rows would not be this benchmark's. Correct the "
            "file, set columns.answer, or give a file of good rows"
        )


def is_read(task: TaskConfig, stored: bool, left_out: Collection[str]) -> bool:
    """Whether a check reads the task: not its file without `stored`, and no generator of the paths `left_out`."""
    if not is_generated(task):
        return stored
    return (task.path or "").removeprefix(PREFIX) not in left_out


@dataclass(frozen=True, slots=True)
class Sources:
    """The problems of a run as its files and generators hold them, before a tokenizer encodes them."""

    training: list[TaskSource]
    evaluation: list[TaskSource]  # the same list as `training` for an evaluation alone, whose files are read once
    protocols: list[Protocols]  # of each of `evaluation`

    @classmethod
    def read(cls, config: RunConfig, *, stored: bool = True, left_out: Collection[str] = ()) -> Sources:
        """Reads every task once; without `stored` only the generated ones. Raises TaskError.

        Generators and verifiers of the import paths `left_out` are not imported: tasks of the former are not read.
        """
        by_task = [(task, protocols_of(task, config)) for task in config.evaluation.tasks]
        wanted = [(task, by) for task, by in by_task if is_read(task, stored, left_out)]
        asked = [(task, protocols) for task, by in wanted for protocols in by]
        evaluation = [
            read_task(task, config, whole=True, protocol=protocols[0], left_out=left_out) for task, protocols in asked
        ]
        by = [protocols for _, protocols in asked]
        if config.tasks == config.evaluation.tasks:
            return cls(evaluation, evaluation, by)
        training = [task for task in config.tasks if is_read(task, stored, left_out)]
        return cls([read_task(task, config, left_out=left_out) for task in training], evaluation, by)

    def prepared(self, config: RunConfig, encoder: TextEncoder) -> Tasks:
        """Encodes the tasks' prompts. Raises TaskError."""
        asked = zip(self.evaluation, self.protocols, strict=True)
        evaluation = [prepare_task(source, config, encoder, protocols) for source, protocols in asked]
        if self.training is self.evaluation:
            return Tasks(evaluation, evaluation)
        return Tasks([prepare_task(source, config, encoder) for source in self.training], evaluation)


def describe(source: TaskSource) -> str:
    """`gsm8k: 7,473 problems; dropped 1 empty answer (row 4)`."""
    plural = "" if source.size == 1 else "s"
    size = "generated without end" if source.size is None else f"{source.size:,} problem{plural}"
    dropped = describe_dropped(source.dropped, examples_of(source))
    return f"{source.config.name}: {size}" + (f"; {dropped}" if dropped else "")


def examples_of(source: TaskSource) -> dict[str, str]:
    """What is shown of a task's dropped rows, by reason."""
    return source.examples if isinstance(source, StoredTask) else {}


class Tasks(NamedTuple):
    """The tasks of :class:`Sources` with their encoded prompts."""

    training: list[PreparedTask]
    evaluation: list[PreparedTask]


class Problems:
    """The run's prompts: the endless training order and the evaluation sets."""

    def __init__(self, config: RunConfig, tasks: Tasks) -> None:
        self.config = config
        self.training, self.evaluation = tasks
        weights = [task.source.config.weight for task in self.training]
        self._stream = PromptStream([task.source for task in self.training], weights, config.seed)

    @property
    def summaries(self) -> list[str]:
        """A line per task, and what is odd about their rows."""
        learned = [] if self.training is self.evaluation else self.training
        training, evaluation = ([task.source for task in tasks] for tasks in (learned, self.evaluation))
        return [
            *(f"training {t.summary}" for t in learned),
            *(f"evaluation {t.summary}" for t in self.evaluation),
            *notes(training, evaluation, partial(build_verifier, self.config)),
        ]

    @property
    def dropped(self) -> list[str]:
        """One line for each task that had to drop problems, with counts and reasons."""
        tasks = {
            task.name: describe_dropped(task.source.dropped, examples_of(task.source))
            for task in (*self.training, *self.evaluation)
        }
        return [f"{name}: {found}" for name, found in tasks.items() if found]

    def first_prompts(self) -> list[tuple[str, str, list[str]]]:
        """Returns each task's :meth:`PreparedTask.first_prompt`; one for tasks that are equal in it."""
        found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        tasks = self.evaluation if self.training is self.evaluation else [*self.training, *self.evaluation]
        for task in tasks:
            text, warnings = task.first_prompt()
            found.setdefault((text, tuple(warnings)), []).append(task.name)
        return [(", ".join(dict.fromkeys(names)), text, list(warnings)) for (text, warnings), names in found.items()]

    def requests(self, ordinals: Sequence[int], purpose: Purpose = "training") -> list[GroupRequest]:
        """Returns the groups at places of the training order."""
        found: dict[int, GroupRequest] = {}
        for task, drawn in self._stream.draws(ordinals):
            prompts = self.training[task].all_prompt_ids([draw.problem for draw in drawn.values()])
            for (ordinal, draw), prompt_ids in zip(drawn.items(), prompts, strict=True):
                found[ordinal] = group_request(
                    self.config,
                    self.training[task],
                    draw.problem,
                    samples=self.config.group_size,
                    purpose=purpose,
                    uid=f"{purpose}/{ordinal}/{draw.problem.uid}",
                    epoch=draw.epoch,
                    prompt_ids=prompt_ids,
                )
        return [found[ordinal] for ordinal in ordinals]


def group_request(
    config: RunConfig,
    task: PreparedTask,
    problem: Problem,
    *,
    samples: int,
    purpose: Purpose,
    uid: str,
    epoch: int = 0,
    noise: NoiseMode | None = None,
    sampling: SamplingSettings | None = None,
    verifier: str | None = None,
    prompt_ids: np.ndarray | None = None,
) -> GroupRequest:
    """Returns the request for a group of `samples` of one problem, whose prompt may be encoded already.

    Without `sampling` it is the run's, with `noise` instead of its own mode if given; without `verifier` the task's.
    """
    return GroupRequest(
        group_uid=uid,
        problem_uid=problem.uid,
        task=task.name,
        prompt_ids=task.prompt_ids(problem) if prompt_ids is None else prompt_ids,
        sample_indices=tuple(range(samples)),
        sampling=sampling or sampling_settings(config, task.source.config.max_response_tokens, noise),
        purpose=purpose,
        epoch=epoch,
        run_seed=config.seed,
        verifier=verifier or task.source.config.verifier,
        gold_answer=problem.answer,
    )


def sampling_settings(config: RunConfig, max_tokens: int, noise: NoiseMode | None = None) -> SamplingSettings:
    """Returns a group's sampling settings: the run's, with `noise` instead of its own mode if given (METHOD §8)."""
    return SamplingSettings(
        mode="latent" if config.latent else "visible",
        max_tokens=max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        k=config.k,
        tau=config.tau,
        noise_mode=noise or config.objective.noise_mode,
        noise_scale=config.noise.scale,
        latent_exit=config.latent_exit,
    )
