"""`bench logprobs` compares two ways that compute the same; its figures are for quiet machines."""

import json

from rich.console import Console

from latent_grpo.deploy.bench.figures import write_json
from latent_grpo.deploy.bench.logprobs import PLAIN, Sizes, measure, show


def test_the_plain_way_takes_the_memory_of_all_logits_and_ours_does_not(tmp_path):
    sizes = Sizes(positions=1024, vocabulary=20_000, hidden=16, selected=3)
    found = measure(sizes, turns=1, at_once=(64,))
    logits = 4 * sizes.positions * sizes.vocabulary / 2**20
    memory = {(way.trained, way.at_once): way.mib for way in found.ways}
    assert min(memory[trained, PLAIN] for trained in (True, False)) > 1.5 * logits
    assert max(memory[trained, 64] for trained in (True, False)) < 1.2 * logits  # freed chunks stay in the heap
    assert found.gap < 1e-5
    console = Console(record=True, width=200)
    show(found, console)
    assert "all (plain)" in console.export_text()
    write_json(found, tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["sizes"]["positions"] == 1024
