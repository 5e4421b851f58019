"""A trained model in Python: what it answers, what decides a response, and what is said about bad input."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from latent_grpo import LatentModel, LatentStep, Response
from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.common.model_chain import CHAIN_FILE, exported_chain, read_chain
from latent_grpo.common.models import load_tokenizer, make_tokenizer
from latent_grpo.rollout_workers.latent_model import vllm_refusal
from latent_grpo.rollout_workers.vllm_plugin.support import TESTED

QUESTIONS = ["1+2*3?", "9-4+0?", "5*5?"]
BENCHMARK = {"name": "svamp", "path": "svamp.parquet"}


@pytest.fixture(scope="module")
def folder(trained_folder):
    return trained_folder


@pytest.fixture(scope="module")
def model(folder):
    return LatentModel(folder)


def with_chain(folder, tmp_path, change):
    """The same model with another chain file; `change(chain)` edits its contents, None removes it."""
    (tmp_path / "m").mkdir()
    for file in folder.iterdir():
        (tmp_path / "m" / file.name).symlink_to(file)
    (tmp_path / "m" / CHAIN_FILE).unlink()
    if change is not None:
        chain = json.loads((folder / CHAIN_FILE).read_text())
        change(chain)
        (tmp_path / "m" / CHAIN_FILE).write_text(json.dumps(chain))
    return tmp_path / "m"


def same(one: Response, other: Response) -> bool:
    pairs = zip(one.thoughts, other.thoughts)
    return (
        np.array_equal(one.token_ids, other.token_ids)
        and one.latent_steps == other.latent_steps
        and all(np.array_equal(a.ids, b.ids) and np.allclose(a.weights, b.weights) for a, b in pairs)
    )


def test_responses_come_in_the_order_of_problems_and_samples(model):
    found = model.generate(QUESTIONS, samples=2, noise=0.5)
    assert [(r.problem, r.sample) for r in found] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    for response in found:
        assert response.steps == response.latent_steps + len(response.token_ids) <= 18
        assert all(step.ids.shape == step.weights.shape == (3,) for step in response.thoughts)
        assert all(step.weights.sum() == pytest.approx(1) and (step.log_probs <= 0).all() for step in response.thoughts)
        assert response.finish_reason == ("length" if response.steps == 18 else "stop")
        assert response.answer in response.text
        assert "<eos>" not in response.text


def test_a_response_does_not_depend_on_what_is_generated_beside_it(model):
    together = model.generate(QUESTIONS, samples=3, noise=1.0, seed=5)
    alone = model.generate(QUESTIONS[1], samples=1, noise=1.0, seed=5)
    assert same(together[3], alone[0])
    assert not same(together[3], together[4])
    assert not all(same(a, b) for a, b in zip(together, model.generate(QUESTIONS, samples=3, noise=1.0, seed=6)))


def test_a_stream_adds_up_to_the_response(model):
    *pieces, last = model.stream(QUESTIONS[0], seed=3, noise=0.7)
    (whole,) = model.generate(QUESTIONS[0], seed=3, noise=0.7)
    assert same(last, whole)
    thoughts = [piece for piece in pieces if isinstance(piece, LatentStep)]
    assert [step.texts for step in thoughts] == [step.texts for step in whole.thoughts]
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == whole.text
    assert len(thoughts) + sum(isinstance(piece, str) for piece in pieces) > 2, "it came in one piece"


def test_a_stream_that_is_left_leaves_nothing_behind(model):
    next(iter(model.stream(QUESTIONS[0])))
    assert len(model.generate(QUESTIONS)) == 3


def test_what_is_left_open_is_the_model_s_own(folder, model, tmp_path):
    def hotter(chain):
        chain["generation"] |= {"temperature": 3.0, "max_tokens": 5}
        chain["k"] = 2

    other = LatentModel(with_chain(folder, tmp_path, hotter))
    (changed,) = other.generate(QUESTIONS[0])
    assert changed.steps <= 5
    assert all(step.ids.shape == (2,) for step in changed.thoughts)
    (asked,) = model.generate(QUESTIONS[0], temperature=3.0, max_tokens=5, k=2)
    assert same(asked, changed)


def test_a_text_gets_the_prompt_of_the_training_and_a_chat_none(folder, tmp_path):
    path = with_chain(folder, tmp_path, lambda chain: chain["generation"]["prompt"].update(user="1+1?{problem}"))
    model = LatentModel(path)
    text, chat = model.generate([QUESTIONS[2], [{"role": "user", "content": QUESTIONS[2]}]])
    assert text.prompt_tokens == chat.prompt_tokens + 4


def test_the_chain_file_keeps_the_prompt_of_a_benchmark(folder):
    tokenizer = make_tokenizer(load_config("quickstart").model.new)
    config = load_config("quickstart", [f"tasks=[{json.dumps(BENCHMARK)}]", "model.new.max_positions=2048"])
    generation = exported_chain(config, tokenizer).generation
    assert "step by step" in generation.prompt.user
    assert (generation.temperature, generation.top_k) == (config.temperature, config.top_k)


def test_a_model_without_a_chain_file_says_what_is_assumed(folder, tmp_path):
    said = []
    path = with_chain(folder, tmp_path, None)
    (response,) = LatentModel(path, say=said.append).generate(QUESTIONS[0], max_tokens=4)
    assert "has no latent_chain.json: a latent chain with k 10, tau 1 and '</think>' is assumed" in said[0]
    assert all(step.ids.shape == (10,) for step in response.thoughts)
    assert read_chain(path) is None


def test_the_chain_file_of_an_earlier_version_is_enough(folder, tmp_path):
    path = with_chain(folder, tmp_path, lambda chain: chain.pop("generation"))
    assert len(LatentModel(path).generate(QUESTIONS)) == 3


def test_an_explicit_chain_is_text(folder, tmp_path):
    path = with_chain(folder, tmp_path, lambda chain: chain.update(chain="explicit", k=None, tau=None))
    model = LatentModel(path)
    assert model.generate(QUESTIONS[0])[0].latent_steps == 0
    with pytest.raises(ConfigError, match="explicit chain, without latent steps: leave out noise, k, tau"):
        model.generate(QUESTIONS[0], noise=1.0)


def test_nothing_is_asked_and_nothing_comes(model):
    assert model.generate([]) == []


@pytest.mark.parametrize(
    ("problems", "settings", "said"),
    [
        ([""], {}, "problem 0 is empty"),
        (["1+1?", 5], {}, "problem 1: expected a text, or a chat"),
        ([[{"role": "user"}]], {}, "problem 0: expected a text, or a chat"),
        ([{"role": "user", "content": "1+1?"}], {}, "problem 0: expected a text, or a chat"),
        (["hello"], {}, "cannot be encoded for this model"),
        (["1+" * 400 + "1?"], {}, r"its prompt of 8\d\d tokens do not fit into the model's 128 positions"),
        (["1+1?"], {"max_tokens": 128}, "and max_tokens 128 do not fit .* or lower max_tokens"),
        (["1+1?"], {"samples": 65}, r"samples must be from 1 to max_rows \(64\)"),
        (["1+1?"], {"noise": -1.0}, r"noise must be 0 \(off\) or more, got -1"),
        (["1+1?"], {"temperature": 0.0}, "temperature must be above 0; for greedy text top_k=1"),
        (["1+1?"], {"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        (["1+1?"], {"max_tokens": 0}, "max_tokens must be 1 or more"),
        (["1+1?"], {"k": 99}, "k must be from 1 to the number of tokens"),
        (["1+1?"], {"tau": 0.0}, "tau must be above 0"),
    ],
)
def test_what_cannot_work_is_one_line(model, problems, settings, said):
    with pytest.raises(ConfigError, match=said) as error:
        model.generate(problems, **settings)
    assert "\n" not in str(error.value)
    assert len(model.generate(QUESTIONS)) == 3, "and the model goes on"


def test_a_misspelt_setting_is_refused(model):
    with pytest.raises(TypeError, match="temprature"):
        model.generate(QUESTIONS, temprature=1.0)
    with pytest.raises(TypeError, match="temprature"):
        next(model.stream(QUESTIONS[0], temprature=1.0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "sglang"}, "engine must be transformers or vllm, got 'sglang'"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
    ],
)
def test_an_unknown_engine_or_dtype_is_refused(folder, options, said):
    with pytest.raises(ConfigError, match=said):
        LatentModel(folder, **options)


def test_a_missing_vllm_is_named_by_the_option_and_not_by_a_runs_key(folder):
    missing = vllm_refusal(folder, None)
    assert missing.startswith("engine vllm: vLLM is not installed here")
    assert missing.endswith("or use the engine transformers")
    assert "no support for architecture" not in str(vllm_refusal(folder, ("cuda", "0.40.0")))
    assert vllm_refusal(folder, ("cuda", TESTED["cuda"][0])) is None


def test_ids_that_the_model_has_no_rows_for_are_said_and_a_text_with_one_is_quoted(folder, tmp_path):
    path, said = with_chain(folder, tmp_path, lambda chain: None), []
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<|compress_token|>"])
    for file in path.iterdir():
        if "token" in file.name:
            file.unlink()
    tokenizer.save_pretrained(path)
    model = LatentModel(path, say=said.append)
    assert "the tokenizer has 1 id(s) that the model" in said[0]
    with pytest.raises(ConfigError, match=r"^problem 0 \('1\+<\|compress_token\|>'\): its prompt cannot be encoded"):
        model.generate("1+<|compress_token|>")


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"it has no config.json; give a Hugging Face model folder"):
        LatentModel(tmp_path)


def test_another_tokenizer_is_refused(folder, tmp_path):
    path = with_chain(folder, tmp_path, lambda chain: chain.update(think_end_ids=[7]))
    with pytest.raises(ConfigError, match=r"splits '</think>' into .* trained with"):
        LatentModel(path)


@pytest.mark.vllm
def test_both_engines_give_the_same_responses(folder, model):
    from latent_grpo.common.config import VLLMConfig

    with LatentModel(folder, engine="vllm", vllm=VLLMConfig(kv_cache_bytes=2**24)) as other:
        for settings in ({}, {"noise": 0.7, "seed": 4}):
            expected, found = (m.generate(QUESTIONS, samples=3, **settings) for m in (model, other))
            assert all(same(a, b) for a, b in zip(expected, found, strict=True))
        *pieces, last = other.stream(QUESTIONS[0], seed=3, noise=0.7)
        *here, whole = model.stream(QUESTIONS[0], seed=3, noise=0.7)
        assert same(last, whole)
        assert [type(piece) for piece in pieces] == [type(piece) for piece in here]


def test_a_model_is_found_below_the_home_folder(trained_folder):
    with LatentModel(f"~/{os.path.relpath(trained_folder, Path.home())}") as model:
        assert model.model.tokenizer is not None
