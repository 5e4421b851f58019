"""The checks of `latent-grpo validate`: resources, problems, tokens, and the size of a step.

They need no GPU, no Ray, no network and no weights. A model on this machine is read for its tokenizer and its
configuration only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.common.encoding import TextEncoder
from latent_grpo.common.tasks.sources import TaskSource
from latent_grpo.common.types import Problem
from latent_grpo.deploy.checks.bfloat16 import bfloat16_slowdown, slowdown_sentence
from latent_grpo.deploy.checks.evaluation_size import size_rows
from latent_grpo.deploy.checks.memory import GIB, ModelShape, machine_bytes, rank_memory, staged_bytes, worker_memory
from latent_grpo.deploy.checks.rates import time_rows
from latent_grpo.deploy.run.foreign_code import left_out_sentence, without_code
from latent_grpo.deploy.run.preparation import Checked, InitialModel, check, file_faults
from latent_grpo.deploy.run.problems import describe, renderer_of
from latent_grpo.deploy.run.ray_session import check_resources, needed_resources
from latent_grpo.deploy.run.sft_data import SFTData
from latent_grpo.learner.lora import missing_package
from latent_grpo.learner.zero_engine import communication

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = tuple[str, str]
"""A name and what was found about it."""


def validate(
    config: RunConfig,
    *,
    files: bool = False,
    cpus: float | None = None,
    gpus: float | None = None,
    measured: str | None = None,
    allowed: Sequence[str] = (),
) -> list[Row]:
    """Checks a run before it starts, here or on a cluster with `cpus` and `gpus`, and returns a row per finding.

    With `files` every problem file must exist and is read as the run will read it. Code that the settings name by
    import path is left out, unless its module is `allowed`, and a row says so. `measured` is the folder of a run
    whose rates the time is estimated from (:func:`deploy.checks.rates.time_rows`). Raises ConfigError for anything
    for which the run itself would be refused.
    """
    resources = resource_rows(config, cpus, gpus)
    left_out = without_code(config, allowed)
    found = check(config, elsewhere=True, stored=files, left_out=[code.path for code in left_out])
    return [
        *arithmetic(config),
        *evaluation_rows(config),
        *size_rows(config, found),
        *training_rows(config, found.sources.training),
        *time_rows(config, measured),
        *resources,
        *([] if cpus is not None or gpus is not None else dtype_rows(config)),
        *([] if files else [("warning", line) for line in file_faults(config)]),
        ("rollout engine", found.engine),
        *([("warning", left_out_sentence(left_out))] if left_out else []),
        *((f"verifier {kind}", f"can be built; grades {', '.join(names)}") for kind, names in found.verifiers.items()),
        *_problem_rows(found),
        *sft_rows(config, found.sft),
        *memory_rows(config, found.model),
        *_token_rows(config, found.model),
        *([] if found.model is None else prompt_rows(config, found, found.model)),
    ]


def dtype_rows(config: RunConfig, slowdown: Callable[[str], float] = bfloat16_slowdown) -> list[Row]:
    """A warning if the run would compute in bfloat16 on this machine, and that is slower than float32 here."""
    if config.model.dtype != "bfloat16":
        return []
    import torch

    device = "cuda" if needed_resources(config).get("GPU") else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return []  # the run cannot start here
    sentence = slowdown_sentence(slowdown(device), device)
    return [] if sentence is None else [("warning", sentence)]


def _problem_rows(found: Checked) -> list[Row]:
    if found.problems is None:
        read = dict.fromkeys([*found.sources.training, *found.sources.evaluation])
        return [("problems", f"{describe(source)}; the lengths of its prompts were not checked") for source in read]
    rows = [("problems", line) for line in found.problems.summaries]
    if found.sft is not None:
        rows += [("Latent-SFT", task.summary) for task in found.sft.tasks]
    return rows


def _rest(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """What follows the latent-end token in the end of thinking, if that is more than one token."""
    ids = tokenizer.encode(config.model.prompt.think_end, add_special_tokens=False)
    if len(ids) < 2:
        return ""
    pieces = " ".join(repr(tokenizer.decode([i])) for i in ids)
    return f", the first of the {len(ids)} tokens of {config.model.prompt.think_end!r}: {pieces}"


def sft_rows(config: RunConfig, data: SFTData | None) -> list[Row]:
    """Rows about the size of Latent-SFT. Without `data` the number of its rows and of held-out problems is unknown."""
    settings = config.warm_start
    if settings is None:
        return []
    optimizer, fitted, rows = settings.optimizer, config.fitted_defaults, settings.max_steps * settings.batch_size
    steps = f"at most {settings.max_steps:,} of {settings.batch_size:,} rows: {rows:,} rows"
    sizes = [] if data is None else [task.source.size for task in data.tasks]
    if known := sum(size for size in sizes if size is not None):
        steps += f", {rows / known:.1f} times the {known:,} that the tasks have" if None not in sizes else ""
    held_out = "held-out problems" if data is None else f"{len(data.held_out):,} held-out problems"
    rate = f"{optimizer.lr:g}, {optimizer.warmup_steps} steps of warm-up, then {optimizer.schedule}"
    defaults = ", ".join(f"warm_start.{key} {value:g}" for key, value in fitted.items())
    return [
        ("Latent-SFT steps", steps),
        ("Latent-SFT learning rate", rate),
        ("Latent-SFT tokens per step", f"at most {_sft_tokens(config):,}, prompts included"),
        ("Latent-SFT evaluation", f"every {settings.evaluate_every} steps on {held_out}"),
        *([("Latent-SFT defaults", f"{defaults}: those for a model that is given, not made")] if fitted else []),
    ]


def _sft_tokens(config: RunConfig) -> int:
    longest = max(t.max_prompt_tokens + t.max_response_tokens for t in config.tasks)
    return longest * config.latent_sft.batch_size


def memory_rows(config: RunConfig, model: InitialModel | None) -> list[Row]:
    """Rows about the memory of a learner rank and of a rollout worker, with a warning if this machine's CPU lacks it.

    Without a `model` on this machine the sizes are those of the paper's model that its path names, if it names one.
    """
    rows: list[Row] = []
    learner = config.learner
    if model is not None:
        shape = ModelShape.of(config, model.source, model.tokenizer)
    elif (known := ModelShape.published(str(config.model.source))) is not None:
        name, shape = known
        rows.append(("memory", f"by the published sizes of {name}, since {config.model.source} is not on this machine"))
    else:
        return [("memory", f"not estimated: {config.model.source} is not a folder on this machine")]
    frozen_too = ", and the output layer, which is tied to them" if shape.tied else ""
    frozen_rows = [("frozen in RL", f"the input embeddings{frozen_too} (freeze_embeddings)")]
    longest = max(t.max_prompt_tokens + t.max_response_tokens for t in config.tasks)
    rows += frozen_rows if config.freeze_embeddings and config.lora is None else []
    of_rl = rank_memory(
        config,
        shape,
        -(-longest * config.minibatch_prompts * config.group_size // learner.ranks),
        frozen_embeddings=config.freeze_embeddings,
        longest=longest,
        lora=config.lora,
        reference=config.kl_coefficient > 0 and config.lora is None,
    )
    stages = {"RL": of_rl}
    by_lora = {"RL": config.lora, "Latent-SFT": None if config.warm_start is None else config.warm_start.lora}
    if (sft := config.warm_start) is not None:
        tokens = -(-_sft_tokens(config) // learner.ranks)
        of_sft = rank_memory(
            config, shape, tokens, frozen_embeddings=False, longest=longest, lora=sft.lora, latent_sft=True
        )
        stages = {"Latent-SFT": of_sft, **stages}
    for stage in stages:
        if (lora := by_lora[stage]) is not None:
            trained = shape.factors(lora, config.model.train_layers)
            rows.append((f"trained in {stage}", f"{trained:,} parameters of LoRA, of rank {lora.rank}"))
    if any(by_lora.values()) and (sentence := missing_package()) is not None:
        rows.append(("warning", sentence))
    rows += [(f"memory of a learner rank, {name}", str(memory)) for name, memory in stages.items()]
    largest = max(memory.total for memory in stages.values())
    on_gpu, staged = config.weights.backend == "nccl", staged_bytes(config, shape)
    if staged:
        place = "GPU" if on_gpu else "machine"
        rows.append(("memory of published weights", f"at most {staged / GIB:.1f} GiB of rank 0's {place} besides"))
    worker, rollout = worker_memory(config, shape), config.rollout
    rows.append(("memory of a rollout worker", str(worker)))
    if learner.resources.num_gpus and rollout.resources.num_gpus:
        parts = {
            "learner": (largest + (staged if on_gpu else 0), learner.resources.num_gpus),
            "rollouts": (worker.total // rollout.vllm.tensor_parallel, rollout.resources.num_gpus),
        }
        texts = [
            f"{name} {max(int(1 / gpus), 1) * size / GIB:.1f} GiB ({max(int(1 / gpus), 1)} actor(s) a GPU)"
            for name, (size, gpus) in parts.items()
        ]
        rows.append(("memory per GPU", "; ".join(texts)))
    have = machine_bytes()
    if not learner.resources.num_gpus and largest * learner.ranks + staged > have:
        sentence = (
            f"{learner.ranks} learner rank(s) of {largest / GIB:.0f} GiB do not fit into the {have / GIB:.0f} GiB of "
            f"this machine; lower learner.tokens_per_microbatch ({learner.tokens_per_microbatch:,}), or set "
            "learner.gradient_checkpointing"
        )
        rows.append(("warning", sentence))
    return rows


def _token_rows(config: RunConfig, model: InitialModel | None) -> list[Row]:
    """Rows about the tokenizer, the rendered prompts and the model's chain."""
    if model is None:
        return [("tokenizer", f"not checked: {config.model.source} is not a folder on this machine")]
    tokenizer, facts = model.tokenizer, model.facts
    end = facts.latent_end_id
    pad = " (an EOS id; masks are made from lengths)" if facts.pad_id in facts.eos_ids else ""
    chain = model.chain.describe() if model.chain else "not stated: the model has no latent_chain.json"
    return [
        ("vocabulary", f"{facts.vocab_size:,} rows, {int(facts.allowed.sum()):,} of them tokens"),
        (
            "latent-end token",
            "none" if end is None else f"{end} ({tokenizer.decode([end])!r}){_rest(config, tokenizer)}",
        ),
        ("end of sequence, padding", f"{', '.join(map(str, facts.eos_ids))}; {facts.pad_id}{pad}"),
        ("the model's chain", chain),
        *(("warning", line) for line in model.warnings),
    ]


