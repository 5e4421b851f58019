"""The hours of a run are those that an earlier run's steps give, and nothing is said without one."""

from __future__ import annotations

import json

import pytest

from latent_grpo.common.config import ConfigError, config_as_json, load_config
from latent_grpo.common.metrics import FILE
from latent_grpo.deploy.checks.rates import measured, time_rows


def earlier(tmp_path, name: str, *overrides: str, seconds=(9.0, 2.0, 4.0), apart: float = 5.0, kind: str = "train"):
    """A run's folder with its settings and the lines of its steps, which end `apart` seconds after each other."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(config_as_json(load_config("quickstart", list(overrides))))
    key = "time/step_s" if kind == "train" else "seconds"
    lines = [
        {"step": i, "kind": kind, "lineage": 0, "time": 100.0 + apart * i, "metrics": {key: value}}
        for i, value in enumerate(seconds, start=1)
    ]
    (folder / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def config_of(tmp_path, *overrides: str):
    return load_config("quickstart", [f"runs_folder={tmp_path}", "warm_start=null", "steps=3600", *overrides])


def test_no_run_no_hours(tmp_path):
    ((name, text),) = time_rows(config_of(tmp_path))
    assert (name, text.partition(":")[0]) == ("time", "not estimated")
    earlier(tmp_path, "one-step", seconds=(9.0,))
    earlier(tmp_path, "another-size", "group_size=3")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / FILE).write_text("{}\n")
    assert time_rows(config_of(tmp_path)) == [(name, text)], "none of them measured steps like these"


def test_the_hours_are_those_of_a_run_with_the_same_settings(tmp_path):
    folder = earlier(tmp_path, "alike", "steps=3", "seed=7")
    rate = measured(folder)
    assert (rate.steps, rate.seconds, rate.between) == (2, 3.0, 5.0), "the first step starts things up"
    ((name, text),) = time_rows(config_of(tmp_path))
    assert (name, text) == (
        "time",
        f"about 3.0 hours: 3,600 steps of 3 s, as measured in {folder} (2 steps); 5.0 hours with evaluations and "
        "checkpoints as often as there",
    )


def test_a_run_of_another_size_is_scaled_and_its_differences_are_said(tmp_path):
    folder = earlier(tmp_path, "elsewhere", "prompts_per_step=16", "minibatch_prompts=16", "learner.zero_stage=0")
    config = config_of(tmp_path, "prompts_per_step=64", "minibatch_prompts=64", "learner.zero_stage=1")
    time, warning = time_rows(config, folder)
    assert time[1].startswith("about 12.0 hours: 3,600 steps of 12 s, ")
    assert "(2 steps, scaled by 4 to the size of a step)" in time[1]
    assert "prompts_per_step, minibatch_prompts, learner, which the time leaves out of account" in warning[1]


def test_latent_sft_has_hours_of_its_own(tmp_path):
    folder = earlier(tmp_path, "sft", "warm_start.batch_size=64", kind="sft", seconds=(1.0, 1.0, 1.0), apart=1.0)
    config = load_config("quickstart", ["warm_start.batch_size=128", "warm_start.max_steps=3600"])
    (name, text), *_ = time_rows(config, folder)
    assert (name, text.partition(":")[0]) == ("time, Latent-SFT", "about 2.0 hours")


def test_a_run_without_rates_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--measured .*: no metrics\.jsonl there"):
        time_rows(config_of(tmp_path), tmp_path / "none")
    with pytest.raises(ConfigError, match="fewer than two steps of the kind"):
        time_rows(config_of(tmp_path), earlier(tmp_path, "short", seconds=(9.0,)))
