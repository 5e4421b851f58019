"""Secrets in texts that are shown or stored: which names mean one, and how a text is redacted.

A secret is the value of an environment variable whose name says so (`*_TOKEN`, `*_KEY`, `HF_*`, `WANDB_*`, ...), the
value that a setting or option of such a name has in a text, and the user and password of a URL.

    >>> redacted("judge.options.api_key=abcd1234 https://me:pass@host/x", environment={})
    'judge.options.api_key=[redacted] https://[redacted]@host/x'
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"
SHORTEST = 8  # characters of a variable's value that is looked for: a shorter one stands in texts by chance
_SETTING = (
    r"(?:password|passwd|secret|credentials?|(?:api|access|private|secret)_?key|"
    r"(?:auth|access|api|bearer|hf|hub|refresh|session)_?token)"
)
_NAME = re.compile(rf"(?:.*[_.-])?{_SETTING}s?|(?P<token>(?:.*\.)?token)", re.IGNORECASE)
_PLACE = re.compile(r"(?:\.\d+)+$")  # in a list
_SPECIAL_TOKEN = re.compile(r"<[^<>]*>|\d+")  # a tokenizer's: its text or its id
_VARIABLE = re.compile(r".*_(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)|(?:HF|WANDB)_.*", re.IGNORECASE)
_HARMLESS = re.compile(r"(?:HF|WANDB)_(?:HOME|HUB_\w*|DATASETS_\w*|ENDPOINT|MODE|DIR|PROJECT|ENTITY|BASE_URL)")
_ASSIGNED = re.compile(
    rf"""(?P<name>(?<![\w.-])(?:--)?(?:[\w.-]*[_.-])?(?:{_SETTING}|(?<![_-])token)|(?-i:\b[A-Z][A-Z0-9_]*_(?:TOKEN|KEY)))
    (?P<between>["']?\s*=\s*["']?|["']:\s*["'])(?P<value>[^\s"',&}}]+)""",
    re.IGNORECASE | re.VERBOSE,
)
_OPTION = re.compile(rf"(--(?:[\w.-]*[_.-])?(?:{_SETTING}|(?<![_-])token)\s+)(\S+)", re.IGNORECASE)
_URL = re.compile(r"""(?<=://)[^/\s@'"]+(?=@)""")


def secret_variables(environment: Mapping[str, str]) -> set[str]:
    """Returns the names of the variables that hold a secret, by their names."""
    return {name for name in environment if _VARIABLE.fullmatch(name) and not _HARMLESS.fullmatch(name)}


def redacted(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Returns the text with `[redacted]` in place of every secret. `environment`: None for this process's own."""
    variables = os.environ if environment is None else environment
    values = {variables[name] for name in secret_variables(variables)}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= SHORTEST and not os.path.exists(value):  # `GPG_KEY=/path` names a file
            text = text.replace(value, REDACTED)
    text = _ASSIGNED.sub(rf"\g<name>\g<between>{REDACTED}", text)
    return _URL.sub(REDACTED, _OPTION.sub(rf"\1{REDACTED}", text))


def literal_secrets(node: Any, key: str = "") -> list[str]:
    """Returns the keys of secrets: a text or number under a secret's name, alone or in a list, a URL with a password.

    `first_token` and `sort_key` are no such names, `token: <eos>` and `token: 9` are a tokenizer's, and a URL in a
    prompt is the model's to read.

    >>> literal_secrets({"verifiers": {"judge": {"options": {"api_key": "abcd1234", "api_key_variable": "JUDGE"}}}})
    ['verifiers.judge.options.api_key']
    """
    if isinstance(node, Mapping):
        return [found for name, value in node.items() for found in literal_secrets(value, f"{key}.{name}".lstrip("."))]
    if isinstance(node, list | tuple):
        return [found for number, value in enumerate(node) for found in literal_secrets(value, f"{key}.{number}")]
    if node is None or isinstance(node, bool) or node == "":
        return []
    text, name = str(node), _NAME.fullmatch(_PLACE.sub("", key))
    if name is not None:
        return [] if name["token"] and _SPECIAL_TOKEN.fullmatch(text) else [key]
    is_prompt = "prompt" in key.split(".")
    return [key] if not is_prompt and re.search(r"""://[^/\s@'":]*:[^/\s@'"]+@""", text) else []
