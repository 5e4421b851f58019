"""Recoveries are counted over an hour, whichever process made them."""

import json

import pytest

from latent_grpo.common.errors import RunError
from latent_grpo.common.metrics import FILE as METRICS
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.deploy.run import recoveries as recovery


def test_recoveries_of_the_last_hour_count_and_older_ones_do_not(tmp_path):
    with MetricsWriter(tmp_path, []) as metrics:
        metrics.write(7, {"rollout/reward": 0.5})
    first = recovery.begin(tmp_path, "rank 0 died", lineage=1, limit=2)
    assert (first.reached, first.lineage) == (7, 1)
    recovery.begin(tmp_path, "rank 1 died", lineage=2, limit=2)
    with pytest.raises(RunError, match=r"rank 2 died. The run has recovered 2 time.s. within an hour, .* allows 2; "):
        recovery.begin(tmp_path, "rank 2 died", lineage=3, limit=2)

    file = tmp_path / recovery.FILE
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["began"] -= 2 * recovery.WITHIN_S
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recovery.begin(tmp_path, "rank 3 died", lineage=3, limit=2)
    assert len(file.read_text().splitlines()) == 3


def test_a_run_without_metrics_and_a_torn_line_do_not_stop_a_recovery(tmp_path):
    (tmp_path / recovery.FILE).write_text('{"began": 17')  # the disk was full
    assert recovery.begin(tmp_path, "the controller was killed", lineage=1, limit=1).reached == 0


def test_what_damaged_metrics_hide_is_not_said_to_be_nothing(tmp_path):
    with MetricsWriter(tmp_path, []) as metrics:
        metrics.write(7, {"rollout/reward": 0.5})
    with (tmp_path / METRICS).open("a") as file:
        file.write("{\n")
    found = recovery.begin(tmp_path, "rank 0 died", lineage=1, limit=2)
    assert "how many steps are done again is unknown, since the metrics are damaged" in found.over(5)


def test_the_steps_of_latent_sft_are_not_those_of_rl(tmp_path):
    with MetricsWriter(tmp_path, []) as metrics:
        metrics.write(200, {"loss": 1.0}, kind="sft")
    assert recovery.begin(tmp_path, "rank 0 died", lineage=1, limit=3).reached == 0
    assert recovery.begin(tmp_path, "rank 0 died", lineage=2, limit=3, kind="sft").reached == 200


def test_without_recoveries_allowed_the_first_loss_ends_the_run(tmp_path):
    with pytest.raises(RunError, match=r"max_recoveries allows 0; `latent-grpo train --resume"):
        recovery.begin(tmp_path, "rank 0 died", lineage=1, limit=0)
    assert not (tmp_path / recovery.FILE).exists()
