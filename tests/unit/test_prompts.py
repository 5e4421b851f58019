"""METHOD §1, §8: prompts end in reasoning mode; an unusable tokenizer is refused at start. And models of tests."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from latent_grpo.common.config import ConfigError, NewModelConfig, PromptConfig, load_config
from latent_grpo.common.encoding import TextEncoder
from latent_grpo.common.models import load_model, load_tokenizer, make_model, make_tokenizer, save_model
from latent_grpo.common.prompts import (
    PromptRenderer,
    check_think_start,
    check_width,
    ids_beyond,
    repeated_sentences,
    resolve_tokens,
)
from latent_grpo.common.tasks.arithmetic import ChainArithmetic, make_arithmetic_tokenizer
from latent_grpo.common.types import Problem

PROBLEM = Problem(uid="t/0", task="t", messages=(("user", "one plus {two}?"),), answer="3")


@pytest.fixture(scope="module")
def arithmetic():
    return make_arithmetic_tokenizer()


@pytest.fixture(scope="module")
def bpe():
    config = NewModelConfig(tokenizer="bpe", vocab_size=320)
    return make_tokenizer(config, ["one plus two is three </think>", "what is 12 plus 30?"] * 3)


# --- tokenizers


def test_arithmetic_tokenizer_has_one_token_per_number_and_decodes_without_spaces(arithmetic):
    text = "10+3*0-7?<think></think>\\boxed{10}"
    ids = arithmetic.encode(text)
    assert len(ids) == 13
    assert arithmetic.decode(ids) == text
    assert arithmetic.decode([*arithmetic.encode("\\boxed{7}"), arithmetic.eos_token_id], skip_special_tokens=True) == (
        "\\boxed{7}"
    )
    assert arithmetic.pad_token_id != arithmetic.eos_token_id


def test_arithmetic_tokenizer_reads_every_generated_problem(arithmetic):
    source = ChainArithmetic(name="a")
    for index in range(200):
        problem = source.problem(index)
        assert len(arithmetic.encode(problem.cot)) == 36
        assert len(arithmetic.encode(problem.messages[0][1])) == 14


def test_bpe_tokenizer_keeps_any_text_and_its_marks_whole(bpe):
    text = "a 12 \\boxed{5}\nüß"
    assert bpe.decode(bpe.encode(text)) == text
    assert len(bpe.encode("</think>")) == len(bpe.encode("<think>")) == 1
    with pytest.raises(ConfigError, match="at least 260"):
        make_tokenizer(NewModelConfig(tokenizer="bpe", vocab_size=100))


# --- prompts


def test_arithmetic_prompt_is_the_problem_in_reasoning_mode(arithmetic):
    renderer = PromptRenderer(arithmetic, PromptConfig())
    problem = ChainArithmetic(name="a").problem(0)
    assert renderer.render(problem) == problem.messages[0][1] + "<think>"
    ids = renderer.encode(problem)
    assert ids.dtype == np.int32
    assert arithmetic.decode(ids) == renderer.render(problem)


def test_system_and_user_texts_go_through_the_chat_template(bpe):
    config = PromptConfig(system="Be brief.", user="Say: {problem}")
    assert PromptRenderer(bpe, config).render(PROBLEM) == "Be brief.\nSay: one plus {two}?\n<think>"


def test_chat_of_several_messages_is_taken_as_it_is(bpe):
    chat = (("system", "Own."), ("user", "x?"))
    problem = Problem(uid="t/1", task="t", messages=chat, answer="1")
    models = PromptConfig(system="Other", user="Say: {problem}")
    assert PromptRenderer(bpe, models, PromptConfig()).render(problem) == "Own.\nx?\n<think>"


def test_the_tasks_own_texts_replace_the_rows_system_message_and_go_round_its_question(bpe):
    shots = (("system", "Own."), ("user", "1+1?"), ("assistant", "2"), ("user", "x?"))
    problem = Problem(uid="v/1", task="v", messages=shots, answer="1", whole=True)

    def rendered(**own):
        return PromptRenderer(bpe, PromptConfig(), PromptConfig(**own)).render(problem)

    assert rendered(system="Short.") == "Short.\n1+1?\n2\nx?\n<think>"
    assert rendered(user="SOLVE {problem}") == "Own.\n1+1?\n2\nSOLVE x?\n<think>"
    assert rendered(system=None) == "1+1?\n2\nx?\n<think>", "null that somebody gave: no system message"
    assert rendered(system=None, user="SOLVE {problem}") == "1+1?\n2\nSOLVE x?\n<think>"
    assert rendered(think_end="</t>") == "Own.\n1+1?\n2\nx?\n<think>", "a key that nobody gave changes nothing"


def test_plain_format_replaces_the_template_and_think_start_is_appended_once(bpe):
    assert PromptRenderer(bpe, PromptConfig(format="Q: {problem}\nA:")).render(PROBLEM).endswith("A:<think>")
    already = PromptRenderer(bpe, PromptConfig(format="Q: {problem}\n<think>\n")).render(PROBLEM)
    assert already.count("<think>") == 1


def test_prompt_settings_that_lose_the_problem_are_refused(bpe):
    with pytest.raises(ConfigError, match=r"prompt\.user must contain"):
        PromptRenderer(bpe, PromptConfig(user="hello"))
    bare = make_arithmetic_tokenizer()
    bare.chat_template = None
    with pytest.raises(ConfigError, match=r"set prompt\.format"):
        PromptRenderer(bare, PromptConfig())
    assert PromptRenderer(bare, PromptConfig(format="{problem}")).render(PROBLEM).endswith("?<think>")


# --- token facts


def test_token_facts_of_a_padded_vocabulary(arithmetic):
    facts = resolve_tokens(arithmetic, 32, latent=True)
    assert facts.latent_end_id == arithmetic.convert_tokens_to_ids("</think>")
    assert facts.eos_ids == (arithmetic.eos_token_id,)
    assert facts.allowed.sum() == len(arithmetic)
    assert not facts.allowed[len(arithmetic) :].any()
    more = resolve_tokens(arithmetic, 32, latent=True, extra_eos_ids=(arithmetic.eos_token_id, 5))
    assert more.eos_ids == (arithmetic.eos_token_id, 5)


def test_latent_end_is_the_first_id_of_a_text_of_several_tokens(bpe):
    facts = resolve_tokens(bpe, len(bpe), latent=True, think_end="</reasoning>")
    ids = bpe.encode("</reasoning>")
    assert len(ids) > 1
    assert facts.latent_end_id == ids[0]


def test_unusable_tokenizers_are_refused(arithmetic, bpe):
    with pytest.raises(ConfigError, match="gives id 20 for it, and the model has 10 rows"):
        resolve_tokens(arithmetic, 10, latent=True)
    with pytest.raises(ConfigError, match="not all below the model's vocabulary of 1"):
        resolve_tokens(arithmetic, 1, latent=False)
    with pytest.raises(ConfigError, match=r"cannot encode it.*set prompt\.think_end"):
        resolve_tokens(arithmetic, 32, latent=True, think_end="[end]")
    with pytest.raises(ConfigError, match="would end the response"):
        resolve_tokens(arithmetic, 32, latent=True, think_end="<eos>")
    with pytest.raises(ConfigError, match="white space first"):
        resolve_tokens(bpe, len(bpe), latent=True, think_end="\n</think>")
    with pytest.raises(ConfigError, match="not all below"):
        resolve_tokens(arithmetic, 32, latent=True, extra_eos_ids=(99,))
    endless = make_arithmetic_tokenizer()
    endless.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        resolve_tokens(endless, 32, latent=True)


def test_ids_beyond_the_model_are_left_out_and_refused_where_a_text_needs_one(arithmetic):
    """Llama's released checkpoints have one such id; the tokenizer's here is the brace of the box, 22."""
    rows = len(arithmetic) - 1
    facts = resolve_tokens(arithmetic, rows, latent=True)
    assert (facts.vocab_size, int(facts.allowed.sum())) == (rows, rows)
    assert ids_beyond(arithmetic, rows) == {22: "}"}
    assert ids_beyond(arithmetic, rows + 1) == {}
    fine, beyond = (
        Problem(uid=f"t/{text}", task="t", messages=(("user", text),), answer="3") for text in ("1+2?", "1+}?")
    )
    renderer = PromptRenderer(arithmetic, PromptConfig(), rows=rows)
    assert len(renderer.encode(fine)) == 5
    with pytest.raises(
        ConfigError, match=r"problem t/1\+\}\? \('1\+\}\?'\): its prompt cannot.* token '\}' of id 22, .*22 rows"
    ):
        renderer.encode(beyond)
    with pytest.raises(ConfigError, match=r"problem t/1\+\}\? "):
        renderer.encode_all([fine, beyond], TextEncoder(arithmetic, rows=rows))


LLAMA_DATE = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{%- endif %}"
    "Today: {{ date_string }}{{ strftime_now('|%Y') }}\n{{ messages[0]['content'] }}"
)


def test_a_template_that_prints_a_date_prints_the_runs_own(bpe):
    bpe = copy.deepcopy(bpe)
    bpe.chat_template = LLAMA_DATE
    assert PromptRenderer(bpe, PromptConfig()).render(PROBLEM).startswith("Today: 26 Jul 2024|2024\n")
    dated = PromptRenderer(bpe, PromptConfig(), date="01 Feb 2026")
    assert dated.render(PROBLEM).startswith("Today: 01 Feb 2026|2026\n")
    with pytest.raises(ConfigError, match="date_string must be a date such as '26 Jul 2024', got 'today'"):
        load_config("quickstart", ["model.date_string=today"])


def test_whole_messages_are_used_as_they_are_but_for_the_tasks_own_texts(bpe):
    row = Problem(uid="v/0", task="v", messages=(("user", "Be right.\n1+1?"),), answer="2", whole=True)
    config = PromptConfig(system="Reason.", user="Be right.\n{problem}")
    assert PromptRenderer(bpe, config, PromptConfig()).render(row) == "Be right.\n1+1?\n<think>"
    assert PromptRenderer(bpe, config, PromptConfig(system="Short.")).render(row) == "Short.\nBe right.\n1+1?\n<think>"


def test_repeated_sentences_are_found():
    twice = "Please reason step by step.\nWhat is 1+1? Please reason step by step."
    assert repeated_sentences(twice) == ["Please reason step by step."]
    assert repeated_sentences("Yes. Yes. A long sentence that occurs once only.") == []


def test_explicit_algorithm_needs_no_end_of_thinking(arithmetic):
    assert resolve_tokens(arithmetic, 32, latent=False, think_end="[end]").latent_end_id is None


def test_missing_padding_token_becomes_eos():
    tokenizer = make_arithmetic_tokenizer()
    tokenizer.pad_token = None
    assert resolve_tokens(tokenizer, 32, latent=True).pad_id == tokenizer.eos_token_id


# --- models


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
def test_saved_model_comes_back_with_the_same_weights_and_text(tmp_path, arithmetic, architecture):
    config = NewModelConfig(architecture=architecture, hidden_size=16, intermediate_size=32, num_heads=2)
    model = make_model(config, arithmetic, seed=1)
    save_model(tmp_path, model, arithmetic)
    assert list(tmp_path.glob("*.safetensors"))
    back, tokenizer = load_model(tmp_path), load_tokenizer(tmp_path)
    ids = torch.tensor([arithmetic.encode("3+4?<think>")])
    assert torch.equal(back(input_ids=ids).logits, model(input_ids=ids).logits)
    assert tokenizer.decode(tokenizer.encode("</think>\\boxed{10}")) == "</think>\\boxed{10}"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (arithmetic.eos_token_id, arithmetic.pad_token_id)
    assert PromptRenderer(tokenizer, PromptConfig()).render(PROBLEM).endswith("<think>")
    assert load_model(tmp_path, "bfloat16").dtype == torch.bfloat16


def test_equal_seeds_make_equal_models_and_leave_the_global_generator_alone(arithmetic):
    config = NewModelConfig(hidden_size=16, intermediate_size=32, num_heads=2)
    before = torch.random.get_rng_state()
    one, two, other = (make_model(config, arithmetic, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_unusable_model_settings_are_refused(tmp_path, arithmetic):
    with pytest.raises(ConfigError, match="not divisible"):
        make_model(NewModelConfig(hidden_size=130), arithmetic, seed=0)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ConfigError, match="float32, bfloat16"):
        load_model(tmp_path, "float8")


def test_a_start_of_thinking_that_the_tokenizer_does_not_know_is_refused():
    tokenizer = make_arithmetic_tokenizer()
    check_think_start(load_config("quickstart"), tokenizer)
    with pytest.raises(ConfigError, match=r"prompt.think_start '<zzz>'"):
        check_think_start(load_config("quickstart", ["model.prompt.think_start=<zzz>"]), tokenizer)


def test_a_mixture_is_not_wider_than_the_tokenizers_vocabulary():
    tokenizer = make_arithmetic_tokenizer()
    facts = resolve_tokens(tokenizer, 64, latent=True)
    with pytest.raises(ConfigError, match=f"the tokenizer has {len(tokenizer)} ids"):
        check_width(load_config("quickstart", ["k=40"]), facts)
