"""The loading of a RunConfig from a profile with overrides, with one line for each fault."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from latent_grpo.common.config.rules import section_in
from latent_grpo.common.config.run import LATENT_ONLY_KEYS, OBJECTIVE_KEYS, RunConfig
from latent_grpo.common.config.section import Section
from latent_grpo.common.config.yaml_files import merged, parse_override, read_mapping, with_value, without
from latent_grpo.common.errors import ConfigError

SIZES = "sizes"
"""Key of a profile that is no setting: what changes with the number of GPUs, by that number."""


def load_config(
    source: str | Path | dict[str, Any], overrides: Sequence[str] = (), gpus: float | None = None
) -> RunConfig:
    """Reads a profile (name, path or mapping), applies dotted overrides and validates.

    `overrides` are `key.sub=value`, with the value in YAML and list items by index (`tasks.0.path=x`). When an override
    changes `algorithm`, the file's keys of the objective give way to the new algorithm's defaults (METHOD §9), so that
    `algorithm=soft_grpo` is Soft-GRPO on every profile; for `grpo` all latent-only keys of the file are left out. Keys
    given as overrides stay. With `gpus` the profile's keys for that number of GPUs (`sizes`) are applied before them.
    Raises :class:`ConfigError` with one line per fault.
    """
    data = dict(source) if isinstance(source, dict) else read_profile(source)
    sizes = data.pop(SIZES, None)
    if gpus is not None and sizes is not None:
        data = merged(data, _size(sizes, gpus))
    changed = [parse_override(o) for o in overrides]
    algorithm = next((value for path, value in reversed(changed) if path == ["algorithm"]), None)
    if algorithm not in (None, data.get("algorithm", RunConfig.model_fields["algorithm"].default)):
        for key in OBJECTIVE_KEYS.union(LATENT_ONLY_KEYS if algorithm == "grpo" else ()):
            data = without(data, key.split("."))
        if algorithm == "grpo" and isinstance(data.get("warm_start"), dict):
            data["warm_start"] = {**data["warm_start"], "chain": "explicit"}
    for path, value in changed:
        data = with_value(data, path, value, ".".join(path))
    config = parse_config(data)
    if not isinstance(source, dict):  # a run's own settings may name a folder that was moved
        for key in ("runs_folder", "work_folder"):
            _check_variables(key, getattr(config, key))
    return config


def _check_variables(key: str, folder: str) -> None:
    """Raises ConfigError for a variable of the environment in a folder that would be made, as nobody writes it out.

    A folder that is there may have such a name; any other path of the settings must be there anyway.
    """
    for variable in re.finditer(r"\$([A-Za-z_]\w*|\{[A-Za-z_]\w*\})[^/]*", folder):
        if not Path(named := folder[: variable.end()]).exists():
            raise ConfigError(
                f"{key}: ${variable[1]} is not written out here; write the path in full, got {folder!r} (or make "
                f"{named}, if that is its name)"
            )


def _size(sizes: Any, gpus: float) -> dict[str, Any]:
    if not isinstance(sizes, dict) or not all(isinstance(n, int) and isinstance(of, dict) for n, of in sizes.items()):
        raise ConfigError(f"{SIZES}: expected a mapping of numbers of GPUs to settings, got {sizes!r}")
    if gpus not in sizes:
        listed = ", ".join(map(str, sorted(sizes)))
        raise ConfigError(
            f"--gpus {gpus:g}: the profile has settings for {listed} GPUs; take a smaller number and add workers, "
            "for example with rollout.workers=12"
        )
    return dict(sizes[int(gpus)])


def of_model(path: str) -> list[str]:
    """Returns overrides that replace a profile's model by a finished one."""
    return [f"model.path={path}", "model.new=null", "warm_start=null"]


def parse_config(data: dict[str, Any]) -> RunConfig:
    """Validates a mapping. Raises :class:`ConfigError`, which names every faulty key."""
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(*_explained(error)) from error
    if faults := list(_unusable_numbers(data, (), RunConfig)):
        raise ConfigError(*faults)
    return config


