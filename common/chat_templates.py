"""Chats rendered by a tokenizer's own template, whose faults become one line: a template may raise, drop or cut a
message, draw at random, or print the day's date.

A prompt without its problem would be trained on for weeks: it differs from a good one in nothing that is measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from latent_grpo.common.config import DATE_FORMAT, ConfigError
from latent_grpo.common.model_files import words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = Sequence[Mapping[str, str]]
MARK = f'first-mark\n\n{"what is 1 + 1? " * 200}is \\frac{{1}}{{2}} <b> & "last"-mark'
"""A problem that every template must print whole, as long as long ones, with all that it may take for markup."""
SYSTEM_MARK = "system-mark"
RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")
NOW = re.compile(r"\bstrftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
INSTEAD = "set prompt.user instead of prompt.system, or prompt.format to a plain-text prompt with {problem}"
PLAIN = "set prompt.format to a plain-text prompt with {problem}, or use a tokenizer with another template"
QUOTED = 60  # characters of a message in an error


def render_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat, date: str) -> str:
    """Returns a chat's text, ready for the model's answer. Templates that print a date print `date`.

    Raises ConfigError where the template raises, and where a system or user message is not in the text.
    """
    try:
        text = _applied(tokenizer, chat, date)
    except Exception as error:  # a template is code, and raises what its author chose
        raise ConfigError(f"{_blamed(tokenizer, chat, date)} ({words(error)}); {_advice(chat)}") from error
    for message in chat:
        content = message["content"].strip()
        if message["role"] in ("system", "user") and content not in text and not _contains(text, content):
            short = content if len(content) <= QUOTED else f"{content[:QUOTED]}..."
            raise ConfigError(
                f"the tokenizer's chat template does not print its {message['role']} message whole ({short!r}); "
                f"{INSTEAD if message['role'] == 'system' else PLAIN}"
            )
    return text


def check_template(tokenizer: PreTrainedTokenizerBase, system: str | None, date: str) -> None:
    """Raises ConfigError for a template that cannot be used: with a long problem, and with a system message if the run
    has one (`prompt.system`)."""
    if RANDOM.search(template_of(tokenizer)):
        raise ConfigError(f"the tokenizer's chat template draws at random, so prompts would differ; {PLAIN}")
    chat = [] if system is None else [{"role": "system", "content": SYSTEM_MARK}]
    render_chat(tokenizer, [*chat, {"role": "user", "content": MARK}], date)


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the text of the template that renders a chat without tools; empty if there is none."""
    chosen: Any = tokenizer.chat_template
    return str(chosen.get("default", "")) if isinstance(chosen, dict) else chosen or ""


@cache
def _day(date: str) -> datetime:
    return datetime.strptime(date, DATE_FORMAT)


def pinned_template(template: str, date: str) -> str:
    """Returns a template whose `strftime_now("...")` is `date`, for a program that would take the day's."""
    day = _day(date)
    return NOW.sub(lambda found: repr(day.strftime(found["format"])), template)


def _applied(tokenizer: PreTrainedTokenizerBase, chat: Chat, date: str) -> str:
    # the function is for formats that are no literals; transformers 5.24 hands none on, and such a template is refused
    dates: dict[str, Any] = {"date_string": date, "strftime_now": _day(date).strftime}
    template = pinned_template(template_of(tokenizer), date) or None
    return str(
        tokenizer.apply_chat_template(
            [dict(message) for message in chat],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            **dates,
        )
    )


def _contains(text: str, content: str) -> bool:
    """Whether a text has all words of a message in order; a template may set its white space anew."""
    return " ".join(content.split()) in " ".join(text.split())


def _blamed(tokenizer: PreTrainedTokenizerBase, chat: Chat, date: str) -> str:
    """Returns what a template refuses: the system message if it takes the chat without it, else the whole chat."""
    others = [message for message in chat if message["role"] != "system"]
    if len(others) < len(chat):
        try:
            _applied(tokenizer, others, date)
        except Exception:  # as in render_chat
            return "the tokenizer's chat template fails"
        return "the tokenizer's chat template refuses a system message"
    roles = ", ".join(dict.fromkeys(message["role"] for message in chat))
    return f"the tokenizer's chat template fails on messages of the roles {roles}"


def _advice(chat: Chat) -> str:
    return INSTEAD if any(message["role"] == "system" for message in chat) else PLAIN
