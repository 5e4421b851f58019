"""Grading by the authors' rules: on the whole decoded text, with the proxy token of each latent step in it (METHOD §8).

A worker grades a response's visible text alone, by the rule of this project (METHOD §1). These grades are computed from
the trajectories, so that one set of samples can be graded by both protocols.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pyarrow as pa

from latent_grpo.common.schema import TrajectoryBatch
from latent_grpo.reward.verifier import Grade, Verifier, judged, load_verifier, settled

Decode = Callable[[list[int]], str]
"""Decodes token ids into text, special tokens included."""


def whole_text(latent_ids: np.ndarray, hard_ids: np.ndarray, finish_reason: str, decode: Decode) -> str:
    """Returns the decoded proxy and hard tokens of a response, without the EOS that ended it.

    `latent_ids` [L, K], whose first column holds the proxy tokens, and without steps of any shape; `hard_ids` [H].
    """
    hard = hard_ids[:-1] if finish_reason == "stop" else hard_ids  # METHOD §2.6: it stopped at an EOS
    return decode([*(step[0] for step in latent_ids.tolist()), *hard.tolist()])


def regraded(group: pa.RecordBatch, rule: str, decode: Decode) -> pa.RecordBatch:
    """Returns the samples with the grades that `rule`, a verifier's kind, gives to their whole texts.

    An aborted sample stays ungraded.
    """
    view, verifier = TrajectoryBatch(group), _verifier(rule)
    latent, hard = view.latent_ids, view.hard_ids
    grades = []
    for row, (finish, gold) in enumerate(zip(view.strings("finish_reason"), view.strings("gold_answer"), strict=True)):
        if finish == "aborted":
            grades.append(Grade(None, "ungraded"))
            continue
        text = whole_text(latent[row], hard[row], finish, decode)
        grades.append(judged(partial(_graded, verifier, text), gold))
    columns = {
        "parsed_answer": [grade.parsed for grade in grades],
        "reward": [grade.reward for grade in grades],
        "grade_reason": [grade.reason for grade in grades],
    }
    found = view.batch
    for name, values in columns.items():
        place = found.schema.get_field_index(name)
        found = found.set_column(place, found.schema.field(place), pa.array(values, found.schema.field(place).type))
    return found


def _graded(verifier: Verifier, text: str, gold: str) -> Grade:
    return settled(verifier.grade(text, gold))


@cache
def _verifier(rule: str) -> Verifier:
    return load_verifier(rule)
