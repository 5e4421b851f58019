"""The reference of the settings as data, read from the models: each key's type, values, default, rules and sentence.

A key of a list's sections has `N` in the index's place (`tasks.N.path`), one of a mapping's has `NAME`
(`verifiers.NAME.kind`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from latent_grpo.common.config.rules import Rule, section_in
from latent_grpo.common.config.run import ALGORITHM_DEFAULTS, RunConfig
from latent_grpo.common.config.section import Section
from latent_grpo.common.errors import ConfigError

NEAREST = 5  # keys that the message about an unknown key lists
PLAIN = {bool: "true or false", int: "whole number", float: "number", str: "text", NoneType: "null", Any: "any value"}
BOUNDS = ((Gt, "gt", ">"), (Ge, "ge", ">="), (Lt, "lt", "<"), (Le, "le", "<="))


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFacts:
    """The facts of one key."""

    name: str
    type: str  # in words, e.g. "whole number >= 1, or null"
    allowed: tuple[Any, ...]  # the values of a choice; empty where the type says it
    required: bool
    default: Any  # None where required
    by_algorithm: Mapping[str, Any]  # algorithm -> default; empty where the algorithm does not decide
    rules: tuple[Rule, ...]  # those of its sections included
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionFacts:
    """A section: its text and its own keys."""

    name: str  # "" for the top level
    occurrence: str  # a sentence on whether it is optional, or one of several; empty where neither
    rules: tuple[Rule, ...]
    text: str
    keys: tuple[KeyFacts, ...]


def reference(prefix: str = "") -> tuple[SectionFacts, ...]:
    """Returns the sections, each before those inside it, with the keys at or below `prefix`.

    Raises :class:`ConfigError` for a prefix that no key has, with the nearest keys.
    """
    everything = tuple(_sections(RunConfig, "", RunConfig.__doc__ or "", "", frozenset(), None))
    if not prefix:
        return everything
    wanted = prefix.split(".")
    chosen = [
        replace(section, keys=tuple(key for key in section.keys if _below(key.name, wanted))) for section in everything
    ]
    found = tuple(section for section in chosen if section.keys)
    if not found:
        raise ConfigError(f"there is no key or section {prefix!r}; {_nearest(prefix, everything)}")
    return found


def covers(prefix: str, section: SectionFacts) -> bool:
    """Whether `prefix` means the whole section, and not only some of its keys."""
    return not prefix or _below(section.name, prefix.split("."))


def _sections(
    model: type[Section], name: str, text: str, occurrence: str, rules: frozenset[Rule], defaults: Section | None
) -> Iterator[SectionFacts]:
    """Yields the section `name` and all below it. `defaults` is its default instance, if it has one."""
    own: list[KeyFacts] = []
    inside: list[Iterator[SectionFacts]] = []
    for field, info in model.model_fields.items():
        key = f"{name}.{info.alias or field}" if name else field
        default = getattr(defaults, field) if defaults is not None else info.get_default(call_default_factory=True)
        marks = rules.union(mark for mark in info.metadata if isinstance(mark, Rule))
        below = section_in(info.annotation)
        if below is None:
            own.append(_key(key, info, default, marks))
        else:
            between, section = below
            inside.append(
                _sections(
                    section,
                    ".".join((key, *between)),
                    " ".join(filter(None, (info.description, section.__doc__))),
                    _occurrence(between, default),
                    marks,
                    default if isinstance(default, Section) else None,
                )
            )
    yield SectionFacts(
        name=name,
        occurrence=occurrence,
        rules=_in_order(rules),
        text=_one_line(text),
        keys=tuple(own),
    )
    for sections in inside:
        yield from sections


def _key(name: str, info: FieldInfo, default: Any, rules: frozenset[Rule]) -> KeyFacts:
    kind = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    by_algorithm = {algorithm: values[name] for algorithm, values in ALGORITHM_DEFAULTS.items() if name in values}
    words, allowed = _type(kind)
    required = default is PydanticUndefined
    return KeyFacts(
        name=name,
        type=words.removesuffix(", or null") if by_algorithm else words,
        allowed=tuple(value for value in allowed if value is not None) if by_algorithm else allowed,
        required=required,
        default=None if required else default,
        by_algorithm=by_algorithm,
        rules=_in_order(rules),
        text=_one_line(info.description or ""),
    )


def _occurrence(between: tuple[str, ...], default: Any) -> str:
    if between == ("N",):
        extent = "at least one is required" if default is PydanticUndefined else "empty by default"
        return f"A list of such sections, {extent}; N is an index from 0."
    if between == ("NAME",):
        return "A mapping of names to such sections, empty by default."
    if default is None:
        return "Optional: null by default."
    return ""


def _type(kind: Any) -> tuple[str, tuple[Any, ...]]:
    """Returns a type in words, and the values that it allows if it is a choice."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        words, allowed = _type(parts[0])
        return _with_bounds(words, _bounds(parts[1:])), allowed
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts)), parts
    if origin in (Union, UnionType):
        nullable = NoneType in parts
        described = [_type(part) for part in parts if part is not NoneType]
        closed = all(allowed for _, allowed in described)  # a number or some word is no choice
        texts = [words if closed else words.removeprefix("one of ") for words, _ in described]
        words = ", or ".join(dict.fromkeys(texts))
        choices = [value for _, allowed in described for value in allowed if closed]
        return words + (", or null" if nullable else ""), (*choices, *((None,) if nullable and choices else ()))
    if origin is list:
        return f"list of items ({_type(parts[0])[0]})", ()
    if origin is tuple:
        return f"list of {len(parts)} items ({_type(parts[0])[0]})", ()
    if origin is dict:
        return f"mapping of names to values ({_type(parts[1])[0]})", ()
    return PLAIN[kind], ()


