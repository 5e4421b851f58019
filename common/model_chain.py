"""A model's chain settings: a small file beside its weights, which Latent-SFT and RL write and every run on it reads.

A chain is a contract between the weights and the sampler: how many ids a latent step mixes, how many tokens of the
explicit chain it stands for, and which token ends it. A wrong setting would show only as a worse model, so a run
compares its settings with this file at its start.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import PositiveInt, ValidationError, model_validator

from latent_grpo.common.config import ConfigError, PromptConfig, RunConfig, Section
from latent_grpo.common.files import read_text
from latent_grpo.common.hub import check_folder, hub_errors
from latent_grpo.common.tasks.benchmarks import prompt_of
from latent_grpo.common.types import LatentExit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAIN_FILE = "latent_chain.json"


class GenerationDefaults(Section):
    """How the model is sampled where a user says nothing else: as its training did, and its first task's prompt."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: PositiveInt
    """The token budget: the largest of its training tasks."""
    prompt: PromptConfig
    """The prompt of the first training task, its benchmark's texts included."""
    date_string: str
    max_positions: PositiveInt | None = None
    """`model.max_positions` of its training."""


class ChainSettings(Section):
    """The contents of :data:`CHAIN_FILE`."""

    format: Literal[1] = 1
    chain: Literal["latent", "explicit"]
    """`latent`: mixtures up to the latent-end token; `explicit`: the chain is text."""
    source: Literal["uniform", "induced"] | None = None
    """The source of the soft labels (METHOD §7 a, b); None: not known, or an explicit chain."""
    k: PositiveInt | None = None
    """K of the mixtures; None for an explicit chain."""
    compression: PositiveInt | None = None
    """c: tokens of the explicit chain per latent step; None where Latent-SFT was not done by this program."""
    tau: float | None = None
    """The temperature of the mixture weights softmax(r / tau); None for an explicit chain."""
    think_end: str
    think_end_ids: list[int]
    """The ids of `think_end` under the model's tokenizer; the first is the latent-end token. Empty for an explicit
    chain whose tokenizer cannot write it."""
    latent_exit: LatentExit | None = None
    """What ended latent mode in its training; None for an explicit chain, and where an earlier version wrote the
    file."""
    prompt: dict[str, str | None] | None = None
    """The keys of `model.prompt` that its training set; None where an earlier version wrote the file."""
    generation: GenerationDefaults | None = None
    """None where an earlier version wrote the file."""

    @model_validator(mode="after")
    def _latent_has_a_width(self) -> Self:
        if self.chain == "latent" and (self.k is None or self.tau is None or not self.think_end_ids):
            raise ValueError("a latent chain needs k, tau and think_end_ids")
        return self

    def describe(self) -> str:
        """Returns a description such as `latent, K 3, c 3 (uniform), ends with '</think>' [20]`."""
        parts: list[str] = [self.chain]
        if self.k is not None:
            parts.append(f"K {self.k}")
        if self.compression is not None:
            parts.append(f"c {self.compression} ({self.source or 'source not known'})")
        return ", ".join([*parts, f"ends with {self.think_end!r} {self.think_end_ids}"])


def exported_chain(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, before: ChainSettings | None = None
) -> ChainSettings:
    """Returns the chain of a run's trained model: its Latent-SFT decides c if it has one, else `before` does."""
    think_end = config.model.prompt.think_end
    ids = _ids(tokenizer, think_end)
    prompt, generation = config.model.prompt.given, _generation(config)
    if not config.latent:
        return ChainSettings(
            chain="explicit", think_end=think_end, think_end_ids=ids, prompt=prompt, generation=generation
        )
    sft = config.warm_start
    return ChainSettings(
        chain="latent",
        source=sft.source if sft else before.source if before else None,
        k=config.k,
        compression=sft.compression if sft else before.compression if before else None,
        tau=config.tau,
        think_end=think_end,
        think_end_ids=ids,
        latent_exit=config.latent_exit,
        prompt=prompt,
        generation=generation,
    )


def _generation(config: RunConfig) -> GenerationDefaults:
    return GenerationDefaults(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=max(task.max_response_tokens for task in config.tasks),
        prompt=prompt_of(config.tasks[0], config.model.prompt),
        date_string=config.model.date_string,
        max_positions=config.model.max_positions,
    )


