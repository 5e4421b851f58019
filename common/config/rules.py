"""The rules of a key besides its type and range, as marks of its annotation:

    max_rows: Annotated[PositiveInt, Rule.MAY_CHANGE] = 256

pydantic keeps marks in a field's metadata. The mark of a section holds for every key below it.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, get_args, get_origin

from latent_grpo.common.config.section import Section


class Rule(Enum):
    """A rule. Its value completes a sentence that begins with "this key"."""

    MAY_CHANGE = "may change when a run is resumed"
    """The key decides where and how fast, not what is computed."""
    LAST_BIT = "is kept by a deterministic run that is resumed, since it decides the last bit"
    OBJECTIVE = "is left to the new algorithm's default when an override changes `algorithm`"
    LATENT_ONLY = "has no effect with the algorithm `grpo`"
    TOKENS = "must be equal where `reproduce` checks tokenizer, chain and problems of several units at once"


def section_in(annotation: Any) -> tuple[tuple[str, ...], type[Section]] | None:
    """Returns the section that a field holds, and the part between their keys: `N` for an index, `NAME` for a name."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return (), annotation
    own: dict[Any, tuple[str, ...]] = {list: ("N",), dict: ("NAME",)}
    for part in get_args(annotation):
        if found := section_in(part):
            between, section = found
            return (*own.get(get_origin(annotation), ()), *between), section
    return None


def keys_with(model: type[Section], rule: Rule) -> tuple[str, ...]:
    """Returns the dotted keys that have a rule, in order of definition; where a section has it, the section alone."""
    found: list[str] = []
    for name, info in model.model_fields.items():
        if rule in info.metadata:
            found.append(name)
        elif below := section_in(info.annotation):
            between, section = below
            found += [".".join((name, *between, key)) for key in keys_with(section, rule)]
    return tuple(found)


def rules_of(model: type[Section], key: str) -> frozenset[Rule]:
    """Returns the rules of a dotted key (`tasks.0.path`), those of its sections included."""
    found: set[Rule] = set()
    parts = iter(key.split("."))
    for part in parts:
        info = model.model_fields.get(part)
        if info is None:
            break
        found.update(mark for mark in info.metadata if isinstance(mark, Rule))
        below = section_in(info.annotation)
        if below is None:
            break
        between, model = below
        for _ in between:
            next(parts, None)
    return frozenset(found)
