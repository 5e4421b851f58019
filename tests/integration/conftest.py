"""The run that several files look at from their sides."""

import pytest
from training import WHOLE, tiny

from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.train import train


@pytest.fixture(scope="session")
def whole(ray_session, tmp_path_factory) -> RunFolder:
    """Six steps in one go. Checkpoints after steps 5 and 6 are left, and 4 if its score is the best; those before are
    gone."""
    return train(tiny(*WHOLE, f"runs_folder={tmp_path_factory.mktemp('whole')}"), "whole")
