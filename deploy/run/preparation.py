"""What a run is made of, read once and checked before anything is started for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.common.files import save_whole
from latent_grpo.common.model_chain import CHAIN_FILE, ChainSettings, check_chain, read_chain
from latent_grpo.common.models import (
    load_tokenizer,
    make_model,
    make_tokenizer,
    output_facts,
    position_limit,
    save_model,
)
from latent_grpo.common.prompts import check_think_start, check_width, resolve_tokens
from latent_grpo.common.tasks.benchmarks import how_to_get
from latent_grpo.common.tasks.sources import load_task
from latent_grpo.common.types import TokenFacts
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.run.problems import PreparedTask, Problems
from latent_grpo.deploy.run.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TEXTS_FOR_TOKENIZER = 20_000


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


def check_files(config: RunConfig) -> None:
    """Raises :class:`common.config.ConfigError` with a line for every problem file that is named and not there."""
    if faults := file_faults(config):
        raise ConfigError("\n".join(faults))


def file_faults(config: RunConfig) -> list[str]:
    """One sentence for every task whose problems are not there; the hub is not asked."""
    faults = []
    for task in [*config.tasks, *config.evaluation.tasks]:
        path = task.path
        if path is None:
            faults.append(f"task {task.name}: set its `path` (.parquet, .jsonl, .csv, hf:... or builtin:...)")
        elif not path.startswith(("hf:", "builtin:")) and not Path(path).is_file():
            faults.append(
                f"task {task.name}: {path} does not exist; set its `path` to a .parquet, .jsonl or .csv file"
                f"{how_to_get(task.name)}"
            )
    return faults


def check_before_start(config: RunConfig) -> None:
    """What `validate` refuses of a run that is to start here, before a folder, a Ray or a model is made for it."""
    check_files(config)
    engine_rows(config)
    token_rows(config)


def token_rows(config: RunConfig) -> list[tuple[str, str]]:
    """(what, found) of the tokenizer: vocabulary, end of thinking, EOS, a rendered prompt.

    Raises ConfigError where the run could not start: k over the vocabulary, no token for the end of thinking, no EOS,
    generated chains that fill no latent step. A model that is not on this machine is not looked for; the rows say so.
    """
    from latent_grpo.common.model_chain import check_chain, read_chain
    from latent_grpo.common.models import load_tokenizer, make_tokenizer, output_facts
    from latent_grpo.common.prompts import PromptRenderer, check_think_start, check_width, resolve_tokens
    from latent_grpo.common.tasks.benchmarks import with_benchmark_defaults
    from latent_grpo.common.types import Problem

    new = config.model.new
    if new is None and not Path(config.model.path).is_dir():
        return [("tokenizer", f"not checked: {config.model.path} is not a folder on this machine")]
    if new is not None:
        tokenizer = make_tokenizer(new)
        vocab_size, eos_ids = len(tokenizer) if new.tokenizer == "arithmetic" else new.vocab_size, ()
    else:
        tokenizer = load_tokenizer(config.model.path)
        vocab_size, eos_ids = output_facts(config.model.path)
    facts = resolve_tokens(tokenizer, vocab_size, config.latent, config.model.prompt.think_end, eos_ids)
    if new is None or new.tokenizer != "bpe":  # that one's tokens come from the task's text
        check_width(config, facts)
        check_think_start(config, tokenizer)
        check_generated_chains(config, tokenizer, facts)
    chain = None if new is not None else read_chain(config.model.path)
    warnings = [] if chain is None else check_chain(chain, config.model.path, config, tokenizer)
    problem = Problem(uid="0", task="", messages=(("user", "(problem)"),), answer="")
    prompts: dict[str, list[str]] = {}  # text -> tasks that are asked with it
    for task in (*config.tasks, *config.evaluation.tasks):
        prompt = with_benchmark_defaults(task).prompt or config.model.prompt
        prompts.setdefault(PromptRenderer(tokenizer, prompt).render(problem), []).append(task.name)
    end = facts.latent_end_id
    pad = " (an EOS id; masks are made from lengths)" if facts.pad_id in facts.eos_ids else ""
    return [
        ("vocabulary", f"{vocab_size:,} rows, {int(facts.allowed.sum()):,} of them tokens"),
        ("latent-end token", "none" if end is None else f"{end} ({tokenizer.decode([end])!r})"),
        ("end of sequence, padding", f"{', '.join(map(str, facts.eos_ids))}; {facts.pad_id}{pad}"),
        *((f"rendered prompt of {', '.join(dict.fromkeys(names))}", repr(text)) for text, names in prompts.items()),
        ("the model's chain", chain.describe() if chain else "not said by the model (no latent_chain.json)"),
        *(("warning", line) for line in warnings),
    ]


def check_generated_chains(config: RunConfig, tokenizer: PreTrainedTokenizerBase, facts: TokenFacts) -> None:
    """Raises ConfigError where a first batch of a generated task has a chain that Latent-SFT cannot learn from: such a
    task can drop no problem. A stored one drops them, with a count, when it is read."""
    from latent_grpo.common.tasks.sources import load_task
    from latent_grpo.learner.sft.rows import make_row

    settings = config.warm_start
    if settings is None or settings.chain == "explicit":
        return
    for task in config.tasks:
        if task.path is None or not task.path.startswith("builtin:"):
            continue
        source = load_task(task, config.seed)
        think_end = (source.config.prompt or config.model.prompt).think_end
        for index in range(min(settings.batch_size, source.size or settings.batch_size)):
            problem = source.problem(index)
            options = {"c": settings.compression, "k": config.k, "latent_end_id": facts.latent_end_id}
            try:
                make_row(tokenizer, [], problem.cot, problem.answer, think_end=think_end, **options)
            except ConfigError as error:
                raise type(error)(f"problem {problem.uid}: {error}") from error


NEW_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def engine_rows(config: RunConfig, *, runs_here: bool = True) -> list[tuple[str, str]]:
    """(what, found) of the rollout engine. Raises ConfigError where the vLLM engine could not serve this run.

    `runs_here` False: a cluster is to run it, so a vLLM that is not installed on this machine is said, not refused.
    """
    import json

    from latent_grpo.rollout_workers.vllm_plugin import support

    if config.rollout.engine != "vllm":
        return [("rollout engine", config.rollout.engine)]
    found = support.installed()
    if problem := support.argument_problem(config.rollout.vllm.engine_args):
        raise ConfigError(problem)
    if found is None and not runs_here:
        return [("rollout engine", "vllm; not installed on this machine: its version and the model were not checked")]
    if problem := support.vllm_problem(found):
        raise ConfigError(problem)
    new, shape, note = config.model.new, None, ""
    if new is not None:
        name = NEW_ARCHITECTURES.get(new.architecture, new.architecture)
        shape = {"architectures": [name], "hidden_size": new.hidden_size, "num_attention_heads": new.num_heads}
    elif (settings := Path(config.model.path) / "config.json").is_file():
        shape = json.loads(settings.read_text(encoding="utf-8"))
    else:
        note = "; the model is not a folder on this machine and was not checked"
    if shape is not None and (problem := support.model_problem(shape, found[0])):
        raise ConfigError(problem)
    return [("rollout engine", f"vllm {found[1]}, {found[0]} build{note}")]