def prompt_rows(config: RunConfig, found: Checked, model: InitialModel) -> list[Row]:
    """Rows with the first prompt of each task, in full; for a task that was not read, with `(problem)` in its place."""
    rows: list[Row] = []
    known = found.problems
    for names, text, warnings in [] if known is None else known.first_prompts():
        rows += [(f"first prompt of {names}", text), *(("warning", line) for line in warnings)]
    read = set() if known is None else {task.name for task in (*known.training, *known.evaluation)}
    encoder = TextEncoder(model.tokenizer, rows=model.facts.vocab_size)
    problem = Problem(uid="0", task="", messages=(("user", "(problem)"),), answer="")
    prompts: dict[str, list[str]] = {}  # text -> tasks that use it
    for task in (*config.tasks, *config.evaluation.tasks):
        if task.name not in read:
            prompts.setdefault(renderer_of(task, config, encoder).render(problem), []).append(task.name)
    return rows + [(f"prompt of {', '.join(dict.fromkeys(names))}", text) for text, names in prompts.items()]


def arithmetic(config: RunConfig) -> list[tuple[str, str]]:
    """Rows about the size of one step: prompts, samples, tokens, updates, slots and actors."""
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
        ("prompts per step", f"{at_most}{config.prompts_per_step}, {config.group_size} samples each"),
        ("samples per step", f"{at_most}{samples:,}"),
        ("response steps per step", f"at most {samples * longest:,} ({longest:,} per sample)"),
        ("tokens per step, prompts included", f"at most {samples * (longest + prompt):,}"),
        ("updates per step", f"{at_most}{updates}, {config.minibatch_prompts} prompts each"),
        (
            "longest sequence",
            f"{prompt + longest:,} tokens; a micro-batch holds {learner.tokens_per_microbatch:,}"
            + (", and a longer row is one by itself" if prompt + longest > learner.tokens_per_microbatch else ""),
        ),
        ("groups in flight", f"at most {slots} ({config.max_staleness} step(s) of staleness)"),
        (
            "whole run",
            f"{config.steps:,} steps, {at_most}{config.steps * samples:,} samples trained on, at most "
            f"{config.steps * samples * (longest + prompt):,} tokens",
        ),
        ("actors", f"{rollout.workers} rollout worker(s), {learner.ranks} learner rank(s): {cpus:g} CPU, {gpus:g} GPU"),
        *communication_rows(config),
    ]


