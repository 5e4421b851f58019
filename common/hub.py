"""The location of a model, a folder on this machine or a hub id, and the errors where it is neither."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from pathlib import Path

from latent_grpo.common.errors import ConfigError
from latent_grpo.common.model_files import check_kind

RUN_FILE = "run.json"  # what a run's folder has and a model's has not
REASON = 200  # characters of the Hugging Face libraries' message


def check_is_no_run(model: str | Path) -> None:
    """Raises ConfigError for a run's folder, whose `config.json` is that of the run, with its trained model's place."""
    folder = Path(model)
    if (folder / RUN_FILE).is_file():
        trained = folder / "model"
        there = f"give its trained model, {trained}" if trained.is_dir() else "it has no trained model yet"
        raise ConfigError(f"model {str(model)!r}: this is the folder of a run; {there}, or export a checkpoint of it")


def check_folder(model: str | Path) -> None:
    """Raises ConfigError for a mistyped folder, which must not lead to a search for a hub repository of that name.

    A folder of a run is refused too (:func:`check_is_no_run`), and one that holds no whole model (`check_kind`).
    """
    check_is_no_run(model)
    folder = Path(model)
    if folder.is_dir():
        check_kind(folder)
    elif folder.is_file():
        how = "; examples/real_model/convert.py shows how a GGUF file becomes one" if folder.suffix == ".gguf" else ""
        raise ConfigError(f"model {str(model)!r} is a file; give the Hugging Face folder of the model{how}")
    elif folder.is_absolute() or str(model).startswith((".", "~")):
        raise ConfigError(f"model {str(model)!r}: it has no config.json; give a Hugging Face model folder")


def network_errors() -> tuple[type[Exception], ...]:
    """Returns the errors of a hub that cannot be reached: of its HTTP client, whatever that is called, and OSError."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))


@contextlib.contextmanager
def hub_errors(model: str | Path) -> Iterator[None]:
    """Turns the hub's errors in a block that reads files of `model` into ConfigError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = textwrap.shorten(str(error), REASON, placeholder=" ...")
        if Path(model).is_dir():
            raise ConfigError(
                f"model {str(model)!r} cannot be read ({reason}); give a complete Hugging Face model folder, "
                "tokenizer included"
            ) from error
        raise ConfigError(
            f"model {str(model)!r}: there is no such folder here, and it cannot be read as a hub id ({reason}). "
            "Give a model's folder, or a hub id (owner/name) that this machine can reach or has in its cache"
        ) from error
