"""A model is not asked for more positions than it has."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from latent_grpo.common.config import ConfigError, NewModelConfig, TaskConfig, load_config
from latent_grpo.common.encoding import TextEncoder
from latent_grpo.common.models import extended_limit, load_model, make_model, position_limit, save_model
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.deploy.run.preparation import check, check_positions
from latent_grpo.deploy.run.problems import prepare_task, read_task
from latent_grpo.learner.base_rank import RankActor

TOKENIZER = make_arithmetic_tokenizer()


def small(tmp_path, architecture="llama", **changes):
    """A folder of a small model of 60 positions whose configuration has these changes."""
    new = NewModelConfig(architecture=architecture, hidden_size=32, intermediate_size=32, num_heads=4, max_positions=60)
    save_model(tmp_path, make_model(new, TOKENIZER, seed=0), TOKENIZER)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return tmp_path


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "qwen3"])
def test_a_budget_beyond_the_model_is_refused_before_anything_starts(tmp_path, architecture):
    new = NewModelConfig(architecture=architecture, hidden_size=32, intermediate_size=32, num_heads=4, max_positions=60)
    save_model(tmp_path, make_model(new, TOKENIZER, seed=0), TOKENIZER)
    config = load_config("quickstart")
    task = prepare_task(read_task(config.tasks[0], config), config, TextEncoder(TOKENIZER))
    check_positions([task], position_limit(tmp_path), tmp_path)  # at most 32 and 18
    longer = task.source.config.model_copy(update={"max_response_tokens": 40})
    longer = prepare_task(read_task(longer, config), config, TextEncoder(TOKENIZER))
    with pytest.raises(
        ConfigError, match=r"longest prompt \(32 tokens\).*need 72 positions.* has 60; set .* to 28 or less"
    ):
        check_positions([task, longer], position_limit(tmp_path), tmp_path)


def test_the_longest_prompt_of_a_file_counts_and_not_the_limit_on_it(tmp_path):
    rows = [{"problem": f"{'1+' * n}1?", "answer": "1"} for n in (1, 5, 20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = load_config("quickstart")
    source = read_task(TaskConfig(name="t", path=str(path), max_prompt_tokens=20), config)
    task = prepare_task(source, config, TextEncoder(TOKENIZER))
    assert (task.source.size, task.longest_prompt) == (2, 13)  # 11 tokens of the sum, ?, <think>
    assert dataclasses.replace(task, source=task.source).longest_prompt == 13


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_rotary_positions_extrapolate_as_far_as_the_user_says(tmp_path, architecture):
    """The first positions are computed as before, those beyond the checkpoint's number are computed at all."""
    folder = small(tmp_path, architecture)
    assert [extended_limit(folder, wanted) for wanted in (None, 60, 90)] == [60, 60, 90]
    with pytest.raises(ConfigError, match=r"model\.max_positions \(40\) is below the 60 positions.*set it to null"):
        extended_limit(folder, 40)
    plain, longer = load_model(folder), load_model(folder, max_positions=90)
    assert (plain.config.max_position_embeddings, longer.config.max_position_embeddings) == (60, 90)
    ids = torch.arange(90).remainder(20)[None]
    with torch.no_grad():
        whole, first = longer(input_ids=ids).logits, plain(input_ids=ids[:, :50]).logits
    torch.testing.assert_close(whole[:, :50], first, rtol=1e-4, atol=1e-5)
    assert whole.isfinite().all()


@pytest.mark.parametrize(
    ("architecture", "changes", "why"),
    [
        ("gpt2", {}, "this gpt2 model, and its positions are learned"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            r"its rotary positions \(dynamic\) depend on their number",
        ),
    ],
)
def test_positions_that_cannot_extrapolate_are_refused(tmp_path, architecture, changes, why):
    folder = small(tmp_path, architecture, **changes)
    with pytest.raises(ConfigError, match=rf"model\.max_positions \(90\) exceeds the 60 positions.*{why}"):
        extended_limit(folder, 90)
    assert extended_limit(folder, 60) == 60


def test_a_run_beyond_the_checkpoint_is_said_at_its_start_and_needs_the_key(tmp_path):
    given = [f"model.path={small(tmp_path / 'm')}", "model.new=null", "tasks.0.max_response_tokens=40"]
    with pytest.raises(ConfigError, match=r"need 72 positions.*or set model\.max_positions"):
        check(load_config("quickstart", given))
    found = check(load_config("quickstart", [*given, "model.max_positions=90"]))
    assert found.model.positions == 90
    assert any("up to 90 positions are used" in line and "states 60" in line for line in found.model.warnings)
    with pytest.raises(ConfigError, match=r"set model\.new\.max_positions"):
        load_config("quickstart", ["model.max_positions=90"])


def test_the_trained_models_folder_states_the_positions_that_it_was_trained_with(tmp_path):
    folder, rank = small(tmp_path / "m"), RankActor()
    rank.config = load_config("quickstart", [f"model.path={folder}", "model.new=null", "model.max_positions=90"])
    rank.write_model({}, str(folder), tmp_path / "trained")
    assert position_limit(tmp_path / "trained") == 90
