"""The soak: a run whose processes are killed again and again ends as the undisturbed one, bit for bit."""

import pytest

from latent_grpo.deploy.bench.soak import KINDS, measure

pytestmark = [pytest.mark.integration, pytest.mark.slow]  # a quarter of an hour, and more than an hour


@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("kills", [len(KINDS), 100])
def test_nothing_is_lost_or_repeated_whatever_is_killed(tmp_path, kills):
    soak = measure(kills, 0, None, tmp_path)
    assert len(soak.kills) == kills
    assert {kill.kind for kill in soak.kills} == set(KINDS)
    assert (soak.lost, soak.duplicated, soak.different, soak.same_weights) == (0, 0, 0, True)
