"""A learner's state from somebody else, whose file would run code if it were unpickled."""

from __future__ import annotations

from pathlib import Path

import torch

from latent_grpo.learner.state import FACTS, OLD_TAG, OldFacts


class Touch:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def foreign_state(folder, stage):
    """Writes the state of one rank below the folder and returns its path; unpickled, it makes FOLDER/touched."""
    state = folder / "foreign"
    (state / OLD_TAG).mkdir(parents=True)
    (state / FACTS).write_text(OldFacts(ranks=1, zero_stage=stage, dtype="float32").model_dump_json())
    torch.save(
        {"module": Touch(folder / "touched")},
        state / OLD_TAG / f"{'zero_pp_rank_0_' * (stage == 3)}mp_rank_00_model_states.pt",
    )
    return state