def write_chain(folder: str | Path, settings: ChainSettings) -> None:
    """Writes the chain file into a model folder."""
    Path(folder, CHAIN_FILE).write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_chain(model: str | Path) -> ChainSettings | None:
    """Reads the chain of a model folder or hub id; None if the model has no such file.

    Raises ConfigError for a damaged file, and for a `model` that is neither a folder here nor a hub id.
    """
    path = Path(model, CHAIN_FILE)
    if not Path(model).is_dir():
        from transformers.utils.hub import cached_file

        check_folder(model)
        with hub_errors(model):
            found = cached_file(
                str(model),
                CHAIN_FILE,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        path = Path(found) if found else path
    if not path.exists():
        return None
    try:
        return ChainSettings.model_validate(json.loads(read_text(path)))
    except (OSError, ValueError, RecursionError) as error:  # a ValidationError is a ValueError
        why = str(error)
        if isinstance(error, ValidationError):  # whose text has several lines
            first = error.errors()[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r:.60}".removeprefix(": ")
        raise ConfigError(
            f"{path} is damaged or of another version: {why}. Copy it again from the original model, or remove it to "
            "run without its checks"
        ) from error


def check_chain(
    settings: ChainSettings, model: str | Path, config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Returns warnings about a run of `config` on `model`. Raises ConfigError where the two do not fit.

    A run with a warm start gives the model another chain, so only the tokenizer is compared.
    """
    think_end = config.model.prompt.think_end
    if think_end != settings.think_end:
        raise ConfigError(
            f"model {model} ends its thinking with {settings.think_end!r} ({CHAIN_FILE}), but model.prompt.think_end "
            f"is {think_end!r}; set model.prompt.think_end to the model's"
        )
    check_end(settings, model, tokenizer)
    if config.warm_start is not None:
        return []
    warnings = _other_prompt(settings, config)
    if settings.chain == "explicit" and config.latent:
        raise ConfigError(
            f"model {model} has an explicit chain ({CHAIN_FILE}), but algorithm {config.algorithm} samples a latent "
            "one, which it never learned (METHOD §7). Set algorithm to grpo, or give the model a latent start first: "
            "`latent-grpo sft` with warm_start.chain latent"
        )
    if settings.chain == "latent" and not config.latent:
        raise ConfigError(
            f"model {model} has a latent chain ({CHAIN_FILE}), but algorithm grpo samples an explicit one, which it "
            "was not trained to write. Set algorithm to latent_grpo, or start from a model with an explicit chain: "
            "`latent-grpo sft` with algorithm grpo"
        )
    if not config.latent:
        return warnings
    if settings.source == "uniform" and settings.compression is not None and config.k < settings.compression:
        raise ConfigError(
            f"k ({config.k}) is smaller than the model's compression ({settings.compression} tokens a latent step, "
            f"{CHAIN_FILE}): a step could not hold its tokens; set k to the model's {settings.k}"
        )
    if settings.latent_exit not in (None, config.latent_exit):
        warnings.append(
            f"latent_exit is {config.latent_exit}, but the model was trained with {settings.latent_exit} "
            f"({CHAIN_FILE}), so its chains end elsewhere"
        )
    return warnings + [
        f"{key} is {wanted:g}, but the model was trained with {had:g} ({CHAIN_FILE}), so its mixtures are new to it"
        for key, wanted, had in (("k", config.k, settings.k), ("tau", config.tau, settings.tau))
        if wanted != had
    ]


def check_end(settings: ChainSettings, model: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError for a tokenizer under which the end of thinking is not that of the model's training."""
    ids = _ids(tokenizer, settings.think_end)
    if ids != settings.think_end_ids:
        raise ConfigError(
            f"the tokenizer of {model} splits {settings.think_end!r} into {ids}, but the model was trained with "
            f"{settings.think_end_ids} ({CHAIN_FILE}): the end of its thinking would not be recognised. Use the "
            "tokenizer that was saved with the model"
        )


def _other_prompt(settings: ChainSettings, config: RunConfig) -> list[str]:
    """Returns a warning if the texts of `model.prompt` are others than those of the model's training."""
    if settings.prompt is None:
        return []
    both = (settings.prompt, config.model.prompt.given)
    before, now = ({key: text for key, text in prompt.items() if key != "think_end"} for prompt in both)
    if before == now:
        return []
    return [f"model.prompt is {now}, but the model was trained with {before} ({CHAIN_FILE})"]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of a text; empty if the tokenizer cannot write it (an explicit chain need not)."""
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception:  # tokenizers raises bare Exception for a text outside a vocabulary without <unk>
        return []
