"""A model is not asked for more positions than it has."""

from __future__ import annotations

import dataclasses
import json

import pytest

from latent_grpo.common.config import ConfigError, NewModelConfig, TaskConfig, load_config
from latent_grpo.common.encoding import TextEncoder
from latent_grpo.common.models import make_model, position_limit, save_model
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.deploy.run.preparation import check_positions
from latent_grpo.deploy.run.problems import prepare_task, read_task

TOKENIZER = make_arithmetic_tokenizer()


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
