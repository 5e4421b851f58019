"""The soak: what is killed is decided by the seed alone, it goes on where it was, and its end is compared in full."""

import numpy as np
import pytest
from fake_run import fake_trajectory

from latent_grpo.common.config import ConfigError
from latent_grpo.common.schema import encode
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.deploy.bench.soak import FILE, KINDS, Kill, Soak, begun, compare, planned, report


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


def test_kinds_come_in_turns_that_the_seed_and_the_number_of_the_kill_decide():
    kinds = [planned(3, number)[0] for number in range(4 * len(KINDS))]
    turns = [kinds[first : first + len(KINDS)] for first in range(0, len(kinds), len(KINDS))]
    assert all(sorted(turn) == sorted(KINDS) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert kinds == [planned(3, number)[0] for number in range(4 * len(KINDS))]
    assert kinds != [planned(4, number)[0] for number in range(4 * len(KINDS))]
    assert planned(3, 5)[1].random() == planned(3, 5)[1].random() != planned(3, 6)[1].random()


def test_a_soak_that_was_interrupted_goes_on_and_another_one_is_refused(tmp_path):
    soak = begun(tmp_path, 1, 20)
    soak.kills.append(Kill("GCS", 4, 10.0, 30.0))
    soak.seconds["undisturbed"], soak.running, soak.memory_mib = 9.5, (17, 1.5), {"GCS": (30.0, 31.0)}
    soak.keep(tmp_path)
    again = begun(tmp_path, 1, 20)
    assert (again.kills, again.seconds["undisturbed"], list(again.running)) == (soak.kills, 9.5, [17, 1.5])
    with pytest.raises(ConfigError, match="has a soak of seed 1 over 20 steps, not of seed 2 over 20"):
        begun(tmp_path, 2, 20)
    (tmp_path / FILE).write_text("[]")
    with pytest.raises(ConfigError, match="is damaged"):
        begun(tmp_path, 1, 20)


def test_the_report_has_a_row_for_each_kind_that_was_killed():
    kills = [Kill("GCS", 4, 10.0, 30.0), Kill("GCS", 9, 12.0, 20.0), Kill("grader", 12, None, 0.5)]
    soak = Soak(0, 20, kills, same_weights=True, memory_mib={"GCS": (30.0, 31.0)}, descriptors={"GCS": (5, 5)})
    text = report(soak)
    assert "**3 kills in 20 steps, seed 0**" in text
    assert "| GCS | 2 | 11.0 | 12.0 | 25.0 | 30.0 |" in text
    assert "| grader | 1 | - | - | 0.5 | 0.5 |" in text
    assert "weights equal bit for bit" in text
    assert "* GCS: 30 -> 31 MiB, 5 -> 5 descriptors" in text
