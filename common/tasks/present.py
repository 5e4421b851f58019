"""The files of known data sets, under either of their names.

Profiles name the files that `latent-grpo data fetch` writes. The authors' own files, as they lie, do as well.
"""

from __future__ import annotations

from pathlib import Path

from latent_grpo.common.config import RunConfig, TaskConfig
from latent_grpo.common.tasks.benchmarks import known_files


def with_present_files(config: RunConfig) -> RunConfig:
    """Returns the settings with the authors' file of a set in place of a missing one of this program's name.

    A missing file of any other name stays, and is an error where it is read.
    """
    evaluation = config.evaluation.model_copy(update={"tasks": [_present(task) for task in config.evaluation.tasks]})
    return config.model_copy(update={"tasks": [_present(task) for task in config.tasks], "evaluation": evaluation})


def _present(task: TaskConfig) -> TaskConfig:
    path, names = Path(task.path or ""), known_files(task.name)
    if path.name not in names or path.is_file():
        return task
    there = [found for name in names if (found := path.with_name(name)).is_file()]
    return task.model_copy(update={"path": str(there[0])}) if there else task
