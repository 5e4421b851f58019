"""Relative paths in a run's settings: they are those of the folder in which the run was started.

A run that is resumed, replayed or evaluated from another folder finds its problems and its model there. What is not
there, as of a job whose working folder is gone, is looked for in the present folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latent_grpo.common.tasks.tables import exists

STARTED_IN = "started_in"  # a key of run.json
SCHEMES = ("hf:", "builtin:", "python:")


def start_folder(identity: dict[str, Any]) -> str:
    """Returns what `run.json` is to have from now on: the folder of the first start, as long as there is one."""
    known = identity.get(STARTED_IN)
    return known if isinstance(known, str) and Path(known).is_dir() else str(Path.cwd())


def placed(settings: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """Returns stored settings in which paths that lie in the start's folder are absolute; those that are none stay."""
    start = identity.get(STARTED_IN)
    if not isinstance(start, str) or not Path(start).is_dir() or Path(start) == Path.cwd():
        return settings
    found = dict(settings)
    for section in ("model", "evaluation"):
        found[section] = dict(settings.get(section) or {})
    found["tasks"] = _tasks(settings.get("tasks"), start)
    if "tasks" in found["evaluation"]:
        found["evaluation"]["tasks"] = _tasks(found["evaluation"]["tasks"], start)
    _place(found["model"], "path", start)
    if isinstance(new := found["model"].get("new"), dict):
        found["model"]["new"] = dict(new)
        _place(found["model"]["new"], "tokenizer", start)
    return found


def _tasks(tasks: Any, start: str) -> Any:
    if not isinstance(tasks, list):
        return tasks
    copies = [dict(task) for task in tasks]
    for task in copies:
        _place(task, "path", start)
    return copies


def _place(section: dict[str, Any], key: str, start: str) -> None:
    path = section.get(key)
    if not isinstance(path, str) or not path or path.startswith(SCHEMES) or Path(path).is_absolute():
        return
    there = Path(start, path)
    if exists(str(there)):
        section[key] = str(there)
