"""The preparation of a run: model, problems and engine are read once and checked before anything starts.

`train`, `sft`, `evaluate`, `--resume` and the units of a suite call :func:`prepare`; `validate` and the check of a
suite call :func:`check`, which also serves a run that may start on another machine. All of them report a fault in the
same words, before a folder, a Ray session or a model exists.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from latent_grpo.common.config import ConfigError, LoRAConfig, RunConfig
from latent_grpo.common.encoding import TextEncoder
from latent_grpo.common.files import save_whole
from latent_grpo.common.model_chain import CHAIN_FILE, ChainSettings, check_chain, read_chain
from latent_grpo.common.model_check import check_model, empty_model, read_settings
from latent_grpo.common.model_limits import Window, window_of
from latent_grpo.common.models import extended_limit, make_model, make_tokenizer, position_limit, save_model
from latent_grpo.common.prompts import (
    beyond_sentence,
    check_think_start,
    check_width,
    foreign_sentences,
    read_tokens,
    resolve_tokens,
)
from latent_grpo.common.secrets import literal_secrets
from latent_grpo.common.tasks.benchmarks import fetch_commands, how_to_get, known_files
from latent_grpo.common.tasks.sources import TaskSource, is_generated
from latent_grpo.common.tasks.tables import KNOWN, exists, source_files
from latent_grpo.common.types import TokenFacts
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.run.foreign_code import announced
from latent_grpo.deploy.run.machine import check_machine
from latent_grpo.deploy.run.problems import PreparedTask, Problems, Sources, is_read
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.sft_data import SFTData, has_chain, prepare_sft
from latent_grpo.learner.lora import linear_targets, missing_package
from latent_grpo.rollout_workers.engine_choice import choose_engine
from latent_grpo.rollout_workers.verifiers import check_verifiers
from latent_grpo.rollout_workers.vllm_plugin import support

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS_FOR_TOKENIZER = 20_000
LARGE_MIB = 2  # of a problem file, compressed: some 10,000 rows
NEW_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True, slots=True)
class InitialModel:
    """The model that a run starts from, as far as it is known without its weights."""

    source: str | Path | None  # a folder or hub id; None: a `model.new` that is still to be made
    tokenizer: PreTrainedTokenizerBase
    facts: TokenFacts
    chain: ChainSettings | None  # from the model's latent_chain.json, if it has one
    positions: int | None  # of the longest sequence that the run may use; None: its configuration states none
    warnings: tuple[str, ...] = ()
    window: Window | None = None  # of its attention; None: every layer attends to everything


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of :func:`check`. A part that is None or empty could not be read on this machine."""

    engine: str
    verifiers: dict[str, list[str]]  # kind -> names of the tasks that it grades
    sources: Sources  # the tasks that were read
    model: InitialModel | None  # None: a hub id, or a folder of another machine
    problems: Problems | None  # None: no training task was read, or there is no tokenizer for its prompts
    sft: SFTData | None  # None: there is no Latent-SFT to do, or none of its tasks was read


@dataclass(frozen=True, slots=True)
class Prepared:
    """The parts of a run, complete and checked."""

    model: InitialModel
    problems: Problems
    sft: SFTData | None  # None: there is no Latent-SFT to do

    @property
    def initial(self) -> str | Path:
        """The folder or hub id that workers load. Raises ConfigError before :meth:`placed` has made a new model."""
        if self.model.source is None:
            raise ConfigError("the run's new model is not made yet")
        return self.model.source

    def placed(self, folder: RunFolder, config: RunConfig, reporter: Reporter) -> Prepared:
        """The same parts with a model that workers can load: a `model.new` is made in the run's folder."""
        if self.model.source is not None or config.model.new is None:
            return self
        model = make_model(config.model.new, self.model.tokenizer, config.seed)
        reporter.say(f"made a new {config.model.new.architecture} of {model.num_parameters():,} parameters")
        target = _place_of_new(config, folder)
        save_whole(target, lambda unfinished: save_model(unfinished, model, self.model.tokenizer))
        return replace(self, model=replace(self.model, source=target))


