"""The check that a suite's models and problem files exist and can be used, before anything runs.

Whatever is on this machine is read as the unit would read it, except for weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from latent_grpo.common.config import ConfigError, RunConfig, TaskConfig
from latent_grpo.common.config.rules import Rule, keys_with
from latent_grpo.common.tasks.sources import is_generated
from latent_grpo.common.tasks.tables import exists
from latent_grpo.deploy.reproduce.suite import Suite, SuiteError, Unit, unit_config
from latent_grpo.deploy.run.preparation import check, file_faults
from latent_grpo.deploy.run.problems import read_task


def _including(keys: Iterable[str]) -> dict[str, Any]:
    """Turns dotted keys into pydantic's `include`."""
    include: dict[str, Any] = {}
    for key in keys:
        *sections, leaf = key.split(".")
        inner = include
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = True
    return include


DECIDE_TOKENS = _including(keys_with(RunConfig, Rule.TOKENS))
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # no ./name


def check_inputs(suite: Suite, units: Iterable[Unit], folder: Path) -> list[str]:
    """Checks the inputs of `units` and returns a line for each that could not be checked.

    Raises :class:`SuiteError` with a line for everything that is missing, for tokenizers, chains and generated problems
    that do not fit a unit's settings, and for evaluation files that cannot be graded.
    """
    faults: dict[str, list[str]] = {}
    notes: dict[str, None] = {}
    found_before: dict[str, str | None] = {}  # question -> fault; units share models and files

    def fault(question: str, check_it: Callable[[], object]) -> list[str]:
        if question not in found_before:
            found_before[question] = _fault(check_it)
        found = found_before[question]
        return [] if found is None else [found]

    for unit in units:
        config = unit_config(suite, unit, folder)
        found = file_faults(config)
        key, model = _given_model(suite, unit, config)
        if model is not None and not Path(model).is_dir():
            if HUB_ID.fullmatch(model):
                notes[f"{key}: {model} is no folder here; it was taken for a hub id and not checked"] = None
            else:
                found.append(f"{key}: there is no folder {model}; give a model's folder or a hub id (owner/name)")
        named = "" if model is None else f"{key}, {model}: "
        inputs = partial(check, config, elsewhere=True, stored=False)
        found += [named + line for line in fault(_of_tokens(config), inputs)]
        for task in filter(_is_here, config.evaluation.tasks):
            found += fault(_of_task(task, config), partial(read_task, task, config, whole=True))
        for line in found:
            faults.setdefault(line, []).append(unit.key)
    if faults:
        lines = (f"{line} ({_shown(keys)})" for line, keys in faults.items())
        raise SuiteError(f"suite {suite.title} cannot start here:", *lines, *notes)
    return list(notes)


def _given_model(suite: Suite, unit: Unit, config: RunConfig) -> tuple[str, str | None]:
    """Returns the key that names the unit's model (of a new one, its tokenizer), and that; None if it is made."""
    start = unit.name if unit.is_start else suite.arms[unit.name].start
    if suite.starts[start].path is not None:
        return f"starts.{start}.path", config.model.path
    key = "model.path" if config.model.new is None else "model.new.tokenizer"
    return f"{key} (profile {suite.profile})", config.model.source if unit.is_start else None


def _fault(check_it: Callable[[], object]) -> str | None:
    try:
        check_it()
    except ConfigError as error:
        return str(error)
    return None


def _of_tokens(config: RunConfig) -> str:
    """Returns what decides whether a unit's tokenizer and chain fit, which is equal for most arms of a start."""
    seed = None if config.warm_start is None else config.seed  # of the generated problems that it learns from
    decide = DECIDE_TOKENS | {"verifiers": True, "rollout": {"engine": True, "vllm": True, "verifier": True}}
    return f"tokens {seed} {config.model_dump_json(include=decide)}"


def _of_task(task: TaskConfig, config: RunConfig) -> str:
    return f"task {task.model_dump_json()} {config.model_dump_json(include={'verifiers'})}"


def _is_here(task: TaskConfig) -> bool:
    path = task.path or "hf:"
    return is_generated(task) or (not path.startswith("hf:") and exists(path))


def _shown(keys: list[str]) -> str:
    return keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
