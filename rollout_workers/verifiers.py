"""The verifiers of a run: it resolves their names, checks that they can be built, and makes one worker's pool."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.common.errors import RunError
from latent_grpo.reward.dispatcher import GraderStartError
from latent_grpo.reward.pool import VerifierPool
from latent_grpo.reward.verifier import (
    Definitions,
    UnknownVerifierError,
    Verifier,
    import_path_of,
    registered_kinds,
)

OWN = frozenset(import_path_of(kind) for kind in registered_kinds())
"""Import paths of this program's own verifiers, for which registered names stand."""


class GraderError(RunError):
    """Grader processes do not start, or end before they can grade."""


@contextlib.contextmanager
def reward_errors() -> Iterator[None]:
    """Turns the errors of `reward/`, which imports nothing from the other packages, into this program's."""
    try:
        yield
    except UnknownVerifierError as error:
        raise ConfigError(str(error)) from error
    except GraderStartError as error:
        raise GraderError(str(error)) from error


def verifier_pool(config: RunConfig) -> VerifierPool:
    """Makes the verifier pool of one worker, with the run's limits and names."""
    settings = config.rollout.verifier
    return VerifierPool(
        settings.processes,
        settings.time_limit_s,
        settings.memory_limit_bytes,
        options=_options(config),
        definitions=_definitions(config),
    )


def build_verifier(config: RunConfig, kind: str) -> Verifier:
    """Builds, in this process, the verifier that a task names. Raises ConfigError if it cannot be imported or built."""
    with reward_errors():
        try:
            return Definitions(_definitions(config), _options(config)).build(kind)
        except (UnknownVerifierError, KeyboardInterrupt):
            raise
        except (Exception, SystemExit) as error:  # the constructor of a user's verifier may do anything
            raise ConfigError(
                f"Verifier {kind!r} cannot be built: its constructor ended with {type(error).__name__}: {error}. "
                "Correct the constructor, or name another verifier"
            ) from error


def code_of(config: RunConfig, kind: str) -> set[str]:
    """Returns the import paths of a user's own code that building a verifier would import, inside compositions too."""
    with reward_errors():
        path, options = Definitions(_definitions(config), _options(config)).resolve(kind)
    return ({path} | _named_inside(options)) - OWN


def check_verifiers(config: RunConfig, *, spare: bool = False, left_out: Collection[str] = ()) -> dict[str, list[str]]:
    """Builds each verifier of the run once; returns each with the names of the tasks that use it.

    Verifiers that need an import path of `left_out` are neither built nor returned. Raises ConfigError for one that
    cannot be built and, unless `spare` ones are allowed, for a definition that no task uses.
    """
    users = _users(config)
    buildable = {kind for kind in (*users, *config.verifiers) if code_of(config, kind).isdisjoint(left_out)}
    for kind in [*users, *config.verifiers]:
        if kind in buildable:
            build_verifier(config, kind)
    unused = sorted(set(config.verifiers) - used_definitions(config))
    if unused and not spare:
        raise ConfigError(f"verifiers.{unused[0]}: no task uses it; set a task's `verifier` to it, or remove it")
    return {kind: tasks for kind, tasks in users.items() if kind in buildable}


def used_definitions(config: RunConfig) -> set[str]:
    """Names of `verifiers` that a task uses, by itself or inside another one."""
    users = _users(config)
    inside = _named_inside([config.verifiers[kind].options for kind in users if kind in config.verifiers])
    return (set(users) | inside) & set(config.verifiers)


def _users(config: RunConfig) -> dict[str, list[str]]:
    """Verifier -> names of the tasks that name it."""
    users: dict[str, list[str]] = {}
    for task in (*config.tasks, *config.evaluation.tasks):
        users.setdefault(task.verifier, []).append(task.name)
    return users


def _named_inside(node: object) -> set[str]:
    """Returns every `kind` inside the options of compositions."""
    if isinstance(node, dict):
        own = {node["kind"]} if isinstance(node.get("kind"), str) else set()
        return own.union(*(_named_inside(value) for value in node.values()))
    return set().union(*(_named_inside(item) for item in node)) if isinstance(node, list) else set()


def _definitions(config: RunConfig) -> dict[str, dict[str, Any]]:
    return {name: definition.model_dump() for name, definition in config.verifiers.items()}


def _options(config: RunConfig) -> dict[str, dict[str, str]]:
    """Returns the options of all kinds that occur in the run, inside compositions too."""
    return {kind: {"fallback": config.rollout.verifier.fallback} for kind in ("math", "number")}