def communication_rows(config: RunConfig) -> list[Row]:
    """A row on what several learner ranks exchange at once."""
    learner = config.learner
    if learner.ranks == 1:
        return []
    elements, overlap = communication(learner, learner.resources.num_gpus > 0)
    when = "while the backward pass goes on" if overlap else "between computations"
    return [("communication of learner ranks", f"{elements:,} gradients or weights at once, {when}")]


def evaluation_rows(config: RunConfig) -> list[Row]:
    """A row on when a run is evaluated, and on how much."""
    settings = config.evaluation
    if not settings.tasks:
        return []
    runs = ", the protocol's repetitions" if settings.protocol == "reference" else f", {settings.runs} repetition(s)"
    ends = [name for name, at in (("before", settings.at_start), ("after", settings.at_end)) if at]
    parts = [f"{' and '.join(ends)} training on all problems{runs}"] if ends else []
    if settings.every:
        first = settings.interim_problems
        problems = "all problems" if first is None else f"the first {first:,} problems of each task"
        fewer = runs if settings.interim_runs is None else f", at most {settings.interim_runs} repetition(s)"
        parts.append(f"every {settings.every} steps on {problems}{fewer}")
    tasks = ", ".join(task.name for task in settings.tasks)
    return [("evaluation", f"{tasks}: {'; '.join(parts)}")] if parts else []


