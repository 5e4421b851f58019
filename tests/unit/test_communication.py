"""What ranks exchange at once follows the device, and settings overrule it."""

import pytest

from latent_grpo.common.config import ConfigError, LearnerConfig, load_config
from latent_grpo.deploy.checks.validate import communication_rows
from latent_grpo.learner.zero_engine import communication


@pytest.mark.parametrize("on_gpus", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_no_device_gets_what_was_not_run_on_it(on_gpus, ranks):
    assert communication(LearnerConfig(ranks=ranks), on_gpus) == (5_000_000, False)
    chosen = LearnerConfig(ranks=ranks, bucket_elements=7, overlap_communication=True)
    assert communication(chosen, on_gpus) == (7, True)


def test_validate_says_what_several_ranks_exchange():
    assert communication_rows(load_config("quickstart", ["learner.ranks=1"])) == []
    keys = ["learner.ranks=2", "learner.resources.num_gpus=1", "learner.overlap_communication=true"]
    expected = "5,000,000 gradients or weights at once, while the backward pass goes on"
    assert communication_rows(load_config("quickstart", keys)) == [("communication of learner ranks", expected)]
    with pytest.raises(ConfigError, match=r"overlap_communication true needs GPUs .*set it to auto"):
        load_config("quickstart", ["learner.overlap_communication=true"])
