"""`bench scale` runs whole steps of several sizes; its seconds are for quiet machines."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from latent_grpo.deploy.bench.figures import write_json
from latent_grpo.deploy.bench.scale import AXES, WARM_UP, Cost, ScaleBench, exponent, measure, show


def cost(size, seconds):
    return Cost(size=size, rollout_s=seconds, learner_s=1.0, dump_s=1.0, dump_mib=1.0, peak_mib=1.0)


def test_the_exponent_is_the_slope_between_the_last_two_sizes():
    assert exponent([cost(1, 9.0), cost(2, 1.0), cost(8, 16.0)], "rollout_s") == pytest.approx(2.0)
    assert exponent([cost(2, 1.0), cost(8, 4.0)], "rollout_s") == pytest.approx(1.0)


@pytest.mark.slow
def test_every_part_of_a_step_is_measured_for_each_size(tmp_path):
    axes = {"prompts": [replace(WARM_UP, prompts=n) for n in (1, 4)]}
    found = measure(axes, workers=(2,), steps=60)
    small, large = found.axes["prompts"]
    assert min(small.rollout_s, small.learner_s, small.dump_s) > 0
    assert (small.size, large.size) == (1, 4)
    assert large.dump_mib > small.dump_mib
    assert [*found.driver, *found.memory] == [2, 50, 53, 56, 59, 60]
    write_json(found, tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["axes"]["prompts"][1]["size"] == 4


def test_the_table_has_all_axes():
    console = Console(record=True, width=200)
    show(
        ScaleBench(axes={axis: [cost(1, 1.0), cost(2, 2.0)] for axis in AXES}, driver={1: 9.0}, memory={50: 1.0}),
        console,
    )
    text = console.export_text()
    assert all(axis in text for axis in AXES)
    assert "1 workers 9" in text
