"""The soak's comparison: what was lost, came twice or differs is counted."""

import numpy as np
from fake_run import fake_trajectory

from latent_grpo.common.schema import encode
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.deploy.bench.soak import Soak, compare


def run(path, groups, weights=b"w"):
    store = TrajectoryStore(path / "trajectories")
    for step, uids in enumerate(groups, start=1):
        rows = [
            fake_trajectory(np.random.default_rng(group), step=step, group=group, index=i)
            for group in uids
            for i in range(2)
        ]
        store.write(step, encode(rows, 3), "training", 0)
    (path / "model").mkdir(parents=True)
    (path / "model" / "model.safetensors").write_bytes(weights)
    return path


def test_equal_runs_lose_and_repeat_nothing(tmp_path):
    soak = Soak(seed=0, steps=2)
    compare(soak, run(tmp_path / "a", [[0, 1], [2]]), run(tmp_path / "b", [[0, 1], [2]]))
    assert (soak.lost, soak.duplicated, soak.different, soak.same_weights) == (0, 0, 0, True)


def test_lost_repeated_and_other_samples_and_weights_are_counted(tmp_path):
    soak = Soak(seed=0, steps=2)
    compare(soak, run(tmp_path / "a", [[0, 1], [2]]), run(tmp_path / "b", [[0, 0], [2]], b"v"))
    assert (soak.lost, soak.duplicated, soak.different, soak.same_weights) == (2, 2, 1, False)
