"""The prometheus sink on a real Ray: what is written is what a scrape of the node's metrics port finds."""

import time
import urllib.request

import pytest

from latent_grpo.common.metrics import MetricsWriter

pytestmark = pytest.mark.integration
REWARD, STEP = "ray_latent_grpo_rollout_reward{", "ray_latent_grpo_step{"


def scraped(ray):
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return [line for line in answer.read().decode().splitlines() if line.startswith((REWARD, STEP))]
    except OSError:  # the agent that answers is not up yet
        return []


def test_a_metric_is_found_under_its_name_with_the_run_as_its_label(ray_session, tmp_path):
    with MetricsWriter(tmp_path / "run-7", ["prometheus"]) as metrics:
        metrics.write(5, {"rollout/reward": 0.25})
        deadline = time.monotonic() + 300
        while len(lines := scraped(ray_session)) < 2:  # Ray's agents report every ten seconds
            assert time.monotonic() < deadline, f"after five minutes there is {lines}"
            time.sleep(1.0)
    reward, step = sorted(lines)
    assert step.startswith(STEP)
    assert 'run="run-7"' in reward
    assert float(reward.split()[-1]) == 0.25
    assert float(step.split()[-1]) == 5
