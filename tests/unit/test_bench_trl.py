"""`bench trl` gives both trainers the same work; its times are for quiet machines."""

import json

import pytest
from rich.console import Console

from latent_grpo.common.errors import ConfigError
from latent_grpo.deploy.bench.figures import write_json
from latent_grpo.deploy.bench.trl import (
    OURS,
    PROMPTS,
    SAMPLES,
    TRL,
    Cost,
    Scattered,
    TrlBench,
    agreement,
    make_model,
    measure,
    our_config,
    show,
    trl_missing,
)
from latent_grpo.reward.verifier import load_verifier


def test_our_ways_say_what_trl_is_told(tmp_path):
    model = make_model(tmp_path / "model")
    for name in OURS:
        config = our_config(str(model), name, 3, str(tmp_path))
        assert config.samples_per_step == PROMPTS * SAMPLES
        assert (config.minibatch_prompts, config.optimizer.lr, config.freeze_embeddings) == (PROMPTS, 1e-5, False)
    verifier = load_verifier(config.tasks[0].verifier)
    assert isinstance(verifier, Scattered)
    assert [verifier.grade(text, "w1").reward for text in ("w1", "w10")] == [0.0, 1.0]


def test_the_ratios_are_shown(tmp_path):
    costs = {TRL: Cost(cpu_s=1.0, peak_mib=500.0), "ours, explicit": Cost(cpu_s=0.5, peak_mib=600.0)}
    found = TrlBench(trl="1.0", steps=4, costs=costs, loss_gap=1e-7, gradient_gap=2e-6)
    console = Console(record=True, width=160)
    show(found, console)
    text = console.export_text()
    assert "2.00" in text
    assert "1.20" in text
    write_json(found, tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["costs"][TRL]["cpu_s"] == 1.0


def test_without_trl_it_says_how_to_install_it():
    if trl_missing() is None:
        pytest.skip("TRL is installed here")
    with pytest.raises(ConfigError, match=r"pip install 'latent-grpo\[trl\]'"):
        measure(1, 1)


def test_loss_and_gradient_are_trls(tmp_path):
    if missing := trl_missing():
        pytest.skip(missing)
    loss, gradient = agreement(str(make_model(tmp_path / "model")))
    assert loss < 1e-5
    assert gradient < 1e-5