def prepare(config: RunConfig, reporter: Reporter, folder: RunFolder | None = None) -> Prepared:
    """Reads and checks everything that a run on this machine needs; writes nothing. Raises ConfigError.

    Code that the settings name by import path is printed, then imported (`deploy.run.foreign_code`). `folder` is the
    run's, if it has one; its `model.new` or its finished Latent-SFT may be there already.
    """
    check_machine(config.deadlines.start_s)
    for line in announced(config):
        reporter.say(line)
    found = check(config, folder, reporter=reporter)
    if found.model is None or found.problems is None:
        raise ConfigError("the run has no model or no training problems")  # check() refuses both on this machine
    for warning in found.model.warnings:
        reporter.say(f"[yellow]{warning}[/]")
    for line in found.problems.summaries:
        reporter.say(line)
    for names, text, warnings in found.problems.first_prompts():
        reporter.say(f"first prompt of {names}, {text}")
        for warning in warnings:
            reporter.say(f"[yellow]{warning}[/]")
    return Prepared(found.model, found.problems, found.sft)


def check(
    config: RunConfig,
    folder: RunFolder | None = None,
    *,
    elsewhere: bool = False,
    stored: bool = True,
    left_out: Collection[str] = (),
    reporter: Reporter | None = None,
) -> Checked:
    """Checks everything that can be checked before a run starts. Raises ConfigError.

    With `elsewhere` the run may start on another machine, so a model or a vLLM that is missing here is not checked.
    Without `stored` only generated tasks are read, and no files. Import paths of `left_out` are not imported, and what
    needs them is not checked. `reporter` shows the progress where that takes long.
    """
    reporter = reporter or Reporter()
    if folder is None:  # an older run goes on as it is
        check_secrets(config)
    if stored:
        check_files(config)
    source = _place_of_initial(config, folder)
    warnings = check_model(source) if source is not None and (not elsewhere or Path(source).exists()) else []
    due = config.warm_start is not None and not _has_start(folder)
    trained_by_lora = config.lora is not None or (due and config.latent_sft.lora is not None)
    if not elsewhere and trained_by_lora:
        check_lora()
    if source is not None and Path(source).is_dir():
        check_targets(config, source)
    engine = check_engine(config, elsewhere=elsewhere)
    spare = folder is not None  # 0.1.0 started runs with verifiers that no task uses
    verifiers = check_verifiers(config, spare=spare, left_out=left_out)
    for line in large_files(config) if stored else []:
        reporter.say(line)
    sources = Sources.read(config, stored=stored, left_out=left_out)
    if elsewhere and config.model.source is not None and not Path(config.model.source).is_dir():
        return Checked(engine, verifiers, sources, None, None, None)
    first = sources.training[0] if is_read(config.tasks[0], stored, left_out) else None
    model = _read_model(config, folder, first, warnings)
    if config.model.new is not None and config.model.new.tokenizer == "bpe" and first is None:
        return Checked(engine, verifiers, sources, model, None, None)  # its tokens come from a file that was not read
    check_width(config, model.facts)
    check_think_start(config, model.tokenizer)
    encoder = TextEncoder(model.tokenizer, reporter.phase, reporter.say, rows=model.facts.vocab_size)
    tasks = sources.prepared(config, encoder)
    check_positions((*tasks.training, *tasks.evaluation), model.positions, model.source or "model.new")
    check_window(config, (*tasks.training, *tasks.evaluation), model)
    sft = None
    if due:
        complete = len(tasks.training) == len(config.tasks)
        if complete or any(has_chain(task.source) for task in tasks.training):
            sft = prepare_sft(config, tasks.training, encoder, model.facts)
    problems = Problems(config, tasks) if tasks.training else None
    return Checked(engine, verifiers, sources, model, problems, sft)


# --- the model ---------------------------------------------------------------------------------------------------


