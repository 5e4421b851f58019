"""Mappings of YAML files, one extending another, and dotted overrides of their values.

What a file says counts as it is written: a key that is given twice, a text that YAML 1.1 would make a number of, and
a parent that leads back to its child are refused or read as text, never reinterpreted.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from latent_grpo.common.errors import ConfigError

SUFFIXES = (".yaml", ".yml", ".json")
LARGEST = 100_000  # values of a file with its aliases written out; profiles have some hundred


class _Loader(yaml.SafeLoader):
    """A loader of YAML 1.2's scalars: `off` is a word (a value of several settings), `1e-6` is a number, and `010`,
    `1:30` and `2026-11-28` are texts."""


_KEPT = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_implicit_resolvers = {first: resolvers for first, resolvers in _KEPT.items() if resolvers}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), [*"-+0123456789"])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
    [*"-+0123456789."],
)


def read_mapping(source: str | Path, folder: Path, what: str) -> dict[str, Any]:
    """Reads a YAML file, by its name in `folder` or by path; errors call it `what`.

    `extends: PARENT` starts from another one: a path is looked for beside the file, then where the program was started,
    a name in `folder`, then beside the file. Raises ConfigError with one line for a file that cannot be read.
    """
    data: dict[str, Any] = {}
    for _, layer in reversed(_layers(source, folder, what)):
        data = merged(data, layer)
    return data


def files_of(source: str | Path, folder: Path, what: str) -> list[Path]:
    """Returns a file and those that it extends, itself first. Raises ConfigError as :func:`read_mapping` does."""
    return [path for path, _ in _layers(source, folder, what)]


def is_path(source: str | Path) -> bool:
    """Whether a profile is given as a file, not by its name."""
    return Path(source).suffix in SUFFIXES


def _layers(source: str | Path, folder: Path, what: str) -> list[tuple[Path, dict[str, Any]]]:
    """Returns a file and its parents with what each says by itself."""
    found: list[tuple[Path, dict[str, Any]]] = []
    path, wanted = _place(source, folder, None), source
    while True:
        if not path.is_file():
            child = f" (extended by {found[-1][0]})" if found else ""
            raise ConfigError(f"no {what} {str(wanted)!r}{child}: give a YAML file or one of {_known(folder)}")
        chain = [*(before.resolve() for before, _ in found), path.resolve()]
        if chain[-1] in chain[:-1]:
            way = " -> ".join(step.name for step in chain[chain.index(chain[-1]) :])
            raise ConfigError(f"{path}: it extends itself ({way}); remove one `extends`")
        data = read_yaml(path)
        wanted = data.pop("extends", None)
        found.append((path, data))
        if wanted is None:
            return found
        if not isinstance(wanted, str) or not wanted:
            raise ConfigError(f"{path}: extends: expected the name or the path of one {what}, got {wanted!r}")
        path = _place(wanted, folder, path.parent)


def _place(source: str | Path, folder: Path, beside: Path | None) -> Path:
    """Returns where a file is, or would be if it is nowhere; `beside`: the folder of the file that extends it."""
    path = Path(source).expanduser() if str(source).startswith("~/") else Path(source)
    if is_path(source):
        near = path if beside is None else beside / path
        return near if near.is_file() else path
    named = folder / f"{source}.yaml"
    near = named if beside is None else beside / f"{source}.yaml"
    return named if named.is_file() or not near.is_file() else near


def _known(folder: Path) -> str:
    return ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the mapping of one file. Raises ConfigError, which names the file and, where that is known, the line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x} in line {line}); save it as UTF-8"
        ) from error
    try:
        data = _constructed(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_in_a_line(error)}") from error
    if data is None:
        raise ConfigError(f"{path}: expected a mapping of keys, got an empty file")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(data).__name__}")
    if other := next((key for key in data if not isinstance(key, str)), None):
        raise ConfigError(f"{path}: expected a mapping of keys, got the key {other!r}; keys are texts")
    return data


def _constructed(text: str) -> Any:
    """Returns the value of a YAML text. Raises ConfigError for a key that is given twice, and for aliases that lead
    back to themselves or grow without bound."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if (size := _checked_size(node, {}, frozenset())) > LARGEST:
            raise ConfigError(f"its aliases write out {size:,} values, at most {LARGEST:,} are allowed")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _checked_size(node: yaml.Node, known: dict[int, int], above: frozenset[int]) -> int:
    """Returns the number of values of a node, aliases written out. `known`: of nodes that were seen, by id."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise ConfigError(f"the alias in line {node.start_mark.line + 1} contains itself")
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    where = f"in lines {lines[key.value]} and {line}" if lines[key.value] != line else f"in line {line}"
                    raise ConfigError(f"key {key.value!r} is given twice, {where}; put both into one")
                lines[key.value] = line
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    known[id(node)] = 1 + sum(_checked_size(part, known, above | {id(node)}) for part in parts)
    return known[id(node)]


def _in_a_line(error: Exception) -> str:
    """Returns what is wrong with a YAML text, and where."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    said = ": ".join(part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part)
    hint = "; indent with spaces, not with tabs" if "'\\t'" in said else ""
    return f"{' '.join(said.split())} (line {mark.line + 1}, column {mark.column + 1}){hint}"


def parse_override(text: str) -> tuple[list[str], Any]:
    """Parses `a.b=1` into (["a", "b"], 1).

    The value is YAML. A plain text counts as it is written, with `#` and line breaks, which YAML would drop.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r}: expected key=value, for example rollout.workers=4")
    try:
        parsed = _override_value(value)
    except ConfigError as error:
        raise ConfigError(f"override {text!r}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"override {text!r}: the value is not valid YAML: {_in_a_line(error)}; a text with signs of YAML goes into "
            "quotes of its own"
        ) from error
    return key.strip().split("."), parsed


def _override_value(value: str) -> Any:
    node = yaml.compose(value, _Loader)
    if node is None:  # nothing, or a comment alone
        return value.strip() or None
    rest = value[node.end_mark.index :].strip()
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if plain and (rest or "\n" in node_text(value, node) or value.lstrip().startswith("&")):
        return value
    if isinstance(node, yaml.ScalarNode) and value.strip() in ("|", ">"):  # a block of no lines
        return value.strip()
    if rest:
        raise ConfigError(f"YAML would drop {rest!r} as a comment; put the whole value into quotes of its own")
    return _constructed(value)


def node_text(text: str, node: yaml.Node) -> str:
    """Returns the part of a text that a node of YAML is made from."""
    return text[node.start_mark.index : node.end_mark.index]


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
