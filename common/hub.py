"""Where a model is, a folder on this machine or a hub id, and the error where it is neither."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from pathlib import Path

from latent_grpo.common.errors import ConfigError

REASON = 200  # characters of what the Hugging Face libraries say


def check_folder(model: str | Path) -> None:
    """Raises ConfigError for a mistyped folder, which must not become a search for a hub repository of that name."""
    folder = Path(model)
    looks_local = folder.is_absolute() or str(model).startswith((".", "~")) or folder.is_dir()
    if looks_local and not (folder / "config.json").is_file():
        raise ConfigError(f"model.path {str(model)!r}: no config.json there; expected a Hugging Face model folder")


@contextlib.contextmanager
def hub_errors(model: str | Path) -> Iterator[None]:
    """A block that reads files of `model`. Turns the hub's errors into ConfigError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = textwrap.shorten(str(error), REASON, placeholder=" ...")
        if Path(model).is_dir():
            raise ConfigError(
                f"model.path {str(model)!r} cannot be read ({reason}); expected a whole Hugging Face model folder, "
                "tokenizer included"
            ) from error
        raise ConfigError(
            f"model.path {str(model)!r}: there is no such folder here, and as a hub id it cannot be read ({reason}). "
            "Give a model's folder, or a hub id (owner/name) that this machine reaches or has in its cache"
        ) from error
