"""What `latent-grpo validate` says: the resolved settings, the arithmetic of a step, and what would go wrong.

Needs no GPU, no Ray, no network and no weights: of a model on this machine its tokenizer and its configuration.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from common.benchmarks import how_to_get
from common.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.types import TokenFacts


def arithmetic(config: RunConfig) -> list[tuple[str, str]]:
    """(what, how much) of one step: prompts, samples, tokens, updates, slots, actors."""
    longest = max(t.max_response_tokens for t in config.tasks)
    prompt = max(t.max_prompt_tokens for t in config.tasks)
    samples = config.samples_per_step
    updates = config.prompts_per_step // config.minibatch_prompts
    slots = (config.max_staleness + 1) * config.prompts_per_step
    rollout, learner = config.rollout, config.learner
    cpus = rollout.workers * rollout.resources.num_cpus + learner.ranks * learner.resources.num_cpus
    gpus = rollout.workers * rollout.resources.num_gpus + learner.ranks * learner.resources.num_gpus
    at_most = "at most " if config.dynamic_sampling == "drop" else ""
    return [
        ("prompts a step", f"{at_most}{config.prompts_per_step}, {config.group_size} samples each"),
        ("samples a step", f"{at_most}{samples:,}"),
        ("response steps a step", f"at most {samples * longest:,} ({longest:,} a sample)"),
        ("tokens a step, prompts included", f"at most {samples * (longest + prompt):,}"),
        ("updates a step", f"{at_most}{updates}, {config.minibatch_prompts} prompts each"),
        ("longest sequence", f"{prompt + longest:,} tokens; a micro-batch holds {learner.tokens_per_microbatch:,}"),
        ("groups in flight", f"at most {slots} ({config.max_staleness} step(s) of staleness)"),
        ("whole run", f"{config.steps:,} steps, {at_most}{config.steps * samples:,} samples trained on"),
        ("actors", f"{rollout.workers} rollout worker(s), {learner.ranks} learner rank(s): {cpus:g} CPU, {gpus:g} GPU"),
    ]


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
    from common.chain import check_chain, read_chain
    from common.models import load_tokenizer, make_tokenizer, output_facts
    from common.prompts import PromptRenderer, check_think_start, check_width, resolve_tokens
    from common.tasks import with_benchmark_defaults
    from common.types import Problem

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
    from common.tasks import load_task
    from learner.latent_sft import make_row

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

    from rollout_workers.vllm_plugin import support

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


def resource_rows(config: RunConfig, cpus: float | None, gpus: float | None) -> list[tuple[str, str]]:
    """Whether a cluster of that size can hold the run's actors. Raises ConfigError if not.

    Without a size it is this machine that a run would use; a cluster may be larger, so too little is only said.
    """
    from deploy.ray_session import check_resources, needed_resources

    needed = needed_resources(config)
    given = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount is not None}
    unknown = {name: amount for name, amount in needed.items() if name not in given}
    check_resources(config, given | unknown, "a cluster of the given size")
    if not unknown:
        return [("resources", "the given cluster can hold all actors")]
    if given or set(unknown) != {"CPU"}:
        return [("resources", f"not checked for {', '.join(unknown)}: give the cluster's --cpus and --gpus")]
    try:
        check_resources(config, {"CPU": os.cpu_count()}, "this machine")
    except ConfigError as error:
        return [("warning", f"{error}. For a cluster give its --cpus")]
    return [("resources", f"this machine's {os.cpu_count()} CPUs can hold all actors")]
