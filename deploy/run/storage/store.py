"""A folder of an object store, through `pyarrow.fs`: the few operations that an upload and a copy need.

Credentials, region and endpoint are those of the environment (`AWS_*`, `GOOGLE_APPLICATION_CREDENTIALS`, a profile, a
machine's role). An object appears whole or not at all, and a list shows what was written before it: S3 and Google's
storage promise both.
"""

from __future__ import annotations

import contextlib
import os
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import xxhash
from pyarrow import fs

from latent_grpo.common.errors import RunError
from latent_grpo.common.remote_url import checked_url, joined
from latent_grpo.common.secrets import redacted

CHUNK = 32 * 2**20  # bytes that are read and handed on at once; `pyarrow.fs` makes parts of 10 MiB of them
CONNECT_S, REQUEST_S = 10.0, 60.0
REASON = 240  # characters of a library's message
PART = ".part"  # ends the name of a file of a `file://` folder while it is written
Result = TypeVar("Result")

EXPLAINED = (
    (("NO_SUCH_BUCKET", "NoSuchBucket"), "there is no such bucket; create it, or correct the URL"),
    (("ExpiredToken", "expired"), "the credentials have expired; renew them: every try reads them again"),
    (
        ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH", "HTTP status 400", "UNAUTHENTICATED"),
        "access is denied: the credentials of the environment are missing, wrong or expired, or may not do this "
        "(docs/cluster.md says how to set them)",
    ),
    (
        ("NETWORK_CONNECTION", "TIMEOUT", "UNAVAILABLE"),
        "it cannot be reached; is the network up, and the endpoint right?",
    ),
)


class StorageError(RunError):
    """An object store that cannot be used now. The message names the URL, the reason and what to do."""


class WrittenElsewhere(StorageError):
    """A remote run into which another process writes, or has written since this machine's folder was in step."""


class NotThere(StorageError):
    """An object that does not exist."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The bytes of an object: their number, and their xxh3-128 in hexadecimal."""

    size: int
    hash: str


@dataclass(frozen=True, slots=True)
class Listed:
    """An object of a list: its size in bytes, and when it was written, in seconds by the store's clock."""

    size: int
    written: float


class Store:
    """A folder of an object store. Names are relative to it, with `/` between their parts.

    `filesystem` is made of the URL's scheme where it is None. All methods raise :class:`StorageError`.
    """

    def __init__(self, url: str, filesystem: fs.FileSystem | None = None):
        self.url = checked_url(url)
        scheme, _, path = self.url.partition("://")
        self._scheme, self._root = scheme, path
        self._given, self._filesystem = filesystem, filesystem

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def below(self, name: str) -> Store:
        """Returns the folder `name` of this one."""
        return Store(joined(self.url, name), self._given)

    def write(self, name: str, source: BinaryIO, size: int) -> Stored:
        """Writes the first `size` bytes of a file as an object, in place of one of that name."""

        def do(files: Any, path: str) -> Stored:
            digest, left = xxhash.xxh3_128(), size
            local = isinstance(files, fs.LocalFileSystem)
            if local:
                files.create_dir(path.rpartition("/")[0], recursive=True)
            with files.open_output_stream(path + PART if local else path) as target:
                while left:
                    chunk = source.read(min(CHUNK, left))
                    if not chunk:
                        break
                    digest.update(chunk)
                    target.write(chunk)
                    left -= len(chunk)
            if left:  # closed by now, so it is there, too short: no index will name it
                raise StorageError(f"{self.url}: {name} became shorter while it was sent; the next try takes it anew")
            if local:
                files.move(path + PART, path)
            return Stored(size, digest.hexdigest())

        return self._do(name, do)

    def read(self, name: str) -> bytes:
        """Returns an object's bytes. Raises :class:`NotThere`."""

        def do(files: Any, path: str) -> bytes:
            with files.open_input_stream(path) as source:
                return source.read()

        return self._do(name, do)

    def download(self, name: str, target: Path, size: int) -> Stored:
        """Writes the first `size` bytes of an object into a file. Raises :class:`NotThere`."""

        def do(files: Any, path: str) -> Stored:
            digest, left = xxhash.xxh3_128(), size
            with files.open_input_stream(path) as source, target.open("wb") as file:
                while left and (chunk := source.read(min(CHUNK, left))):
                    digest.update(chunk)
                    file.write(chunk)
                    left -= len(chunk)
            return Stored(size - left, digest.hexdigest())

        return self._do(name, do)

    def listed(self, folder: str = "") -> dict[str, Listed]:
        """Returns every object below a folder, by name."""

        def do(files: Any, path: str) -> dict[str, Listed]:
            found = files.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
            return {
                info.path[len(self._root) + 1 :]: Listed(info.size, _seconds(info))
                for info in found
                if info.type == fs.FileType.File
            }

        return self._do(folder, do)

    def folders(self) -> list[str]:
        """Returns the names of the folders directly in this one."""

        def do(files: Any, path: str) -> list[str]:
            found = files.get_file_info(fs.FileSelector(path, allow_not_found=True))
            return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

        return self._do("", do)

    def check_bucket(self) -> None:
        """Raises StorageError where there is no such bucket, which lists as one without objects."""

        def do(files: Any, path: str) -> None:
            found = None
            with contextlib.suppress(OSError):  # whoever may read a prefix alone may not ask for the bucket
                found = files.get_file_info(path.partition("/")[0]).type
            if found == fs.FileType.NotFound:
                raise OSError("NO_SUCH_BUCKET")

        if self._scheme != "file":
            self._do("", do)

    def remove(self, name: str) -> None:
        """Removes an object; one that is not there is no error."""

        def do(files: Any, path: str) -> None:
            files.delete_file(path)

        with contextlib.suppress(NotThere):
            self._do(name, do)

    def remove_folder(self, name: str) -> None:
        """Removes all objects below a folder, and the empty one by which `pyarrow.fs` keeps a folder."""

        def do(files: Any, path: str) -> None:
            files.delete_dir(path)

        with contextlib.suppress(NotThere):
            self._do(name, do)

    def _do(self, name: str, operation: Callable[[Any, str], Result]) -> Result:
        path = joined(self._root, name) if name else self._root
        try:
            files = self._filesystem or _filesystem(self._scheme, self._root)
            self._filesystem = files
            return operation(files, path)
        except FileNotFoundError as error:
            raise NotThere(f"{joined(self.url, name)}: there is no such object") from error
        except (OSError, pa.ArrowException) as error:
            self._filesystem = self._given  # the next operation connects anew, with the credentials that are there then
            raise StorageError(f"{self.url}: {_reason(error)}") from error


def _filesystem(scheme: str, path: str) -> fs.FileSystem:
    if scheme == "file":
        return fs.LocalFileSystem()
    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=REQUEST_S))  # by default it tries for 15 minutes
    options: dict[str, Any] = {"connect_timeout": CONNECT_S, "request_timeout": REQUEST_S}
    options["background_writes"] = False  # they would read a file into memory faster than the network takes it
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options["endpoint_override"] = endpoint
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and not endpoint:
        region = fs.resolve_s3_region(path.partition("/")[0])
    if region is not None:
        options["region"] = region
    return fs.S3FileSystem(allow_delayed_open=True, **options)  # a small object is one request


def _seconds(info: Any) -> float:
    return info.mtime_ns / 1e9 if info.mtime_ns is not None else time.time()


def _reason(error: Exception) -> str:
    said = redacted(str(error))
    for signs, sentence in EXPLAINED:
        if any(sign in said for sign in signs):
            return sentence
    return textwrap.shorten(said, REASON, placeholder=" ...")
