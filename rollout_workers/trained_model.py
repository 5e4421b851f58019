"""What a trained model says about itself, without its weights: chain, prompt, tokenizer, and how it is sampled.

`LatentModel` and vLLM's server read it, so that both take the same for what a user leaves open.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from latent_grpo.common.config import DEFAULT_DATE, ConfigError, PromptConfig
from latent_grpo.common.model_chain import CHAIN_FILE, ChainSettings, GenerationDefaults, check_end, read_chain
from latent_grpo.common.model_check import check_model, read_settings
from latent_grpo.common.model_limits import longest_exact
from latent_grpo.common.models import extended_limit, load_tokenizer, output_facts, position_limit
from latent_grpo.common.prompts import PromptRenderer, beyond_sentence, foreign_sentences, resolve_tokens
from latent_grpo.common.types import Problem, TokenFacts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = Sequence[Mapping[str, str]]
"""The messages of a chat: `[{"role": "user", "content": "..."}]`."""
ASSUMED = ChainSettings(chain="latent", k=10, tau=1.0, think_end="</think>", think_end_ids=[0])  # ids: of no tokenizer
"""What is taken of a model without `latent_chain.json`: the method's defaults (METHOD symbols, §2)."""
MAX_TOKENS = 1024  # the budget where the model does not state one
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A model folder or hub id, as far as it is known without its weights."""

    path: str | Path
    chain: ChainSettings
    defaults: GenerationDefaults
    tokenizer: PreTrainedTokenizerBase
    facts: TokenFacts
    renderer: PromptRenderer
    positions: int | None  # the longest prompt and response together; None: the model states no number

    @property
    def latent(self) -> bool:
        """Whether its responses begin with latent steps."""
        return self.chain.chain == "latent"


def read_trained_model(path: str | Path, say: Callable[[str], None] = log.warning) -> TrainedModel:
    """Reads a model. `say` is called with what had to be assumed. Raises ConfigError for one that cannot be read."""
    for warning in check_model(path):
        say(warning)
    stored, tokenizer = read_chain(path), load_tokenizer(path)
    if stored is None:
        say(
            f"model {path} has no {CHAIN_FILE}: a latent chain with k {ASSUMED.k}, tau {ASSUMED.tau:g} and "
            f"{ASSUMED.think_end!r} is assumed, and the tokenizer's chat template without an instruction"
        )
    else:
        check_end(stored, path, tokenizer)
    chain = stored or ASSUMED
    defaults = chain.generation or _defaults_of_earlier_versions(chain)
    own = position_limit(path)
    if own is not None and defaults.max_positions is not None and defaults.max_positions < own:
        # an earlier version trained with a smaller number, which had no effect
        defaults = defaults.model_copy(update={"max_positions": None})
    rows, eos_ids = output_facts(path)
    settings = read_settings(path)
    if (sentence := beyond_sentence(tokenizer, rows)) is not None:
        say(sentence)
    facts = resolve_tokens(tokenizer, rows, chain.chain == "latent", chain.think_end, eos_ids)
    for sentence in foreign_sentences(tokenizer, facts):
        say(sentence)
    prompt = defaults.prompt
    chat = PromptConfig(format=prompt.format, think_start=prompt.think_start, think_end=prompt.think_end)
    return TrainedModel(
        path=path,
        chain=chain,
        defaults=defaults,
        tokenizer=tokenizer,
        facts=facts,
        renderer=PromptRenderer(tokenizer, prompt, chat, rows=rows, date=defaults.date_string),
        positions=longest_exact(settings, extended_limit(path, defaults.max_positions)),
    )


def as_problem(problem: str | Chat, place: int) -> Problem:
    """Returns the problem of a text, or of a whole chat. Raises ConfigError, which names its `place` in the list."""
    if isinstance(problem, str):
        if not problem.strip():
            raise ConfigError(f"problem {place} is empty; give a text, or a chat with a user message")
        return Problem(uid=str(place), task="generate", messages=(("user", problem),), answer="")
    wrong = not isinstance(problem, Sequence) or any(
        not isinstance(m, Mapping) or not {"role", "content"} <= m.keys() for m in problem
    )
    if wrong or not problem:
        raise ConfigError(
            f"problem {place}: expected a text, or a chat such as [{{'role': 'user', 'content': '...'}}], got "
            f"{str(problem)[:60]!r}"
        )
    messages = tuple((str(m["role"]), str(m["content"])) for m in problem)
    return Problem(uid=str(place), task="generate", messages=messages, answer="", whole=True)


def prompt_uid(ids: np.ndarray) -> str:
    """Returns the uid of a prompt, [P] int32: a function of its content, so that a seed gives the same response."""
    return f"prompt/{xxhash.xxh3_128_hexdigest(np.ascontiguousarray(ids, dtype=np.int32).tobytes())}"


def _defaults_of_earlier_versions(chain: ChainSettings) -> GenerationDefaults:
    """Returns METHOD §2.4's settings, for a chain file that states none."""
    return GenerationDefaults(
        temperature=0.6,
        top_p=0.95,
        top_k=30,
        max_tokens=MAX_TOKENS,
        prompt=PromptConfig.model_validate({**(chain.prompt or {}), "think_end": chain.think_end}),
        date_string=DEFAULT_DATE,
    )
