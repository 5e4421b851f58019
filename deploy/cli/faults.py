"""What a command says of a fault that nobody expected: one line, and a file with the traceback.

An expected fault is a `LatentGRPOError`, whose message is all that is said. Any other exception is a mistake of this
program or of a package. The user still gets one line, with the path of a file that has the whole traceback;
`LATENT_GRPO_DEBUG=1` shows the traceback of either kind instead.
"""

from __future__ import annotations

import os
import shlex
import tempfile
import traceback
from collections.abc import Mapping, Sequence

from latent_grpo.common import __version__
from latent_grpo.common.errors import ConfigError, LatentGRPOError
from latent_grpo.common.secrets import redacted

DEBUG = "LATENT_GRPO_DEBUG"
READS_INPUT = (
    "latent_grpo.common.config",
    "latent_grpo.common.tasks",
    "latent_grpo.common.model_",
    "latent_grpo.common.prompts",
    "latent_grpo.deploy.checks.validate",
    "latent_grpo.deploy.grading",
    "latent_grpo.deploy.run.preparation",
    "latent_grpo.deploy.view",
)
"""Modules that read what the user gave. A fault within them is taken for one of the input."""


def debugging(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether tracebacks are shown: `LATENT_GRPO_DEBUG` is set to anything but 0."""
    return environment.get(DEBUG, "0") not in ("", "0")


def exit_code_of(error: BaseException) -> int:
    """Returns the error's own exit code, or that of a ConfigError where the user's input was being read, else 1."""
    if isinstance(error, LatentGRPOError):
        return error.exit_code
    frames = traceback.walk_tb(error.__traceback__)
    modules = (frame.f_globals.get("__name__", "") for frame, _ in frames)
    return ConfigError.exit_code if any(name.startswith(READS_INPUT) for name in modules) else 1


def unexpected(error: BaseException, arguments: Sequence[str]) -> str:
    """Returns the line for an unexpected error, after its traceback was written to a file that the line names."""
    found = f"{type(error).__name__}: {in_one_line(error)}" if str(error).strip() else type(error).__name__
    return f"unexpected {found}; {_kept(error, arguments)}"


def in_one_line(error: BaseException) -> str:
    """Returns the first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _kept(error: BaseException, arguments: Sequence[str]) -> str:
    text = "".join(traceback.format_exception(error))
    command = shlex.join(["latent-grpo", *arguments])
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="latent-grpo-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(redacted(f"{command}\nlatent-grpo {__version__}\n\n{text}"))  # people send it on
    except OSError as full:
        return f"the traceback could not be written ({full.strerror}): {DEBUG}=1 shows it"
    return f"the traceback is in {file.name}, and {DEBUG}=1 shows it; please report it if the input is in order"
