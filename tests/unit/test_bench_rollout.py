"""What `bench rollout` prints; the measurements themselves are for quiet machines."""

import json

from rich.console import Console

from latent_grpo.deploy.bench.figures import write_json
from latent_grpo.deploy.bench.rollout import RolloutBench, show
from latent_grpo.deploy.bench.timing import Timing
from latent_grpo.deploy.bench.workload import compared


def test_every_row_is_shown_with_its_ratio_and_what_is_missing_is_said(tmp_path):
    row = compared("latent to ordinary", Timing((1.0, 2.0), 100.0), Timing((2.0, 4.0), 100.0), ">= 0.9")
    found = RolloutBench(model="Llama", rows=[row], forward_shares={"hard": 0.5}, note="no vLLM rows: not installed")
    console = Console(record=True, width=200)
    show(found, console)
    text = console.export_text()
    for part in ("latent to ordinary", "2.00", ">= 0.9", "hard 50%", "no vLLM rows: not installed"):
        assert part in text
    write_json(found, tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["rows"][0]["ratio"] == 2.0
