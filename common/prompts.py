"""The rendering of problems as prompt ids, and the facts of a tokenizer, checked once at start (METHOD §1, §8)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from latent_grpo.common.config import ConfigError, PromptConfig
from latent_grpo.common.encoding import TextEncoder, UnencodableText
from latent_grpo.common.schema import Ragged
from latent_grpo.common.types import Problem, TokenFacts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from latent_grpo.common.config import RunConfig

logger = logging.getLogger(__name__)


class PromptRenderer:
    """Renders problems for one tokenizer and one prompt setting.

    A problem of one user message goes through `config.user` and `config.system`; a chat of several messages (verl's
    `prompt` column) is taken as it is, with the system message put before it if the chat has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        for key, template in (("user", config.user), ("format", config.format)):
            if template is not None and "{problem}" not in template:
                raise ConfigError(f"prompt.{key} must contain {{problem}}, got {template!r}")
        if config.format is None and not tokenizer.chat_template:
            raise ConfigError(
                "this tokenizer has no chat template: set prompt.format to a plain-text prompt with {problem}"
            )

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """Returns the chat for the tokenizer's template."""
        chat = [{"role": role, "content": content} for role, content in problem.messages]
        if len(chat) == 1:
            chat[0]["content"] = self.config.user.replace("{problem}", chat[0]["content"])
        if self.config.system is not None and all(message["role"] != "system" for message in chat):
            chat.insert(0, {"role": "system", "content": self.config.system})
        return chat

    def render(self, problem: Problem) -> str:
        """Returns the prompt's text, which ends in reasoning mode (METHOD §1)."""
        if self.config.format is not None:
            question = "\n\n".join(content for _, content in problem.messages)
            text = self.config.format.replace("{problem}", question)
        else:
            text = str(
                self.tokenizer.apply_chat_template(self.messages(problem), tokenize=False, add_generation_prompt=True)
            )
        # templates of reasoning models end with "<think>\n": it is already there, with or without white space
        return text if text.rstrip().endswith(self.config.think_start) else text + self.config.think_start

    def encode(self, problem: Problem) -> np.ndarray:
        """Returns the prompt's ids, int32 [P]. A chat template has special tokens; plain text gets the default ones.

        Raises ConfigError, which names the problem.
        """
        (ids,) = self.encode_all([problem], TextEncoder(self.tokenizer)).values()
        return ids

    def encode_all(self, problems: Sequence[Problem], encoder: TextEncoder, name: str = "prompts") -> EncodedPrompts:
        """Returns the ids of all prompts by the problems' uid. `name` is what the progress calls them."""
        texts = [self.render(problem) for problem in problems]
        plain = self.config.format is not None
        try:
            ids = encoder.encode(name, texts, special_tokens=plain)
        except UnencodableText as error:
            raise ConfigError(
                f"problem {problems[error.index].uid}: the model's tokenizer cannot encode its prompt "
                f"{error.text[:80]!r}... ({error.reason}); use a model whose tokenizer knows these texts, or another "
                "prompt"
            ) from error
        # tokenizers that close every text would end the response before it starts
        closing = self.tokenizer.eos_token_id if plain else None
        found = EncodedPrompts([problem.uid for problem in problems], ids, closing)
        for problem, length in zip(problems, found.lengths, strict=True):
            if not length:
                raise ConfigError(f"problem {problem.uid}: its prompt has no tokens")
        return found


