"""The reference of the settings as text for a terminal, as JSON, and as the page docs/settings.md."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable
from typing import Any

from latent_grpo.common.config.reference import KeyFacts, SectionFacts, covers, reference
from latent_grpo.common.config.rules import Rule

INTRODUCTION = """\
# Settings

Every key of a run's settings, section by section. This page is made from the models in `common/config/`: change the
sentence beside the key there, then run `latent-grpo settings --markdown > docs/settings.md`.

A run is one YAML profile plus overrides. A key below a section is given as in `latent-grpo train rollout.workers=4`, or
in the profile as

```yaml
rollout:
  workers: 4
```

`latent-grpo settings PREFIX` prints a part of this page (`rollout`, `optimizer.lr`), and
`latent-grpo validate --profile NAME` prints the resolved values of a profile. `METHOD` is [method](method.md), and the
[glossary](glossary.md) explains terms.
"""
FOR_USERS = frozenset(Rule) - {Rule.TOKENS}
"""Rules that a reader can act on; the others are in the JSON only."""


def as_text(prefix: str = "", width: int = 100) -> str:
    """Returns the reference as text for a terminal of `width` columns."""
    lines: list[str] = []
    for section in reference(prefix):
        if section.name and covers(prefix, section):
            about = " ".join(filter(None, (section.text, section.occurrence)))
            lines += [f"[{section.name}]", *textwrap.wrap(about, width), ""]
        for key in section.keys:
            text = " ".join((key.text, *(f"This key {rule.value}." for rule in key.rules if rule in FOR_USERS)))
            lines += [f"{key.name}: {key.type}; {_default(key)}", *textwrap.wrap(text, width, **_INDENT), ""]
    return "\n".join(lines).rstrip() + "\n"


def as_json(prefix: str = "") -> str:
    """Returns the reference as JSON: one object per key, and the sections' texts."""
    sections = reference(prefix)
    about = [
        {"section": s.name, "occurrence": s.occurrence, "rules": _names(s.rules), "description": s.text}
        for s in sections
        if covers(prefix, s)
    ]
    keys = [
        {
            "key": key.name,
            "type": key.type,
            "allowed": list(key.allowed) or None,
            "required": key.required,
            "default": key.default,
            "default_by_algorithm": dict(key.by_algorithm) or None,
            "rules": _names(key.rules),
            "description": key.text,
        }
        for section in sections
        for key in section.keys
    ]
    return json.dumps({"sections": about, "keys": keys}, indent=2, ensure_ascii=False) + "\n"


def as_markdown(prefix: str = "") -> str:
    """Returns the page docs/settings.md, with one table per section."""
    sections = reference(prefix)
    parts = [] if prefix else [INTRODUCTION, _filled("Sections: " + ", ".join(map(_link, sections)) + ".")]
    for section in sections:
        parts.append(f"{'###' if '.' in section.name else '##'} {_title(section)}\n")
        rules = [f"Every key here {rule.value}." for rule in section.rules if rule in FOR_USERS]
        parts.append(_filled(" ".join(filter(None, (section.text, section.occurrence, *rules)))))
        rows = [_row(key, section.rules) for key in section.keys]
        parts.append("\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


_INDENT: dict[str, Any] = {"initial_indent": "    ", "subsequent_indent": "    "}


def _title(section: SectionFacts) -> str:
    return section.name or "Top level"


def _link(section: SectionFacts) -> str:
    """Links to the section's heading, by the anchor that GitHub gives it."""
    return f"[{_title(section)}](#{_title(section).lower().replace('.', '').replace(' ', '-')})"


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def _row(key: KeyFacts, known: tuple[Rule, ...]) -> str:
    """Returns a key's row; rules of the whole section (`known`) stand above the table."""
    name = key.name.rpartition(".")[2]
    values = ", ".join(f"`{_value(value)}`" for value in key.allowed) or key.type
    rules = [f"*This key {rule.value}.*" for rule in key.rules if rule in FOR_USERS.difference(known)]
    cells = (f"`{name}`", values, _default(key, quote="`", word=""), " ".join((key.text, *rules)))
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(key: KeyFacts, quote: str = "", word: str = "default ") -> str:
    if key.required:
        return "required"
    if not key.by_algorithm:
        return f"{word}{quote}{_value(key.default)}{quote}"
    by_value: dict[str, list[str]] = {}
    for algorithm, value in key.by_algorithm.items():
        by_value.setdefault(_value(value), []).append(algorithm)
    return word + "; ".join(f"{quote}{value}{quote} for {', '.join(names)}" for value, names in by_value.items())


def _value(value: Any) -> str:
    """Formats a value as YAML accepts it."""
    if isinstance(value, str) and re.fullmatch(r"[\w<>/.-]+", value):
        return value
    return re.sub(r"e-0(\d)", r"e-\1", json.dumps(value))


def _names(rules: Iterable[Rule]) -> list[str]:
    return [rule.name.lower() for rule in rules]
