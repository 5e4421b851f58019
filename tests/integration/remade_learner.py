"""A learner whose ranks can make their engines again in the same processes, of another ZeRO stage or dtype."""

from __future__ import annotations

from pathlib import Path

from latent_grpo.learner.group import RankGroup
from latent_grpo.learner.learner import LearnerGroup
from latent_grpo.learner.rank import LearnerRank
from latent_grpo.learner.state import FACTS, OLD_TAG, OldFacts


class RemadeRank(LearnerRank):
    def remake(self, stage, dtype):
        learner = self.config.learner.model_copy(update={"zero_stage": stage})
        model = self.config.model.model_copy(update={"dtype": dtype})
        self.config = self.config.model_copy(update={"learner": learner, "model": model})
        self.make_engine()

    def save_as_before(self, folder):
        """Writes a state as versions before 0.3 did."""
        engine = self.engine
        engine._engine.save_checkpoint(folder, tag=OLD_TAG, client_state={"bad_in_a_row": 0})  # it was DeepSpeed's own
        if self.rank == 0:
            facts = OldFacts(ranks=self.world, zero_stage=engine.stage, dtype=engine.dtype)
            Path(folder, FACTS).write_text(facts.model_dump_json())


class RemadeGroup(LearnerGroup):
    def __init__(self, config, model_folder):
        RankGroup.__init__(self, RemadeRank, config, model_folder)

    def remake(self, stage, dtype="float32"):
        self._published = None
        self._all("remake", stage, dtype)

    def save_as_before(self, folder):
        self._all("save_as_before", str(folder))