def _bounds(marks: tuple[Any, ...]) -> list[str]:
    """Returns bounds such as `>= 1` from pydantic's and annotated-types' marks."""
    flat = [mark for outer in marks for mark in (outer.metadata if isinstance(outer, FieldInfo) else (outer,))]
    return [
        f"{sign} {_limit(getattr(mark, limit))}"
        for kind, limit, sign in BOUNDS
        for mark in flat
        if isinstance(mark, kind)
    ]


def _limit(value: Any) -> str:
    large = isinstance(value, int) and value > 2**53 and value & (value - 1) == 0
    return f"2^{value.bit_length() - 1}" if large else f"{value:g}"


def _with_bounds(words: str, bounds: list[str]) -> str:
    return f"{words} {' and '.join(bounds)}" if bounds else words


def _in_order(rules: frozenset[Rule]) -> tuple[Rule, ...]:
    return tuple(rule for rule in Rule if rule in rules)


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _below(name: str, wanted: list[str]) -> bool:
    """Whether a key is `wanted` or lies below it; an index may stand for `N`, anything for `NAME`."""
    parts = name.split(".")
    return len(parts) >= len(wanted) and all(
        part in (asked, "NAME") or (part == "N" and asked.isdigit()) for part, asked in zip(parts, wanted)
    )


def _nearest(prefix: str, everything: tuple[SectionFacts, ...]) -> str:
    keys = [key.name for section in everything for key in section.keys]
    names = [section.name for section in everything if section.name] + keys
    last = prefix.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    close = difflib.get_close_matches(prefix, names, n=NEAREST)
    found = list(dict.fromkeys((*same, *close)))[:NEAREST]
    if not found:  # no whole key is similar, so only last parts are compared
        ends = difflib.get_close_matches(last, {name.rpartition(".")[2] for name in names}, n=2)
        found = [name for name in names if name.rpartition(".")[2] in ends][:NEAREST]
    return f"the nearest: {', '.join(found)}" if found else "`latent-grpo settings` lists all"
