"""The rule of sharing KV blocks: samples share the blocks of their prompt, and never those after it.

vLLM names a full block by a hash of its token ids and all before them. Two latent histories have the same (placeholder)
ids but different keys and values, so from the first block with a generated position on, the name includes the sample's
own request id: the sample finds its blocks again after preemption, and no other sample does.
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
