"""`bench replay` compares two ways that compute the same; its times are for quiet machines."""

import json

from rich.console import Console

from latent_grpo.deploy.bench.figures import write_json
from latent_grpo.deploy.bench.replay import measure, show


def test_shared_prompts_are_computed_once_where_responses_are_short(tmp_path):
    found = measure(hidden=32, layers=1, repeats=1, lengths=[(40, 6), (20, 200)])
    short, long = found.rows
    assert short.samples_a_sequence > long.samples_a_sequence == 1.0
    assert short.positions > 1.5 > long.positions == 1.0
    console = Console(record=True, width=200)
    show(found, console)
    assert f"1/{short.positions:.2f}" in console.export_text()
    write_json(found, tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["rows"][0]["prompt"] == 40
