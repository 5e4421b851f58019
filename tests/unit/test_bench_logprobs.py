"""`bench logprobs` compares two ways that compute the same; its figures are for quiet machines."""

import json

import pytest
from rich.console import Console

from latent_grpo.deploy.bench.figures import write_json
from latent_grpo.deploy.bench.logprobs import PLAIN, LogProbsBench, Sizes, Way, measure, show


def test_the_table_compares_with_the_plain_way_of_the_same_layer():
    ways = [
        Way(trained=trained, at_once=size, cpu_s=cpu_s, mib=mib)
        for trained, size, cpu_s, mib in (
            (True, PLAIN, 4.0, 100.0),
            (True, 8, 3.0, 10.0),
            (False, PLAIN, 2.0, 50.0),
            (False, 8, 1.0, 1.0),
        )
    ]
    console = Console(record=True, width=200)
    show(LogProbsBench(sizes=Sizes(), gap=1e-7, ways=ways), console)
    lines = [line for line in console.export_text().splitlines() if "│" in line]
    assert [("0.75" in line, "0.50" in line, "0.020" in line) for line in lines[1::2]] == [
        (True, False, False),
        (False, True, True),
    ]


@pytest.mark.slow  # it starts five processes; tests/unit/test_logprobs.py has the numbers
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
