"""The probe of the last latent step: how much of its probability is on the answer, other numbers, or fillers.

On chain arithmetic the last latent step must carry the result; the marks around it (`=`, `;`) are fillers. An
objective that reinforces every component alike moves the mass from the answer to the fillers, step by step, while loss
and clip fraction look healthy. The probe reads dumped evaluations (noise off), so any run can be probed afterwards. It
sees only the recorded mixture: an answer outside of its K components counts as 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from latent_grpo.common.schema import TrajectoryBatch
from latent_grpo.common.store import TrajectoryStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Masses:
    """Means over samples of the probability (METHOD §2.2) of the last latent step's components, by kind."""

    answer: float
    other_numbers: float
    fillers: float
    samples: int


def last_step_masses(rows: pa.RecordBatch, text_of: Callable[[int], str]) -> Masses | None:
    """Computes the masses. `text_of` returns a token's text.

    Returns None where no noise-free sample has a latent step and a gold answer of one token.
    """
    view = TrajectoryBatch(rows)
    quiet = np.array([mode == "off" for mode in view.strings("sampling_noise_mode")], dtype=bool)
    gold = view.strings("gold_answer")
    texts: dict[int, str] = {}
    sums, count = np.zeros(3), 0
    for row in np.flatnonzero(quiet & (view.num_latent_steps > 0)).tolist():
        probabilities = np.exp(view.latent_log_probs[row][-1].astype(np.float64))
        for token, probability in zip(view.latent_ids[row][-1].tolist(), probabilities, strict=True):
            text = texts.setdefault(token, text_of(token)).strip()
            kind = 0 if text == gold[row] else 1 if text.isdigit() else 2
            sums[kind] += probability
        count += 1
    if not count:
        return None
    answer, other, fillers = (sums / count).tolist()
    return Masses(answer=answer, other_numbers=other, fillers=fillers, samples=count)


def probe_run(
    trajectories: Path, text_of: Callable[[int], str], gold_is_one_token: Callable[[str], bool]
) -> dict[int, Masses]:
    """Returns step -> :class:`Masses` of every dumped evaluation of a run; {} where answers are longer than a token."""
    store = TrajectoryStore(trajectories)
    found: dict[int, Masses] = {}
    for step in store.steps("evaluation"):
        rows = store.read(step, "evaluation")
        if not all(gold_is_one_token(gold) for gold in set(rows.column("gold_answer").to_pylist())):
            return {}
        masses = last_step_masses(rows, text_of)
        if masses is not None:
            found[step] = masses
    return found