def _read_model(
    config: RunConfig, folder: RunFolder | None, first: TaskSource | None, warnings: Iterable[str] = ()
) -> InitialModel:
    """`first`: the first training task, which a new tokenizer is trained on; None: it was not read.

    `warnings` are those of the model's files.
    """
    new, source = config.model.new, _place_of_initial(config, folder)
    if source is None:
        if new is None:
            raise ConfigError("model: one of `path` and `new` must be given")
        tokenizer: PreTrainedTokenizerBase = make_tokenizer(new, _texts(config, first))
        nominal = new.tokenizer == "bpe" and first is None
        rows = new.vocab_size if nominal else len(tokenizer)
        facts = resolve_tokens(tokenizer, rows, config.latent, config.model.prompt.think_end)
        return InitialModel(None, tokenizer, facts, None, new.max_positions)
    tokenizer, facts = read_tokens(config, source)
    chain = read_chain(source)
    warnings = list(warnings)
    if (sentence := beyond_sentence(tokenizer, facts.vocab_size)) is not None:
        warnings.append(sentence)
    warnings += foreign_sentences(tokenizer, facts)
    if chain is not None:
        warnings += check_chain(chain, source, config, tokenizer)
    elif new is None and config.latent and config.warm_start is None:
        warnings.append(
            f"model {source} has no {CHAIN_FILE}, so k ({config.k}), tau ({config.tau:g}) and think_end "
            f"({config.model.prompt.think_end!r}) could not be checked; they must be those that it was trained with"
        )
    own, positions = position_limit(source), extended_limit(source, config.model.max_positions)
    if positions != own:
        warnings.append(
            f"model.max_positions: up to {positions:,} positions are used, model {source} states {own:,}; beyond those "
            "its rotary positions extrapolate"
        )
    window = window_of(read_settings(source))
    return InitialModel(source, tokenizer, facts, chain, positions, tuple(warnings), window)


def _place_of_initial(config: RunConfig, folder: RunFolder | None) -> str | Path | None:
    """The folder or hub id that the run starts from; None where the model is still to be made."""
    if config.model.new is None:
        return config.model.path
    made = None if folder is None else _place_of_new(config, folder)
    return made if made is not None and (made / "config.json").is_file() else None


def _place_of_new(config: RunConfig, folder: RunFolder) -> Path:
    return folder.base_model if config.warm_start is None else folder.path / "initial"


def _has_start(folder: RunFolder | None) -> bool:
    """Whether the run's Latent-SFT is done."""
    return folder is not None and (folder.base_model / "config.json").is_file()


def _texts(config: RunConfig, source: TaskSource | None) -> Iterator[str]:
    """Texts that a new model's tokenizer is trained on: the first task's problems, chains and answers."""
    if config.model.new is None or config.model.new.tokenizer != "bpe" or source is None:
        return
    for index in range(min(source.size or TEXTS_FOR_TOKENIZER, TEXTS_FOR_TOKENIZER)):
        problem = source.problem(index)
        yield from (content for _, content in problem.messages)
        yield problem.cot
        yield problem.solution or f"\\boxed{{{problem.answer}}}"


def check_positions(tasks: Iterable[PreparedTask], limit: int | None, model: str | Path) -> None:
    """Raises ConfigError where a task's longest prompt and response need more positions than the model's `limit`."""
    for task in tasks:
        budget = task.source.config.max_response_tokens
        if limit is not None and task.longest_prompt + budget > limit:
            room = limit - task.longest_prompt
            shorter = f"set its max_response_tokens to {room:,} or less, or " if room > 0 else ""
            raise ConfigError(
                f"task {task.name}: its longest prompt ({task.longest_prompt:,} tokens) and max_response_tokens "
                f"({budget:,}) need {task.longest_prompt + budget:,} positions, model {model} has {limit:,}; "
                f"{shorter}lower its max_prompt_tokens, or set model.max_positions, if the model's rotary positions "
                "are to extrapolate"
            )


def check_window(config: RunConfig, read: Iterable[PreparedTask], model: InitialModel) -> None:
    """Raises ConfigError where a task's longest prompt and response exceed the window of the model's attention.

    Of a task that was not `read`, only its response counts, and the longest prompt that it allows is not known.
    """
    window = model.window
    if window is None:
        return
    longest = {task.name: task.longest_prompt for task in read}
    for task in (*config.tasks, *config.evaluation.tasks):
        prompt = longest.get(task.name, 0)
        if prompt + task.max_response_tokens > window.steps:
            raise ConfigError(
                f"task {task.name}: its longest prompt ({prompt:,} tokens) and max_response_tokens "
                f"({task.max_response_tokens:,}) exceed the window of model {model.source}: {window.why}, and engine "
                "and learner attend to everything before a token; lower the task's max_prompt_tokens and "
                "max_response_tokens, or use a model without a window"
            )