class EncodedPrompts(Mapping[str, np.ndarray]):
    """The prompts of many problems as token ids: uid -> int32 [P]."""

    def __init__(self, uids: Sequence[str], ids: Ragged, closing_id: int | None = None) -> None:
        """A prompt's last token is left out where it is `closing_id`."""
        self._places = {uid: place for place, uid in enumerate(uids)}
        self._ids = ids
        self.lengths = ids.lengths  # [prompts], in tokens
        if closing_id is not None and len(ids.values):
            last = ids.values[np.maximum(ids.offsets[1:] - 1, 0)]
            self.lengths = self.lengths - ((self.lengths > 0) & (last == closing_id))

    def __getitem__(self, uid: str) -> np.ndarray:
        place = self._places[uid]
        return self._ids[place][: self.lengths[place]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_tokens(config: RunConfig, model: str | Path) -> tuple[PreTrainedTokenizerBase, TokenFacts]:
    """Reads the tokenizer and the token facts of a run on `model` (a folder or hub id). Raises ConfigError.

    The driver, the rollout workers and the learner's ranks all call it, so they agree.
    """
    from latent_grpo.common.models import load_tokenizer, output_facts

    tokenizer = load_tokenizer(model)
    vocab_size, eos_ids = output_facts(model)
    return tokenizer, resolve_tokens(tokenizer, vocab_size, config.latent, config.model.prompt.think_end, eos_ids)


def check_width(config: RunConfig, facts: TokenFacts) -> None:
    """Raises ConfigError if the tokenizer has fewer ids than a latent step's mixture needs."""
    available = int(facts.allowed.sum())
    if config.latent and config.k > available:
        raise ConfigError(
            f"k ({config.k}) is larger than the vocabulary: the tokenizer has {available} ids, and the model's output "
            f"has {facts.vocab_size} rows; lower k"
        )


def check_think_start(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError for a start-of-thinking text that the tokenizer does not know."""
    for prompt in (config.model.prompt, *(t.prompt for t in (*config.tasks, *config.evaluation.tasks) if t.prompt)):
        text, fault = prompt.think_start, None
        if not text:
            continue
        try:
            ids = tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception for a text outside a vocabulary without <unk>
            ids, fault = [], f"cannot encode it ({error})"
        if not fault and (not ids or tokenizer.unk_token_id in ids):
            fault = "gives the unknown token for it" if ids else "gives no tokens for it"
        if fault:
            raise ConfigError(
                f"prompt.think_start {text!r}: this tokenizer {fault}; set it to the text that begins thinking for "
                "this model"
            )


def resolve_tokens(
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    latent: bool,
    think_end: str = "</think>",
    extra_eos_ids: Sequence[int] = (),
) -> TokenFacts:
    """Resolves the token facts of a run. Raises :class:`ConfigError`, which says what to change.

    `vocab_size` is the number of rows of the model's output. `extra_eos_ids` are further ids of the model's generation
    config that end a response. The latent-end token is the first id of `think_end` under this tokenizer (METHOD §1).
    """
    ids = np.fromiter(tokenizer.get_vocab().values(), dtype=np.int64)
    if ids.max() >= vocab_size:
        raise ConfigError(
            f"the tokenizer has ids up to {ids.max()}, but the model's vocabulary has {vocab_size} rows; "
            "give the tokenizer that the model was made with, or resize the model's embeddings and save it"
        )
    allowed = np.zeros(vocab_size, dtype=bool)
    allowed[ids] = True

    eos = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError("the tokenizer has no end-of-sequence token: a response could never finish; set eos_token")
    eos_ids = tuple(dict.fromkeys((int(eos), *(int(i) for i in extra_eos_ids))))
    if any(not 0 <= i < vocab_size for i in eos_ids):
        raise ConfigError(f"end-of-sequence ids {eos_ids} are not all below the model's vocabulary of {vocab_size}")
    pad = tokenizer.pad_token_id
    if pad is None or pad in eos_ids:
        # harmless here: every mask is made from lengths, never by comparing ids with the padding id
        logger.info("padding uses the end-of-sequence id %d: masks are explicit, so nothing depends on it", eos)
        pad = eos
    return TokenFacts(
        vocab_size=vocab_size,
        allowed=allowed,
        latent_end_id=_latent_end(tokenizer, think_end, eos_ids, required=latent),
        eos_ids=eos_ids,
        pad_id=int(pad),
    )


def _latent_end(
    tokenizer: PreTrainedTokenizerBase, think_end: str, eos_ids: tuple[int, ...], *, required: bool
) -> int | None:
    fault = None
    try:
        ids = tokenizer.encode(think_end, add_special_tokens=False)
    except Exception as error:  # tokenizers raises bare Exception for a text outside a vocabulary without <unk>
        ids, fault = [], f"cannot encode it ({error})"
    if not ids:
        fault = fault or "gives no tokens for it"
    elif ids[0] == tokenizer.unk_token_id:
        fault = "gives the unknown token for it"
    elif ids[0] in eos_ids:
        fault = f"gives the end-of-sequence id {ids[0]} first: leaving latent mode would end the response"
    elif not str(tokenizer.decode([ids[0]])).strip():
        fault = f"gives white space first (id {ids[0]}): any space would end latent mode"
    if fault is None:
        return int(ids[0])
    if required:
        raise ConfigError(
            f"prompt.think_end {think_end!r}: this tokenizer {fault}; set prompt.think_end to a text that the "
            "tokenizer knows (it marks the end of thinking), or use algorithm grpo"
        )
    return None
