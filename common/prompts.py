"""The rendering of problems as prompt ids, and the facts of a tokenizer, checked once at start (METHOD §1, §8)."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from latent_grpo.common.chat_templates import check_template, render_chat
from latent_grpo.common.config import DEFAULT_DATE, ConfigError, PromptConfig
from latent_grpo.common.encoding import TextEncoder, UnencodableText
from latent_grpo.common.schema import Ragged
from latent_grpo.common.types import Problem, TokenFacts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from latent_grpo.common.config import RunConfig

logger = logging.getLogger(__name__)
QUOTED = 80  # characters of a problem in an error
FEWEST_TOKENS = 0.5  # share of a model's rows; paddings of vocabularies are a few per cent
SENTENCE = 20  # characters from which on a repeated sentence is worth a warning


class PromptRenderer:
    """Renders problems for one tokenizer.

    A problem of one user message goes through the texts of `config`. A row that brings whole messages (verl's layout)
    is taken as it is, apart from the texts of `whole`, which are the task's own: a `system` that somebody gave takes
    the place of the row's (None: no system message), its `user` goes round the last user message. `rows` is the number
    of ids that the model has. Templates that print a date, as Llama 3.2's does, print `date`, so that a prompt is the
    same every day.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PromptConfig,
        whole: PromptConfig | None = None,
        *,
        rows: int | None = None,
        date: str = DEFAULT_DATE,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self._whole = whole or config
        self._rows = rows
        self._date = date
        for one in (self.config, self._whole):
            for key, template in (("user", one.user), ("format", one.format)):
                if template is not None and "{problem}" not in template:
                    raise ConfigError(f"prompt.{key} must contain {{problem}}, got {template!r}")
            if one.format is None and not tokenizer.chat_template:
                raise ConfigError(
                    "this tokenizer has no chat template: set prompt.format to a plain-text prompt with {problem}"
                )
        if config.format is None:
            check_template(tokenizer, config.system, date)

    def _config(self, problem: Problem) -> PromptConfig:
        return self._whole if problem.whole or len(problem.messages) > 1 else self.config

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """Returns the chat for the tokenizer's template."""
        config = self._config(problem)
        chat = [{"role": role, "content": content} for role, content in problem.messages]
        asked = next((message for message in reversed(chat) if message["role"] == "user"), None)
        if asked is not None:
            asked["content"] = config.user.replace("{problem}", asked["content"])
        if "system" in config.given:  # a row keeps its own where nobody said anything
            chat = [message for message in chat if message["role"] != "system"]
        if config.system is not None:
            chat.insert(0, {"role": "system", "content": config.system})
        return chat

    def render(self, problem: Problem) -> str:
        """Returns the prompt's text, which ends in reasoning mode (METHOD §1).

        Raises ConfigError, which names the problem, where the chat template raises or drops a message.
        """
        config = self._config(problem)
        if config.format is not None:
            question = "\n\n".join(content for _, content in problem.messages)
            text = config.format.replace("{problem}", question)
        else:
            try:
                text = render_chat(self.tokenizer, self.messages(problem), self._date)
            except ConfigError as error:
                raise ConfigError(f"problem {problem.uid}: {error}") from error
        # templates of reasoning models end with "<think>\n": it is already there, with or without white space
        return text if text.rstrip().endswith(config.think_start) else text + config.think_start

    def encode(self, problem: Problem) -> np.ndarray:
        """Returns the prompt's ids, int32 [P]. A chat template has special tokens; plain text gets the default ones.

        Raises ConfigError, which names the problem.
        """
        (ids,) = self.encode_all([problem]).values()
        return ids

    def encode_all(
        self, problems: Sequence[Problem], encoder: TextEncoder | None = None, name: str = "prompts"
    ) -> EncodedPrompts:
        """Returns the ids of all prompts by the problems' uid.

        `encoder` may keep them on the disk, and shows its progress under `name`.
        """
        encoder = encoder or TextEncoder(self.tokenizer, rows=self._rows, large=len(problems) + 1)
        texts = [self.render(problem) for problem in problems]
        # rows of one source are all plain problems or all whole messages
        plain = bool(problems) and self._config(problems[0]).format is not None
        try:
            ids = encoder.encode(name, texts, special_tokens=plain)
        except UnencodableText as error:
            problem = problems[error.index]
            asked = problem.messages[-1][1] if problem.messages else ""  # a template's own texts may be long
            short = repr(asked) if len(asked) <= QUOTED else f"{asked[:QUOTED]!r}..."
            raise ConfigError(
                f"problem {problem.uid} ({short}): its prompt cannot be encoded for this model: {error.reason}; use a "
                "model that knows these texts, or another prompt"
            ) from error
        # tokenizers that close every text would end the response before it starts
        closing = self.tokenizer.eos_token_id if plain else None
        found = EncodedPrompts([problem.uid for problem in problems], ids, closing)
        for problem, length in zip(problems, found.lengths, strict=True):
            if not length:
                raise ConfigError(f"problem {problem.uid}: its prompt has no tokens")
        return found


def repeated_sentences(text: str) -> list[str]:
    """Returns the sentences of a prompt that occur in it more than once, as an instruction that was put in twice."""
    sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n", text)]
    return [part for part, count in Counter(sentences).items() if count > 1 and len(part) >= SENTENCE]


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

    `vocab_size` is the number of rows of the model's output. Ids of the tokenizer beyond it are never drawn
    (:func:`ids_beyond`), and a text that needs one is refused where it is encoded. `extra_eos_ids` are further ids of
    the model's generation config that end a response. The latent-end token is the first id of `think_end` under this
    tokenizer (METHOD §1).
    """
    ids = np.fromiter(tokenizer.get_vocab().values(), dtype=np.int64)
    allowed = np.zeros(vocab_size, dtype=bool)
    allowed[ids[ids < vocab_size]] = True

    eos = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError("the tokenizer has no end-of-sequence token: a response could never finish; set eos_token")
    if strangers := [i for i in extra_eos_ids if not isinstance(i, int) or isinstance(i, bool)]:
        raise ConfigError(f"eos_token_id of the model's configuration holds {strangers[0]!r}; expected whole numbers")
    eos_ids = tuple(dict.fromkeys((int(eos), *extra_eos_ids)))
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
        latent_end_id=_latent_end(tokenizer, think_end, eos_ids, vocab_size, required=latent),
        eos_ids=eos_ids,
        pad_id=int(pad),
    )


def ids_beyond(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[int, str]:
    """Returns the ids that the tokenizer has and the model has no row for, with their tokens, in order.

    Llama 3.2's released latent checkpoints have one: `<|compress_token|>`, 128256, in a model of 128,256 rows.
    """
    return {i: token for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]) if i >= vocab_size}


def beyond_sentence(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str | None:
    """Returns the line that says which ids of the tokenizer are left out (:func:`ids_beyond`); None: there are none."""
    beyond = ids_beyond(tokenizer, vocab_size)
    if not beyond:
        return None
    listed = ", ".join(f"{i} ({token!r})" for i, token in list(beyond.items())[:3])
    more = ", ..." if len(beyond) > 3 else ""
    return (
        f"the tokenizer has {len(beyond):,} id(s) that the model, of {vocab_size:,} rows, has not: {listed}{more}; "
        "they are never drawn, and a text that needs one is refused"
    )


def foreign_sentences(tokenizer: PreTrainedTokenizerBase, facts: TokenFacts) -> list[str]:
    """Returns what speaks for a tokenizer that is another model's: a text would be other ids than in its training."""
    found = []
    tokens, own = int(facts.allowed.sum()), tokenizer.eos_token_id
    if tokens < FEWEST_TOKENS * facts.vocab_size:
        found.append(f"the tokenizer has tokens for {tokens:,} of the model's {facts.vocab_size:,} rows")
    ends = [i for i in facts.eos_ids if i != own]
    if ends and not any(i in tokenizer.added_tokens_decoder for i in ends):
        texts = ", ".join(f"{i} ({tokenizer.decode([i])!r})" for i in ends[:3])
        found.append(
            f"the model's configuration ends a text with {texts}, which are no special tokens of the tokenizer; its "
            f"own is {own} ({tokenizer.eos_token!r})"
        )
    return [f"{sentence}: is it the tokenizer of this model?" for sentence in found]


def _latent_end(
    tokenizer: PreTrainedTokenizerBase, think_end: str, eos_ids: tuple[int, ...], vocab_size: int, *, required: bool
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
    elif max(ids) >= vocab_size:
        fault = f"gives id {max(ids)} for it, and the model has {vocab_size} rows"
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
