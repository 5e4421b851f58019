"""The run that several files look at from their sides, and the environment of commands."""

import os
import tempfile
from pathlib import Path

import pytest
from training import WHOLE, tiny

from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.train import train


@pytest.fixture(scope="session")
def whole(ray_session, tmp_path_factory) -> RunFolder:
    """Six steps in one go. Checkpoints after steps 5 and 6 are left, and 4 if its score is the best; those before are
    gone."""
    return train(tiny(*WHOLE, f"runs_folder={tmp_path_factory.mktemp('whole')}"), "whole")


@pytest.fixture
def environment():
    """A private home (Ray's token lies there) and no Ray of anybody else."""
    with tempfile.TemporaryDirectory(prefix="lgt-") as home:
        changed = {"HOME": home, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        yield {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | changed
