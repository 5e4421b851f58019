"""What `bench rollout` prints; the measurements themselves are for quiet machines."""

import json

import torch
from rich.console import Console

from latent_grpo.deploy.bench.figures import write_json
from latent_grpo.deploy.bench.rollout import RolloutBench, forward_share, show
from latent_grpo.deploy.bench.timing import Timing
from latent_grpo.deploy.bench.workload import bench_model, compared
from latent_grpo.rollout_workers.kv_cache import SlotCache
from latent_grpo.rollout_workers.lean_forward import lean_forward


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


def test_the_models_share_counts_either_pass():
    model = bench_model(64, 32, 1)
    lean, cache = lean_forward(model), SlotCache.of(model)
    with torch.inference_mode(), forward_share(model) as seconds:
        cache.reserve(2, 8, 0)
        cache.begin_step(torch.zeros(2, dtype=torch.int64), 1)
        lean(torch.randn(2, 32), torch.zeros(2, dtype=torch.int64), cache, torch.ones(2, 1, 1, 1, dtype=torch.bool))
        of_lean = seconds()
        assert of_lean > 0
        model.base_model(torch.tensor([[3, 4]]))
        assert seconds() > of_lean
    of_both = seconds()
    model.base_model(torch.tensor([[3, 4]]))
    assert seconds() == of_both, "outside the block nothing is measured"
