"""Whether the models and problem files that a suite's units begin with are there, asked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from common.config import RunConfig
from deploy.preflight import file_faults
from deploy.suite import Suite, SuiteError, Unit, unit_config

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # no ./name


def check_inputs(suite: Suite, units: Iterable[Unit], folder: Path) -> list[str]:
    """What could not be checked, a line each. Raises :class:`SuiteError` with a line for everything that is missing."""
    faults: dict[str, list[str]] = {}
    notes: dict[str, None] = {}
    for unit in units:
        config = unit_config(suite, unit, folder)
        found = file_faults(config)
        key, model = _given_model(suite, unit, config)
        if model is not None and not Path(model).is_dir():
            if HUB_ID.fullmatch(model):
                notes[f"{key}: no folder {model} here, it is taken for a hub id and was not looked for"] = None
            else:
                found.append(f"{key}: no folder {model}; set it to a model's folder or to a hub id (owner/name)")
        for fault in found:
            faults.setdefault(fault, []).append(unit.key)
    if faults:
        lines = (f"{fault} ({_shown(keys)})" for fault, keys in faults.items())
        raise SuiteError("\n".join([f"suite {suite.title} cannot start here:", *lines, *notes]))
    return list(notes)


def _given_model(suite: Suite, unit: Unit, config: RunConfig) -> tuple[str, str | None]:
    """The key that names the unit's model, and the model; None where one is made: anew, or by the arm's start."""
    start = unit.name if unit.is_start else suite.arms[unit.name].start
    if suite.starts[start].path is not None:
        return f"starts.{start}.path", config.model.path
    return f"model.path (profile {suite.profile})", config.model.path if unit.is_start else None


def _shown(keys: list[str]) -> str:
    return keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
