"""The language of a pool and its grader processes: JSON objects, each behind its length in four bytes.

JSON and not pickle: a grader handles hostile text, and nothing it sends may be executed. `ensure_ascii` carries NUL
bytes and lone surrogates unchanged.
"""

from __future__ import annotations

import json
import struct
from typing import Any

MAX_FRAME_BYTES = 256 * 2**20

_LENGTH = struct.Struct(">I")


class FrameError(ValueError):
    """A frame that no grader process or pool of this version writes; the stream cannot be read on."""


def encode(message: dict[str, Any]) -> bytes:
    """One message as bytes for the pipe."""
    payload = json.dumps(message, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameError(f"A message has {len(payload)} bytes; at most {MAX_FRAME_BYTES} are allowed.")
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """Puts messages together from the bytes of a pipe, however they are cut."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that `data` completes, in order. Raises FrameError on bytes that are no frame."""
        self._buffer += data
        messages, start = [], 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise FrameError(f"A frame announces {length} bytes; at most {MAX_FRAME_BYTES} are allowed.")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            try:
                message = json.loads(self._buffer[start + _LENGTH.size : end])
            except ValueError as error:
                raise FrameError(f"A frame of {length} bytes is not JSON ({error}).") from error
            if not isinstance(message, dict):
                raise FrameError(f"A frame holds a {type(message).__name__}; expected an object.")
            messages.append(message)
            start = end
        del self._buffer[:start]
        return messages
