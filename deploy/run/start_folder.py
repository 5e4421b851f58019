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
    """Returns stored settings in which paths that lie in the start's folder are absolute; those that are none stay.

    What has another form than settings have stays too: whoever reads the settings says what is wrong with it.
    """
    start = identity.get(STARTED_IN)
    if not isinstance(start, str) or not Path(start).is_dir() or Path(start) == Path.cwd():
        return settings
    found = {**settings, "tasks": _tasks(settings.get("tasks"), start)}
    if isinstance(evaluation := settings.get("evaluation"), dict) and "tasks" in evaluation:
        found["evaluation"] = {**evaluation, "tasks": _tasks(evaluation["tasks"], start)}
    if isinstance(model := settings.get("model"), dict):
        found["model"] = _with_placed(
            {**model, "new": _with_placed(model.get("new"), "tokenizer", start)}, "path", start
        )
    return found


def _tasks(tasks: Any, start: str) -> Any:
    return [_with_placed(task, "path", start) for task in tasks] if isinstance(tasks, list) else tasks


def _with_placed(section: Any, key: str, start: str) -> Any:
    """Returns a section in which the path at `key` is that of the start's folder, if it is there."""
    path = section.get(key) if isinstance(section, dict) else None
    if not isinstance(path, str) or not path or path.startswith(SCHEMES) or Path(path).is_absolute():
        return section
    there = Path(start, path)
    return {**section, key: str(there)} if exists(str(there)) else section
