"""Mappings of YAML files, one extending another, and dotted overrides of their values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from latent_grpo.common.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """A loader of YAML 1.2's scalars: `off` is a word (a value of several settings), `1e-6` is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|nan|NaN))$"
    ),
    [*"-+0123456789."],
)


def read_mapping(source: str | Path, folder: Path, what: str) -> dict[str, Any]:
    """Reads a YAML file, by its name in `folder` or by path; errors call it `what`."""
    path = Path(source)
    if path.suffix not in {".yaml", ".yml", ".json"}:
        path = folder / f"{source}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ConfigError(f"no {what} {str(source)!r}: give a YAML file or one of {', '.join(known)}")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(data).__name__}")
    base = data.pop("extends", None)
    return merged(read_mapping(base, folder, what), data) if base else data


def parse_override(text: str) -> tuple[list[str], Any]:
    """Parses `a.b=1` into (["a", "b"], 1)."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r}: expected key=value, for example rollout.workers=4")
    try:
        parsed = yaml.load(value, _Loader) if value else None
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {error}") from error
    return key.strip().split("."), parsed


def with_value(node: Any, path: list[str], value: Any, whole: str) -> Any:
    """Returns a copy of `node` with the value at `path` set."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(node, list):
        if not head.isdigit() or int(head) >= len(node):
            raise ConfigError(f"override {whole}: expected an index below {len(node)} at {head!r}")
        return [with_value(v, rest, value, whole) if i == int(head) else v for i, v in enumerate(node)]
    if node is None:
        node = {}
    if not isinstance(node, dict):
        raise ConfigError(f"override {whole}: {head!r} lies below a plain value ({node!r})")
    return {**node, head: with_value(node.get(head), rest, value, whole)}


def without(node: Any, path: list[str]) -> Any:
    """Returns a copy of `node` without the key at `path`, or `node` itself if it has no such key."""
    head, rest = path[0], path[1:]
    if not isinstance(node, dict) or head not in node:
        return node
    if rest:
        return {**node, head: without(node[head], rest)}
    return {key: value for key, value in node.items() if key != head}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Returns `base` with the keys of `over`, section by section."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result
