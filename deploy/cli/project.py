"""The command `latent-grpo init DIR`: a small project of one's own, which trains at once on a CPU."""

from __future__ import annotations

import contextlib
import runpy
import shlex
import shutil
from importlib import resources
from pathlib import Path

from latent_grpo.common.config import ConfigError
from latent_grpo.common.files import unwritable

FILES = ("README.md", "train.yaml", "my_verifier.py", "make_problems.py")
MADE = ("problems.jsonl", "held_out.jsonl")  # by the project's own make_problems.py


def make_project(folder: Path) -> list[Path]:
    """Writes the project's files and returns their paths. A folder may exist, but none of the files in it.

    Raises ConfigError where one does, or nothing can be written; files that this call has written are then removed.
    """
    targets = [folder / name for name in (*FILES, *MADE)]
    if there := [str(path) for path in targets if path.exists()]:
        raise ConfigError(f"{', '.join(there)} exists already, and init overwrites nothing; give another folder")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        template = resources.files("latent_grpo.deploy") / "template"
        for name in FILES:
            (folder / name).write_text((template / name).read_text(encoding="utf-8"), encoding="utf-8")
        runpy.run_path(str(folder / "make_problems.py"))["write"](folder)
    except OSError as error:
        for path in targets:
            with contextlib.suppress(OSError):
                path.unlink()
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(f"{folder} {unwritable(error)}; give a folder that is writable") from error
    return targets


def next_steps(folder: Path) -> str:
    """Returns the lines that say what to do with a new project."""
    return "\n".join(
        [
            f"cd {shlex.quote(str(folder))}",
            "latent-grpo validate --profile train.yaml --files",
            "latent-grpo train --profile train.yaml",
        ]
    )