# --- files and engine --------------------------------------------------------------------------------------------


def check_secrets(config: RunConfig) -> None:
    """Raises ConfigError where a setting holds a secret, which config.json, workers and job servers would show."""
    if found := literal_secrets(config.model_dump(mode="json")):
        raise ConfigError(
            f"{', '.join(found)}: a secret does not belong into settings, which config.json and every worker "
            "show; keep it in an environment variable (on a cluster: submit --env NAME), which your code reads"
        )


def check_files(config: RunConfig) -> None:
    """Raises :class:`common.errors.ConfigError` with a line for every problem file that does not exist."""
    if faults := file_faults(config):
        raise ConfigError(*faults)


def large_files(config: RunConfig) -> list[str]:
    """Returns a line for each problem file that takes long to read, about 10 s for 100,000 rows."""
    paths = dict.fromkeys(task.path for task in (*config.tasks, *config.evaluation.tasks) if task.path)
    here = [path for path in paths if exists(path)]
    sizes = [(path, sum(file.stat().st_size for file in source_files(path)) / 2**20) for path in here]
    return [f"reading {path} ({size:,.0f} MiB)" for path, size in sizes if size >= LARGE_MIB]


def check_lora(problem: Callable[[], str | None] = missing_package) -> None:
    """Raises ConfigError where LoRA's package is not installed."""
    if (sentence := problem()) is not None:
        raise ConfigError(sentence)


def check_targets(config: RunConfig, source: str | Path) -> None:
    """Raises ConfigError where LoRA is to train layers that the model, a folder, does not have."""
    for lora in (config.lora, config.warm_start and config.warm_start.lora):
        if isinstance(lora, LoRAConfig) and lora.targets is not None:
            linear_targets(empty_model(read_settings(source), source), lora, config.model.train_layers)


def file_faults(config: RunConfig) -> list[str]:
    """Returns a sentence for every task whose problem file does not exist, after the commands that fetch the files.

    The hub is not queried.
    """
    faults: list[str] = []
    missing: list[tuple[str, Path]] = []  # name and folder
    for task in [*config.tasks, *config.evaluation.tasks]:
        path = task.path
        if path is None:
            faults.append(f"task {task.name}: set its `path` ({KNOWN}, hf:..., builtin:... or python:...)")
        elif not is_generated(task) and not path.startswith("hf:") and not exists(path):
            file, names = Path(path), known_files(task.name)
            missing.append((task.name, file.parent))
            others = ", ".join(name for name in names if name != file.name) if file.name in names else ""
            faults.append(
                f"task {task.name}: {path} does not exist{f' (nor, beside it, {others})' if others else ''}; set its "
                f"`path` to {KNOWN}{how_to_get(task.name)}"
            )
    return [*fetch_commands(missing), *faults]


def check_engine(
    config: RunConfig, *, elsewhere: bool = False, installed: Callable[[], tuple[str, str] | None] = support.installed
) -> str:
    """Returns a description of the rollout engine. Raises ConfigError where the vLLM engine could not serve this run.

    With `elsewhere` a vLLM that is not installed on this machine is reported, not refused. `installed` returns its
    build and version.
    """
    choice = choose_engine(config)
    if choice.name != "vllm":
        return choice.sentence
    found = installed()
    if problem := support.argument_problem(config.rollout.vllm.engine_args):
        raise ConfigError(problem)
    if found is None and elsewhere:
        return "vllm; not installed on this machine: its version and the model were not checked"
    if (problem := support.vllm_problem(found)) or found is None:
        raise ConfigError(problem or "vllm is not installed")
    new, shape, note = config.model.new, None, ""
    if new is not None:
        name = NEW_ARCHITECTURES.get(new.architecture, new.architecture)
        shape = {"architectures": [name], "hidden_size": new.hidden_size, "num_attention_heads": new.num_heads}
    elif (settings := Path(config.model.path or "") / "config.json").is_file():
        shape = json.loads(settings.read_text(encoding="utf-8"))
    else:
        note = "; the model is not a folder on this machine and was not checked"
    if shape is not None and (problem := support.model_problem(shape, found[0])):
        raise ConfigError(problem)
    return f"vllm {found[1]}, {found[0]} build{note}"
