"""The upload of a model folder to the Hugging Face hub, through `huggingface_hub`; errors become one line."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from latent_grpo.common.errors import ConfigError, RunError
from latent_grpo.common.hub import network_errors

REASON = 200  # characters of the library's message


class UploadError(RunError):
    """An upload that the hub did not take; the exported folder is gone, and the run is as it was."""


class Hub(Protocol):
    """What is used of `huggingface_hub.HfApi`."""

    def whoami(self) -> Any:
        """Raises an error of the hub's client where it does not know who asks."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Makes a repository; one that is there stays with `exist_ok`."""

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
        """Commits the files of a folder to a repository."""


def upload(repository: str, hub: Callable[[], Hub] | None = None) -> Callable[[Path, str, bool], str]:
    """Checks that the hub knows who asks, and returns `send(folder, message, public)`, which returns the address.

    A repository that is new is private unless `public`. Raises ConfigError without credentials, UploadError where the
    hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api: Hub = HfApi() if hub is None else hub()
    with _hub_errors(repository):
        api.whoami()

    def send(folder: Path, message: str, public: bool) -> str:
        with _hub_errors(repository):
            api.create_repo(repository, private=not public, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=f"Export {message}")
        return f"hf:{repository}"

    return send


@contextlib.contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ConfigError(
            f"--to hf:{repository}: there are no credentials for the hub; run `hf auth login`, or set HF_TOKEN"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ConfigError(
                f"--to hf:{repository}: the hub refuses these credentials (status {status}); give a token that may "
                "write there (HF_TOKEN, or `hf auth login`)"
            ) from error
        raise UploadError(f"--to hf:{repository}: {_short(error)}; try again, or export to a folder") from error
    except network_errors() as error:
        raise UploadError(
            f"--to hf:{repository}: the hub cannot be reached from here ({_short(error)}); export to a folder, and "
            f"upload that one with `hf upload {repository} FOLDER` where there is a network"
        ) from error


def _short(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, REASON, placeholder=" ...")
