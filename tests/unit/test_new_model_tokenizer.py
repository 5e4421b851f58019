"""A new model with the tokenizer of another one (`model.new.tokenizer`), found, missing, and mistyped."""

from __future__ import annotations

import pytest

from latent_grpo.common.config import ConfigError, NewModelConfig, load_config
from latent_grpo.common.models import make_model, make_tokenizer, save_model
from latent_grpo.deploy.checks.validate import validate
from latent_grpo.deploy.reproduce.scheduler import check
from latent_grpo.deploy.reproduce.suite import SuiteError
from latent_grpo.deploy.reproduce.unit import Request
from latent_grpo.deploy.run.preparation import check as check_run


@pytest.fixture
def other(tmp_path):
    """The folder of a model whose tokenizer is a BPE one."""
    config = NewModelConfig(tokenizer="bpe", vocab_size=300, hidden_size=8, num_heads=2, num_layers=1)
    tokenizer = make_tokenizer(config, ["Tom has 3 pens, gets 4. Left?"] * 9)
    save_model(tmp_path / "other", make_model(config, tokenizer, seed=0), tokenizer)
    return tmp_path / "other"


def test_the_new_model_has_the_other_models_vocabulary(other):
    config = load_config("words-small", [f"model.new.tokenizer={other}", "k=5", "tasks.0.max_prompt_tokens=60",
                                         "evaluation.tasks.0.max_prompt_tokens=60"])  # fmt: skip
    model = check_run(config).model
    assert model.source is None, "the model itself is still to be made"
    theirs = make_tokenizer(NewModelConfig(tokenizer=str(other)))
    assert model.tokenizer.get_vocab() == theirs.get_vocab()
    assert (
        model.facts.vocab_size == make_model(config.model.new, model.tokenizer, seed=0).config.vocab_size == len(theirs)
    )


def test_a_missing_folder_is_named_by_its_key_where_the_run_starts_and_by_the_suite(tmp_path):
    missing = ["model.new.tokenizer=./nowhere"]
    rows = dict(validate(load_config("words-small", missing)))
    assert rows["tokenizer"] == "not checked: ./nowhere is not a folder on this machine"
    with pytest.raises(ConfigError, match=r"^model\.new\.tokenizer './nowhere'"):
        check_run(load_config("words-small", missing))
    with pytest.raises(
        SuiteError, match=r"model\.new\.tokenizer \(profile words-small\): there is no folder ./nowhere"
    ):
        check(Request(source="words-small", folder=tmp_path, overrides=missing))


def test_a_mistyped_name_is_no_hub_id():
    with pytest.raises(ValueError, match=r"arithmetic, bpe, or a model's folder or hub id .* got 'arithmatic'"):
        NewModelConfig(tokenizer="arithmatic")
