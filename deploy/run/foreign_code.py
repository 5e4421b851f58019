"""A user's own code in a run's settings: which import paths they name, and which of them a command may run.

An import path (`package.module:Name`) in `verifiers`, `tasks` or `metrics.sinks` is a program. Settings come from
three places, and only two of them are the user's own word:

    a profile or an override that the command names    runs, after it is printed (:func:`announced`)
    `config.json` of a run's folder                    runs if the folder belongs to the user (:func:`check_origin`)
    the same, of somebody else's folder, or copied     runs only with `--allow-plugins MODULE`
    from an object store, whose writers nobody knows

Commands that only look (`validate`, `plan`, `inspect`, `report`, `replay`, `doctor`) run none of it: they pass the
paths to `deploy.run.preparation.check` as those to leave out, and say so with :func:`left_out_sentence`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.common.plugins import is_import_path
from latent_grpo.common.tasks.generator import PREFIX
from latent_grpo.deploy.run.storage.twin import foreign
from latent_grpo.rollout_workers.verifiers import OWN


@dataclass(frozen=True, slots=True)
class NamedCode:
    """An import path, and the key of the settings that names it.

    >>> str(NamedCode("verifiers.mine.kind", "my_rewards:Exact"))
    'my_rewards:Exact (verifiers.mine.kind)'
    """

    key: str
    path: str

    def __str__(self) -> str:
        return f"{self.path} ({self.key})"

    @property
    def module(self) -> str:
        """The module of the import path."""
        return self.path.partition(":")[0]


def named_code(config: RunConfig) -> list[NamedCode]:
    """Returns what the settings name by import path, each path once, in the order of the keys; imports nothing."""
    found: dict[str, NamedCode] = {}
    for code in _all_of(config):
        found.setdefault(code.path, code)
    return list(found.values())


def without_code(config: RunConfig, allowed: Sequence[str] = ()) -> list[NamedCode]:
    """Returns what a command that only looks leaves out: all but the `allowed` modules or paths."""
    return [code for code in named_code(config) if not _is_allowed(code, allowed)]


def left_out_sentence(codes: Collection[NamedCode]) -> str:
    """Says in one line what was not checked since it would run code that the settings name."""
    modules = ",".join(dict.fromkeys(code.module for code in codes))
    return (
        f"not checked, since it would run code that the settings name: {', '.join(map(str, codes))}; "
        f"if you trust it, give --allow-plugins {modules}"
    )


def announced(config: RunConfig) -> list[str]:
    """Returns the lines that a command prints before it runs what the settings name."""
    codes = named_code(config)
    return [f"runs code that the settings name: {', '.join(map(str, codes))}"] if codes else []


def check_origin(
    folder: Path,
    config: RunConfig,
    overrides: Sequence[str] = (),
    allowed: Sequence[str] = (),
    *,
    user: int | None = None,
) -> None:
    """Raises ConfigError where the settings come from somebody else's run folder and name code to run.

    `overrides` are the command's own, and `allowed` the modules or import paths that it names besides; what they name
    may run. `user` is the uid that the folder must belong to; None: the one that runs this process.
    """
    if (whose := foreign(folder, user)) is not None:
        check_code(whose, config, overrides, allowed)


def check_code(whose: str, config: RunConfig, overrides: Sequence[str], allowed: Sequence[str]) -> None:
    """Raises ConfigError where settings of others, as `whose` says, name code that the command does not."""
    refused = [c for c in named_code(config) if not _is_allowed(c, allowed) and not _is_in(c.path, overrides)]
    if refused:
        modules = ",".join(dict.fromkeys(code.module for code in refused))
        raise ConfigError(
            f"{whose}, and its config.json names code that this command would run: "
            f"{', '.join(map(str, refused))}; if you trust it, give --allow-plugins {modules}"
        )


def _is_allowed(code: NamedCode, allowed: Iterable[str]) -> bool:
    return any(code.path == name or code.module == name or code.module.startswith(f"{name}.") for name in allowed)


def _is_in(path: str, overrides: Iterable[str]) -> bool:
    """Whether the value of one of a command's overrides names the path."""
    word = re.compile(rf"(?<![\w.]){re.escape(path)}(?!\w)")
    return any(word.search(override.partition("=")[2]) for override in overrides)


def _all_of(config: RunConfig) -> Iterator[NamedCode]:
    for section, tasks in (("tasks", config.tasks), ("evaluation.tasks", config.evaluation.tasks)):
        for number, task in enumerate(tasks):
            if task.path is not None and task.path.startswith(PREFIX):
                yield NamedCode(f"{section}.{number}.path", task.path.removeprefix(PREFIX))
            yield from _kinds({"kind": task.verifier}, f"{section}.{number}.verifier")
    for name, definition in config.verifiers.items():
        yield from _kinds(definition.model_dump(), f"verifiers.{name}")
    for number, sink in enumerate(config.metrics.sinks):
        if is_import_path(sink):
            yield NamedCode(f"metrics.sinks.{number}", sink)


def _kinds(node: Any, key: str) -> Iterator[NamedCode]:
    """Every import path that stands as a `kind` in a verifier's definition, however deep."""
    if isinstance(node, dict):
        kind = node.get("kind")
        if isinstance(kind, str) and is_import_path(kind) and kind not in OWN:
            yield NamedCode(key, kind)
        for name, value in node.items():
            yield from _kinds(value, f"{key}.{name}")
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from _kinds(value, f"{key}.{number}")
