"""What a job takes along of a user's own: a profile with the files that it extends, and the modules that they name.

Files keep their places to each other, so that `extends: ../base.yaml` is found on the cluster as it is here. A module
lies at the top of the job's working folder, which Python imports from.
"""

from __future__ import annotations

import ast
import os.path
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from latent_grpo.common.config.loading import profiles_folder
from latent_grpo.common.config.yaml_files import files_of, is_path, read_yaml
from latent_grpo.common.errors import ConfigError
from latent_grpo.common.plugins import FORMER_PACKAGES, is_import_path
from latent_grpo.common.tasks.generator import PREFIX

STAGED = "submitted"  # folder of the profiles in the job's working folder
OURS = {"latent_grpo", *FORMER_PACKAGES}


class SubmitError(ConfigError):
    """Raised when a job cannot be submitted; the message says what was tried and what to do."""


def stage_profile(path: Path, folder: Path, *, suite: bool = False) -> str:
    """Copies a local profile or suite with all that it needs into a job's working `folder`; returns its place there.

    Raises SubmitError where a file of it would not be found on the cluster.
    """
    files = _local(path, folder, suite)
    root = Path(os.path.commonpath([file.parent for file in files]))
    for file in files:
        data = read_yaml(file)
        if isinstance(parent := data.get("extends"), str) and parent.startswith(("/", "~")):
            raise SubmitError(
                f"{file} extends {parent}, which is no path on the cluster; write it relative to the file"
            )
        _copy(file, folder / STAGED / file.relative_to(root))
        stage_modules(_texts(data), [Path.cwd(), file.parent], folder)
    return str(Path(STAGED) / files[0].relative_to(root))


def _local(path: Path, folder: Path, suite: bool) -> list[Path]:
    """Returns a profile or suite and the user's own files that it leads to, itself first."""
    built_in = profiles_folder().parent  # suites lie there too
    found = files_of(path, built_in / ("suites" if suite else "profiles"), "suite" if suite else "profile")
    if suite:
        named = next((str(data["profile"]) for file in found if (data := read_yaml(file)).get("profile")), "")
        beside = path.parent / named
        if is_path(named) and beside.is_file():
            found += files_of(beside, profiles_folder(), "profile")
    return list(dict.fromkeys(file.resolve() for file in found if built_in not in file.resolve().parents))


def stage_modules(texts: Iterable[str], beside: Sequence[Path], folder: Path) -> None:
    """Copies the modules of import paths (`my_rewards:Exact`, `python:my_tasks:Mine`) that lie in one of the folders
    `beside`, with what they import from there, into a job's working `folder`. Others are the cluster's own."""
    for text in texts:
        name = text.removeprefix(PREFIX)
        if is_import_path(name):
            _stage_module(name.partition(":")[0].partition(".")[0], beside, folder)


def _stage_module(name: str, beside: Sequence[Path], folder: Path) -> None:
    target = folder / name
    if name in OURS or target.exists():
        return
    for place in beside:
        if (file := place / f"{name}.py").is_file():
            if not (copy := target.with_suffix(".py")).exists():
                _copy(file, copy)
                for imported in _imports(file):
                    _stage_module(imported, [place], folder)
            return
        if (package := place / name).is_dir() and (package / "__init__.py").is_file():
            shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
            return


def _imports(file: Path) -> Iterator[str]:
    """Yields the first part of each module that a file imports."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise SubmitError(f"{file} is not valid Python: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        yield from (text for value in node.values() for text in _texts(value))
    elif isinstance(node, list):
        yield from (text for value in node for text in _texts(value))


def _copy(file: Path, target: Path) -> None:
    if target.exists() and target.read_bytes() != file.read_bytes():
        raise SubmitError(
            f"two different files are called {file.name}, and the job puts both into one folder; rename one"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)
