"""Parsing of a command's arguments: settings given after its options, and comma-separated lists; and Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from latent_grpo.common.config import ConfigError, RunConfig, load_config, read_profile
from latent_grpo.common.config.loading import SIZES
from latent_grpo.common.config.section import with_home
from latent_grpo.common.tasks.present import with_present_files


def overrides(arguments: list[str]) -> list[str]:
    """Rewrites `--a.b 1`, `--a.b=1` and `a.b=1` as `a.b=1`. Raises ConfigError for an option without a value,
    and for a key that is given twice with different values."""
    found, pending = [], None
    for argument in arguments:
        if pending is not None:
            found.append(f"{pending}={argument}")
            pending = None
        elif argument.startswith("--") and "=" not in argument:
            pending = argument[2:]
        elif "=" in argument:
            found.append(argument.removeprefix("--"))
        else:
            raise ConfigError(f"unexpected argument {argument!r}; settings look like --key.sub VALUE or key.sub=VALUE")
    if pending is not None:
        raise ConfigError(f"--{pending} has no value; settings are given as --key.sub VALUE or key.sub=VALUE")
    values: dict[str, str] = {}
    for key, _, value in (text.partition("=") for text in found):
        if values.setdefault(key, value) != value:
            raise ConfigError(f"{key} is given twice, as {values[key]!r} and as {value!r}; give it once")
    return found


def argument_with_home(argument: str) -> str:
    """Writes out `~/` at the beginning of an argument, or of an option's value (`--resume=~/runs/a`)."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    if not value.startswith("~/"):
        return argument
    return f"{option}{equals}{with_home(value)}"


def listed(text: str) -> list[str]:
    """Splits `a, b` into ["a", "b"]."""
    return [part.strip() for part in text.split(",") if part.strip()]


def whole_numbers(option: str, text: str) -> list[int]:
    """Splits `0,1` into [0, 1]. Raises ConfigError, which names the option, where a part is not a whole number."""
    try:
        return [int(part) for part in listed(text)]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected whole numbers separated by commas, e.g. 0,1,2") from None


def settings(profile: str, context: typer.Context, gpus: float | None = None, *, sized: bool = False) -> RunConfig:
    """Returns the settings of a profile with a command's overrides; `gpus` chooses its keys for that many GPUs.

    Raises ConfigError where that has no effect and `sized` says that it must have one.
    """
    if sized and gpus is not None and SIZES not in read_profile(profile):
        raise ConfigError(f"--gpus {gpus:g} has no effect: profile {profile} has no section {SIZES}; set its counts")
    return with_present_files(load_config(profile, overrides(context.args), gpus))


@contextmanager
def interruptible() -> Iterator[None]:
    """Ends a command that Ctrl-C interrupted with exit code 130, the shell's code for it."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
