"""A model's chain settings: what a run leaves, and what another run on that model is told."""

from __future__ import annotations

import pytest

from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.common.model_chain import (
    CHAIN_FILE,
    ChainSettings,
    check_chain,
    exported_chain,
    read_chain,
    write_chain,
)
from latent_grpo.common.models import load_tokenizer, output_facts
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer

TOKENIZER = make_arithmetic_tokenizer()
END = TOKENIZER.encode("</think>", add_special_tokens=False)


class SplitsTheEnd:
    """A tokenizer that writes the end of thinking in two tokens."""

    def encode(self, text, add_special_tokens):
        return [4, 5]


def quickstart(*overrides):
    return load_config("quickstart", list(overrides))


def on_a_model(*overrides):
    return quickstart("model.path=somewhere", "model.new=null", "warm_start=null", *overrides)


def latent(**changes):
    base = {"chain": "latent", "source": "uniform", "k": 3, "compression": 3, "tau": 1.0}
    return ChainSettings(**{**base, "think_end": "</think>", "think_end_ids": END, **changes})


def explicit():
    return ChainSettings(chain="explicit", think_end="</think>", think_end_ids=END)


def test_latent_sft_leaves_its_chain_and_rl_keeps_its_compression(tmp_path):
    settings = exported_chain(quickstart(), TOKENIZER)
    assert settings == latent(latent_exit="argmax_or_first", prompt={}, generation=settings.generation)
    assert (settings.generation.temperature, settings.generation.max_tokens) == (0.6, 18)
    write_chain(tmp_path, settings)
    assert read_chain(tmp_path) == settings
    after = exported_chain(on_a_model("k=4"), TOKENIZER, before=settings)
    assert (after.k, after.compression, after.source) == (4, 3, "uniform")
    assert exported_chain(on_a_model(), TOKENIZER).compression is None


def test_an_explicit_start_leaves_an_explicit_chain():
    settings = exported_chain(quickstart("algorithm=grpo", "tasks.0.max_response_tokens=44"), TOKENIZER)
    assert settings == explicit().model_copy(update={"prompt": {}, "generation": settings.generation})
    assert settings.generation.max_tokens == 44


def test_another_prompt_or_exit_than_the_models_is_a_warning():
    made = exported_chain(quickstart("model.prompt.system=Think.", "latent_exit=first"), TOKENIZER)
    assert (made.prompt, made.latent_exit) == ({"system": "Think."}, "first")
    exits, prompt = sorted(check_chain(made, "m", on_a_model(), TOKENIZER))
    assert exits.startswith("latent_exit is argmax_or_first, but the model was trained with first")
    assert prompt.startswith("model.prompt is {}, but the model was trained with {'system': 'Think.'}")
    same = on_a_model("model.prompt.system=Think.", "latent_exit=first")
    assert check_chain(made, "m", same, TOKENIZER) == []
    assert check_chain(latent(), "m", same, TOKENIZER) == [], "a file of an earlier version does not say"


def test_a_fitting_run_is_not_warned():
    assert check_chain(latent(), "m", on_a_model(), TOKENIZER) == []
    assert check_chain(explicit(), "m", on_a_model("algorithm=grpo"), TOKENIZER) == []


@pytest.mark.parametrize(
    ("settings", "overrides", "tokenizer", "message"),
    [
        (explicit(), [], TOKENIZER, "has an explicit chain .* Set algorithm to grpo"),
        (latent(), ["algorithm=grpo"], TOKENIZER, "has a latent chain .* Set algorithm to latent_grpo"),
        (latent(), ["k=2"], TOKENIZER, r"k \(2\) is smaller than the model's compression \(3 tokens"),
        (latent(), [], SplitsTheEnd(), r"splits '</think>' into \[4, 5\], but the model was trained with \[20\]"),
        (
            latent(think_end="<end>"),
            [],
            TOKENIZER,
            "ends its thinking with '<end>'.*model.prompt.think_end is '</think>'",
        ),
    ],
)
def test_what_cannot_fit_is_refused(settings, overrides, tokenizer, message):
    with pytest.raises(ConfigError, match=message):
        check_chain(settings, "m", on_a_model(*overrides), tokenizer)


def test_another_width_or_tau_is_a_warning():
    (line,) = check_chain(latent(), "m", on_a_model("k=5"), TOKENIZER)
    assert "k is 5, but the model was trained with 3" in line
    (line,) = check_chain(latent(), "m", on_a_model("tau=0.5"), TOKENIZER)
    assert "tau is 0.5" in line
    (line,) = check_chain(latent(source="induced"), "m", on_a_model("k=2"), TOKENIZER)
    assert "k is 2, but the model was trained with 3" in line, "an induced label need not hold its step's tokens"


def test_a_warm_start_changes_the_chain_so_only_the_tokenizer_is_compared():
    config = quickstart("model.path=somewhere", "model.new=null")
    assert check_chain(explicit(), "m", config, TOKENIZER) == []
    with pytest.raises(ConfigError, match="splits"):
        check_chain(explicit(), "m", config, SplitsTheEnd())


def test_a_model_without_the_file_says_nothing_and_a_damaged_one_is_named(tmp_path):
    assert read_chain(tmp_path) is None
    for text in (
        "{",
        '{"chain": "latent"}',
        '{"format": 2, "chain": "explicit", "think_end": "x", "think_end_ids": []}',
    ):
        (tmp_path / CHAIN_FILE).write_text(text)
        with pytest.raises(ConfigError, match=f"{CHAIN_FILE} is damaged or of another version"):
            read_chain(tmp_path)


@pytest.mark.parametrize("read", [read_chain, load_tokenizer, output_facts])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./typo", r"^model '\./typo': it has no config\.json; give a Hugging Face model folder"),
        (
            "runs/gone/base",  # no hub id either, so the network is not asked
            r"^model 'runs/gone/base': there is no such folder here, and it cannot be read as a hub id .*"
            r"'runs/gone/base'.* Give",
        ),
    ],
)
def test_a_mistyped_model_is_named_with_what_to_give(read, model, message):
    with pytest.raises(ConfigError, match=message):
        read(model)


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect to the hub\nCheck your connection")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unreachable)
    with pytest.raises(ConfigError, match=r"'nosuch': there is no such folder here.*couldn't connect.*this machine"):
        load_tokenizer("nosuch")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 10}')
    with pytest.raises(ConfigError, match=r"it has no tokenizer \(.*\); copy the tokenizer's files"):
        load_tokenizer(tmp_path)
