"""Token ids of many texts: encoded in parallel batches, with their progress shown, and kept on the disk by content.

A training set's prompts and chains are the same at every start and every resume, and encoding some 400,000 of them
takes minutes. The cache's key is the content: the tokenizer itself, the texts and the versions of the libraries that
encoded them. An entry is therefore never stale, and any entry may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import xxhash

from latent_grpo.common.errors import LatentGRPOError
from latent_grpo.common.files import write_atomically
from latent_grpo.common.schema import Ragged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 4096  # texts that are encoded together, in parallel; the progress moves after each
LARGE = 4096  # texts from which on encoding takes so long that it is shown and kept
MOST_BYTES = 4 * 2**30  # of the cache; the entries that were used longest ago go first
CHECKSUM = b"xxh3"  # of the ids, in an entry's metadata
FOLDER_VARIABLE = "LATENT_GRPO_CACHE"
Show = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
"""`show(name, total, unit)` is a block with the progress of a long piece of work (`deploy.run.progress.Reporter`)."""


class UnencodableText(LatentGRPOError):
    """A text that the tokenizer cannot encode."""

    def __init__(self, index: int, text: str, reason: str) -> None:
        super().__init__(f"text {index}, {text[:80]!r}, cannot be encoded: {reason}")
        self.index, self.text, self.reason = index, text, reason


def cache_folder() -> Path | None:
    """The folder of kept token ids: LATENT_GRPO_CACHE, or `latent-grpo` in XDG_CACHE_HOME or in `~/.cache`.

    None for a user without a home, as in some containers.
    """
    if own := os.environ.get(FOLDER_VARIABLE):
        return Path(own) / "tokens"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "latent-grpo" / "tokens"
    except RuntimeError:
        return None


@contextlib.contextmanager
def _unseen(name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


class TextEncoder:
    """Encodes texts with one tokenizer. `show` shows the progress; `say` takes a line about the cache.

    `rows` is the number of ids that the model has; a text with an id beyond it is refused.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        show: Show = _unseen,
        say: Callable[[str], None] = lambda line: None,
        *,
        rows: int | None = None,
        large: int = LARGE,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.tokenizer = tokenizer
        self.rows = rows
        self._show, self._say, self._large = show, say, large
        self._most_bytes = most_bytes
        self._identity: str | None = None

    def encode(self, name: str, texts: Sequence[str], *, special_tokens: bool) -> Ragged:
        """Returns the token ids of each text, int32. `name` is what the progress calls the texts.

        With `special_tokens` the tokenizer adds those that it puts around a plain text. Raises
        :class:`UnencodableText` for a text with characters that a tokenizer without an unknown token does not have, and
        for one with an id that the model does not have.
        """
        found = self._found(name, texts, special_tokens)
        if self.rows is not None and len(found.values) and int(found.values.max()) >= self.rows:
            place = int(np.argmax(found.values >= self.rows))
            index = int(np.searchsorted(found.offsets, place, side="right")) - 1
            beyond = int(found.values[place])
            token = self.tokenizer.convert_ids_to_tokens(beyond)
            raise UnencodableText(
                index, texts[index], f"it has token {token!r} of id {beyond}, and the model has {self.rows:,} rows"
            )
        return found

    def _found(self, name: str, texts: Sequence[str], special_tokens: bool) -> Ragged:
        if len(texts) < self._large:
            return _ragged(self._batches(texts, special_tokens, lambda done: None))
        entry = self._entry(texts, special_tokens)
        if entry is not None and (known := self._read(entry, len(texts))) is not None:
            self._say(f"{name}: {len(texts):,} texts, tokenised before")
            return known
        with self._show(f"tokenise {name}", len(texts), "texts") as advance:
            found = _ragged(self._batches(texts, special_tokens, advance))
        if entry is not None:
            self._keep(entry, found)
        return found

    def _batches(
        self, texts: Sequence[str], special_tokens: bool, advance: Callable[[int], None]
    ) -> Iterator[pa.Array]:
        for start in range(0, len(texts), BATCH):
            batch = list(texts[start : start + BATCH])
            try:
                ids = self._ids(batch, special_tokens)
            except Exception as error:  # tokenizers raises bare Exception, which does not say for which text
                raise self._culprit(batch, start, special_tokens, error) from error
            yield pa.array(ids, pa.list_(pa.int32()))
            advance(start + len(batch))

    def _ids(self, batch: list[str], special_tokens: bool) -> list[list[int]]:
        found = self.tokenizer(
            batch,
            add_special_tokens=special_tokens,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # the length of a prompt is checked against the run's settings, not the tokenizer's
        )
        ids: list[list[int]] = found["input_ids"]
        return ids

    def _culprit(self, batch: list[str], start: int, special_tokens: bool, error: Exception) -> Exception:
        for index, text in enumerate(batch, start=start):
            try:
                self._ids([text], special_tokens)
            except Exception as own:  # bare in tokenizers; its words are the reason
                return UnencodableText(index, text, str(own))
        return error

    # --- the cache ---------------------------------------------------------------------------------------------------

    def _entry(self, texts: Sequence[str], special_tokens: bool) -> Path | None:
        """The file of these texts; None without a folder, and for a tokenizer in Python, whose content is not known."""
        backend, folder = getattr(self.tokenizer, "backend_tokenizer", None), cache_folder()
        if backend is None or folder is None:
            return None
        if self._identity is None:
            versions = [f"{name} {version(name)}" for name in ("tokenizers", "transformers")]
            self._identity = xxhash.xxh3_128_hexdigest("\0".join([*versions, backend.to_str()]).encode())
        digest = xxhash.xxh3_128(f"{self._identity}|{special_tokens}|{len(texts)}|".encode())
        for text in texts:
            content = text.encode("utf-8", "surrogatepass")
            digest.update(f"{len(content)}|".encode())
            digest.update(content)
        return folder / f"{digest.hexdigest()}.arrow"

    def _read(self, entry: Path, count: int) -> Ragged | None:
        """The kept ids, which stay in the file and are read where they are used."""
        if not entry.is_file():
            return None
        try:
            table = pa.ipc.open_file(pa.memory_map(str(entry))).read_all()
            found = table.column("ids").chunk(0)
            found.validate(full=True)
            if len(found) != count or table.schema.metadata[CHECKSUM] != _checksum(found):
                raise pa.ArrowInvalid("its content is damaged")
        except (pa.ArrowException, LookupError, TypeError, OSError) as error:
            self._say(f"[yellow]{entry} cannot be read ({error}); the texts are tokenised again[/]")
            return None
        with contextlib.suppress(OSError):  # a folder that others own
            os.utime(entry)
        return _ragged([found])

    def _keep(self, entry: Path, found: Ragged) -> None:
        ids = pa.ListArray.from_arrays(pa.array(found.offsets, pa.int32()), pa.array(found.values, pa.int32()))
        table = pa.table({"ids": ids}, metadata={CHECKSUM: _checksum(ids)})
        content = pa.BufferOutputStream()
        with pa.ipc.new_file(content, table.schema) as file:
            file.write_table(table)
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(entry, memoryview(content.getvalue()))
            _prune(entry.parent, self._most_bytes, keep=entry)
        except OSError as error:
            self._say(
                f"[yellow]the token ids could not be kept in {entry.parent} ({error.strerror}), so the next start "
                f"tokenises the texts again; set {FOLDER_VARIABLE} to a folder with room[/]"
            )


