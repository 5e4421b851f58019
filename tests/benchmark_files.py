"""Where the benchmarks' files are that tests read, if they are anywhere: they are not part of the repository."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_PLACES = (os.environ.get("LATENT_GRPO_DATA", ""), _ROOT / "data", _ROOT.parent / "shared" / "data")

DATA = next((Path(place) for place in _PLACES if place and Path(place).is_dir()), _ROOT / "data")
"""The folder that LATENT_GRPO_DATA names, `data/` in the checkout, or `shared/data` beside it."""
MISSING = "the benchmark files are not here: they are not part of the repository; LATENT_GRPO_DATA names their folder"
