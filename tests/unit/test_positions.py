"""A model is not asked for more positions than it has."""

from __future__ import annotations

import pytest

from common.arithmetic import make_arithmetic_tokenizer
from common.config import ConfigError, NewModelConfig, load_config
from common.models import make_model, save_model
from deploy.run import check_positions

TOKENIZER = make_arithmetic_tokenizer()


@pytest.mark.parametrize(
    ("architecture", "breaks"), [("gpt2", True), ("llama", False), ("qwen2", False), ("qwen3", False)]
)
def test_too_long_a_budget_is_said_and_refused_where_it_would_break_the_model(tmp_path, architecture, breaks):
    new = NewModelConfig(architecture=architecture, hidden_size=32, intermediate_size=32, num_heads=4, max_positions=60)
    save_model(tmp_path, make_model(new, TOKENIZER, seed=0), TOKENIZER)
    config = load_config("quickstart", [f"model.path={tmp_path}", "model.new=null", "warm_start=null"])
    assert check_positions(config, tmp_path) == []  # 32 + 18
    longer = config.model_copy(update={"tasks": [config.tasks[0].model_copy(update={"max_response_tokens": 40})]})
    said = r"may take 72 positions \(32 of the prompt, 40 of the response\), model .* was made for 60"
    if breaks:
        with pytest.raises(ConfigError, match=said):
            check_positions(longer, tmp_path)
    else:
        (line,) = check_positions(longer, tmp_path)
        assert "72 positions" in line