def _ragged(arrays: Iterator[pa.Array] | Sequence[pa.Array]) -> Ragged:
    whole = list(arrays)
    found = pa.concat_arrays(whole) if len(whole) > 1 else whole[0] if whole else pa.array([], pa.list_(pa.int32()))
    return Ragged(found.flatten().to_numpy(zero_copy_only=True), _offsets(found))


def _checksum(array: pa.ListArray) -> bytes:
    digest = xxhash.xxh3_128(array.offsets.to_numpy(zero_copy_only=True))
    digest.update(array.values.to_numpy(zero_copy_only=True))
    return digest.hexdigest().encode()


def _offsets(array: pa.ListArray) -> np.ndarray:
    offsets: np.ndarray = array.offsets.to_numpy(zero_copy_only=True)
    return offsets - offsets[0]


def _prune(folder: Path, most_bytes: int, *, keep: Path) -> None:
    """Deletes the entries that were used longest ago. Another process may delete the same ones at the same time."""
    entries = []
    for entry in folder.glob("*.arrow"):
        with contextlib.suppress(FileNotFoundError):
            found = entry.stat()
            entries.append((found.st_mtime, found.st_size, entry))
    total = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if total <= most_bytes:
            return
        if entry != keep:
            total -= size
            entry.unlink(missing_ok=True)
