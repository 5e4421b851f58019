"""The location of a model, a folder on this machine or a hub id, and the errors where it is neither."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from pathlib import Path

from latent_grpo.common.errors import ConfigError

REASON = 200  # characters of the Hugging Face libraries' message


def check_folder(model: str | Path) -> None:
    """Raises ConfigError for a mistyped folder, which must not lead to a search for a hub repository of that name."""
    folder = Path(model)
    looks_local = folder.is_absolute() or str(model).startswith((".", "~")) or folder.is_dir()
    if looks_local and not (folder / "config.json").is_file():
        raise ConfigError(f"model.path {str(model)!r}: it has no config.json; give a Hugging Face model folder")


@contextlib.contextmanager
def hub_errors(model: str | Path) -> Iterator[None]:
    """Turns the hub's errors in a block that reads files of `model` into ConfigError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = textwrap.shorten(str(error), REASON, placeholder=" ...")
        if Path(model).is_dir():
            raise ConfigError(
                f"model.path {str(model)!r} cannot be read ({reason}); give a complete Hugging Face model folder, "
                "tokenizer included"
            ) from error
        raise ConfigError(
            f"model.path {str(model)!r}: there is no such folder here, and it cannot be read as a hub id ({reason}). "
            "Give a model's folder, or a hub id (owner/name) that this machine can reach or has in its cache"
        ) from error