def training_rows(config: RunConfig, sources: Sequence[TaskSource]) -> list[Row]:
    """Rows on how often the steps go through the problems of each training task that was read."""
    weights = sum(task.weight for task in config.tasks)
    at_least = "at least " if config.dynamic_sampling == "refill" else ""
    rows = []
    for source in sources:
        prompts = round(config.steps * config.prompts_per_step * source.config.weight / weights)
        if source.size:
            epochs = f"{prompts / source.size:,.2f} times its {source.size:,} problems"
            rows.append((f"training on {source.config.name}", f"{at_least}{prompts:,} prompts, {epochs}"))
    return rows


def resource_rows(config: RunConfig, cpus: float | None, gpus: float | None) -> list[tuple[str, str]]:
    """A row on whether a cluster of that size can hold the run's actors. Raises ConfigError if it cannot.

    Without a size the run would use this machine. Since a cluster may be larger, too few CPUs here are only a warning.
    """
    needed = needed_resources(config)
    given = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount is not None}
    unknown = {name: amount for name, amount in needed.items() if name not in given}
    check_resources(config, given | unknown, "a cluster of the given size")
    if not unknown:
        return [("resources", "the given cluster can hold all actors")]
    if given or set(unknown) != {"CPU"}:
        return [("resources", f"not checked for {', '.join(unknown)}; give the cluster's --cpus and --gpus")]
    try:
        check_resources(config, {"CPU": os.cpu_count() or 1}, "this machine")
    except ConfigError as error:
        return [("warning", f"{error}. To check a cluster instead, give its --cpus")]
    return [("resources", f"this machine's {os.cpu_count()} CPUs can hold all actors")]
