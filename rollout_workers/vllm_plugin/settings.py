"""How a sample's identity and settings reach the worker processes: `SamplingParams.extra_args` of its request."""

from __future__ import annotations

from typing import Any

import numpy as np

KEY = "latent_rollout"


def extra_args(uid: int, row: np.void, careful: bool) -> dict[str, Any]:
    """`row`: the sample's `rollout_workers.rows.SETTINGS`; `uid`: the engine's number of the sample."""
    settings = {name: row[name].item() for name in row.dtype.names}
    return {KEY: {"uid": uid, "careful": int(careful), **settings}}


def request_settings(params: Any) -> tuple[int, dict[str, Any]]:
    """(uid, settings) of a request. Raises ValueError for one that is not a rollout of ours."""
    found = (params.extra_args or {}).get(KEY) if params is not None else None
    if found is None:
        raise ValueError(
            "this vLLM samples latent rollouts only and got a request without their settings; send rollouts through "
            "VLLMEngine, and start another vLLM for ordinary requests"
        )
    settings = dict(found)
    return settings.pop("uid"), settings
