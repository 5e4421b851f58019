"""Which KV blocks may be shared: those of a prompt, between all its samples; never those behind it.

vLLM names a full block by a hash of its token ids and all before them. Two latent histories have the same (placeholder)
ids and other keys and values, so from the first block that holds a generated position on, the name carries the
sample's own request id: it finds its own blocks again after preemption, and nobody else does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any


def keep_histories_apart(hasher: Callable[[Any], list[bytes]], block_size: int) -> Callable[[Any], list[bytes]]:
    """Wraps an engine core's block hasher (request -> names of its new full blocks)."""

    def names(request: Any) -> list[bytes]:
        first = len(request.block_hashes)
        found = hasher(request)
        own = request.request_id.encode()
        for i, name in enumerate(found):
            if (first + i + 1) * block_size > request.num_prompt_tokens:
                found[i] = hashlib.sha256(name + own).digest()
        return found

    return names
