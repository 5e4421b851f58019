"""The prometheus sink on a real Ray: what is written is what a scrape of the node's metrics port finds."""

import time
import urllib.request

import pytest

from common.metrics import MetricsWriter

pytestmark = pytest.mark.integration


def scraped(ray):
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return [line for line in answer.read().decode().splitlines() if line.startswith("ray_latent_grpo_")]


def test_a_metric_is_found_under_its_name_with_the_run_as_its_label(ray_session, tmp_path):
    with MetricsWriter(tmp_path / "run-7", ["prometheus"]) as metrics:
        metrics.write(5, {"rollout/reward": 0.25})
        deadline = time.monotonic() + 60
        while not (lines := scraped(ray_session)):  # Ray's agents report every ten seconds
            assert time.monotonic() < deadline, "nothing was exported within a minute"
            time.sleep(1.0)
    (reward,) = [line for line in lines if line.startswith("ray_latent_grpo_rollout_reward{")]
    assert 'run="run-7"' in reward
    assert float(reward.split()[-1]) == 0.25
    assert any((line.startswith("ray_latent_grpo_step{") and line.endswith(" 5")) or " 5.0" in line for line in lines)