def _unusable_numbers(
    node: Any, above: tuple[str, ...], model: type[Section] | None, kinds: Collection[Any] = ()
) -> Iterator[str]:
    """Yields a line for each number that no column and no generator could hold, in free options too, and for each
    boolean in a number's place, which pydantic reads as 0 or 1. `model` is the section of a node's keys, and `kinds`
    are the types of what the key above it may hold."""
    if isinstance(node, dict):
        for key, value in node.items():
            info = None if model is None else model.model_fields.get(str(key))
            below = None if info is None else section_in(info.annotation)
            of_key = kinds if model is None else _kinds(info.annotation) if info else ()
            yield from _unusable_numbers(value, (*above, str(key)), below[1] if below else None, of_key)
    elif isinstance(node, list):
        for place, value in enumerate(node):
            yield from _unusable_numbers(value, (*above, str(place)), model, kinds)
    elif isinstance(node, bool) and {int, float}.intersection(kinds) and not {bool, Any}.intersection(kinds):
        yield f"{'.'.join(above)}: expected a number, got {str(node).lower()}"
    elif isinstance(node, float) and not math.isfinite(node):
        yield f"{'.'.join(above)}: expected a finite number, got {node}"
    elif isinstance(node, int) and not -(2**63) <= node < 2**63:
        shown = str(node) if abs(node) < 10**40 else f"{str(node)[:40]}..."
        yield f"{'.'.join(above)}: expected a whole number from -2**63 to 2**63 - 1, got {shown}"


def _kinds(annotation: Any) -> set[Any]:
    """Returns the types that an annotation is made of; of a Literal those of its values."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return {type(value) for value in parts}
    return set().union(*map(_kinds, parts)) if parts else {annotation}


def profiles_folder() -> Path:
    """The folder of the shipped profiles."""
    return Path(__file__).resolve().parents[2] / "deploy" / "profiles"


def read_profile(source: str | Path) -> dict[str, Any]:
    """Reads the mapping of a profile, by name (`quickstart`) or path. `extends: NAME` starts from another profile."""
    return read_mapping(source, profiles_folder(), "profile")


TYPE_IN_LOC = re.compile(r"(int|float|str|bool|none|(literal|list|dict|constrained|function|nullable|lax)\W.*)")
"""What pydantic puts after a key that may have values of several types: the one that it tried."""


def _explained(error: ValidationError) -> list[str]:
    """Returns a line for each faulty key; of a value that may be one of several types, what each of them says."""
    found: dict[str, list[str]] = {}
    for each in error.errors():
        where = ".".join(_shown(part) for part in each["loc"] if not TYPE_IN_LOC.fullmatch(str(part))) or "config"
        said, lines = _explain(each, where), found.setdefault(where, [])
        lines.append(said.removeprefix(f"{where}: ") if lines else said)
    return ["; or ".join(lines) for lines in found.values()]


def _explain(error: ErrorDetails, where: str) -> str:
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key{_nearest(error['loc'])}"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    if error["loc"][-1:] == ("seed",) and error["type"] in ("less_than", "greater_than_equal"):
        return f"{where}: expected a whole number from 0 to 2**63 - 1, got {error['input']!r}"
    if error["type"] == "missing":
        return f"{where}: missing; it has no default"
    return f"{where}: {error['msg']}, got {error['input']!r}"


def _shown(part: int | str) -> str:
    """A part of a key; in quotes where it holds anything that no key of ours has, such as a line break."""
    return str(part) if re.fullmatch(r"[\w-]+", str(part)) else repr(part)


def _nearest(loc: tuple[int | str, ...]) -> str:
    import difflib

    model: type[Section] = RunConfig
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        info = model.model_fields.get(part)
        below = None if info is None else section_in(info.annotation)
        if below is None:
            return ""
        _, model = below
    keys = [info.alias or name for name, info in model.model_fields.items()]
    close = difflib.get_close_matches(str(loc[-1]), keys, n=1)
    return f"; did you mean {close[0]}?" if close else f"; allowed: {', '.join(keys)}"


def config_as_json(config: RunConfig) -> str:
    """Returns the resolved configuration as JSON, every effective default included."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
