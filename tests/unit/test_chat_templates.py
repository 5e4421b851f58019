"""A chat template whose prompts are not those of the run's problems is refused at the start, in one line."""

from __future__ import annotations

import re

import pytest
from model_folders import TEMPLATE, model, tokenizer

from latent_grpo.common.chat_templates import pinned_template, render_chat
from latent_grpo.common.config import ConfigError, PromptConfig, load_config
from latent_grpo.common.config.loading import of_model
from latent_grpo.common.prompts import PromptRenderer, foreign_sentences, resolve_tokens
from latent_grpo.common.types import Problem
from latent_grpo.deploy.checks.validate import validate
from latent_grpo.deploy.run.preparation import prepare
from latent_grpo.deploy.run.progress import Reporter

PROBLEM = Problem(uid="t/0", task="t", messages=(("user", "What is 12 plus 30?"),), answer="42")
DATE = "26 Jul 2024"
REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|user|>{{ m['content'] }}\n{% endfor %}<|assistant|>"
)
DROPPED = {
    "another role's name": "{% for m in messages if m['role'] == 'human' %}{{ m['content'] }}{% endfor %}",
    "nothing at all": "<|assistant|>",
    "cut": "{% for m in messages %}{{ m['content'][:200] }}{% endfor %}",
    "truncated by a filter": "{% for m in messages %}{{ m['content'] | truncate(100) }}{% endfor %}",
    "capitals": "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
    "another key": "{% for m in messages %}{{ m['text'] }}{% endfor %}",
    "its first line": "{{ messages[-1]['content'].split('\\n')[0] }}",
    "escaped": "{% for m in messages %}{{ m['content'] | e }}{% endfor %}",
    "without tags": "{% for m in messages %}{{ m['content'] | striptags }}{% endfor %}",
    "as JSON": "{% for m in messages %}{{ m['content'] | tojson }}{% endfor %}",
    "its length": "{% for m in messages %}{{ m['content'] | length }}{% endfor %}",
}
RAISING = {
    "an exception of its own": ("{{ raise_exception('no') }}", r"fails on messages of the roles user \(no\)"),
    "an undefined attribute": ("{{ nothing.here }}", r"fails on messages of the roles user \(.*'nothing' is undefined"),
    "another type": ("{{ messages[0]['content'] + 1 }}", r"fails on messages of the roles user \("),
    "a missing message": ("{{ messages[1]['content'] }}", r"fails on messages of the roles user \("),
    "syntax": ("{% for m in messages %}", r"fails on messages of the roles user \("),
}  # fmt: skip
SYSTEM = {
    "refused": (REFUSES_SYSTEM, r"refuses a system message \(System role not supported\); set prompt.user instead of"),
    "dropped": (
        "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}",
        r"does not print its system message whole .*; set prompt.user instead of prompt.system",
    ),
    "its own instead": (
        "Be kind.{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
        r"does not print its system message whole",
    ),
}


def fault_of(template, problem=PROBLEM, **prompt):
    with pytest.raises(ConfigError) as found:
        PromptRenderer(tokenizer(template), PromptConfig(**prompt)).render(problem)
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("case", DROPPED)
def test_a_template_that_drops_the_problem_is_refused(case):
    line = fault_of(DROPPED[case])
    assert "chat template does not print its user message whole" in line
    assert "set prompt.format to a plain-text prompt" in line


@pytest.mark.parametrize("case", RAISING)
def test_a_template_that_raises_is_refused_in_its_own_words(case):
    template, message = RAISING[case]
    line = fault_of(template)
    assert re.search(message, line), line
    assert "set prompt.format" in line


@pytest.mark.parametrize("case", SYSTEM)
def test_a_template_without_a_place_for_the_system_message_is_refused_where_a_run_has_one(case):
    template, message = SYSTEM[case]
    line = fault_of(template, system="Be brief.")
    assert re.search(message, line), line
    assert "12 plus 30" in PromptRenderer(tokenizer(template), PromptConfig()).render(PROBLEM)


def test_a_row_of_messages_that_is_not_printed_is_named():
    """Only rows show it here: the template prints the last message alone."""
    chat = (("system", "Be right."), ("user", "1+1?"))
    row = Problem(uid="rows.parquet/7", task="t", messages=chat, answer="2", whole=True)
    line = fault_of("{{ messages[-1]['content'] }}", row)
    assert line.startswith("problem rows.parquet/7: the tokenizer's chat template does not print its system message")


@pytest.mark.parametrize("filtered", ["{{ ['a', 'b'] | random }}", "{{ lipsum(n=1) }}", "{{ 'ab'|random() }}"])
def test_a_template_that_draws_at_random_is_refused(filtered):
    assert "draws at random" in fault_of(filtered + TEMPLATE)


TRIMMED = TEMPLATE.replace("m['content']", "m['content'] | trim")


@pytest.mark.parametrize("template", [TEMPLATE, TRIMMED, REFUSES_SYSTEM, "{{ messages[0].content }}"])
def test_a_template_that_prints_the_problem_passes(template):
    problem = Problem(uid="0", task="t", messages=(("user", "  Two\nlines? "),), answer="")
    assert "Two\nlines?" in PromptRenderer(tokenizer(template), PromptConfig()).render(problem)


def test_a_date_is_the_runs_own_also_for_a_server_of_another_program():
    template = "{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y\") }}" + TEMPLATE
    chat = [{"role": "user", "content": "a"}]
    assert render_chat(tokenizer(template), chat, DATE).startswith("26 Jul 2024 2024<|user|>a")
    pinned = pinned_template(template, "01 Feb 2026")
    assert "strftime" not in pinned
    assert render_chat(tokenizer(pinned), chat, DATE).startswith("01 Feb 2026 2026<|user|>a")


RUN = [
    "tasks.0={name: t, path: 'builtin:chain_arithmetic', verifier: number, max_prompt_tokens: 96, "
    "max_response_tokens: 16}",
    "evaluation.tasks=[]",
]


@pytest.mark.parametrize("start", [validate, lambda config: prepare(config, Reporter())], ids=["validate", "train"])
@pytest.mark.parametrize(
    ("template", "setting", "message"),
    [
        (DROPPED["another role's name"], [], r"^task t: .*does not print its user message whole"),
        (REFUSES_SYSTEM, ["model.prompt.system=Be brief."], r"^task t: .*refuses a system message \(System role not"),
    ],
)
def test_a_run_is_refused_with_its_task(tmp_path, start, template, setting, message):
    model().save_pretrained(tmp_path)
    tokenizer(template).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        start(load_config("quickstart", [*RUN, *of_model(str(tmp_path)), *setting]))


def test_a_tokenizer_that_may_be_another_models_is_said():
    own = tokenizer()
    assert foreign_sentences(own, resolve_tokens(own, 320, True)) == []
    (line,) = foreign_sentences(own, resolve_tokens(own, 32_000, True))
    assert line == "the tokenizer has tokens for 263 of the model's 32,000 rows: is it the tokenizer of this model?"
    (line,) = foreign_sentences(own, resolve_tokens(own, 320, True, extra_eos_ids=[72]))
    assert re.match(r"the model's configuration ends a text with 72 \('.'\), which are no special tokens of the", line)
    assert foreign_sentences(own, resolve_tokens(own, 320, True, extra_eos_ids=[4, 72])) == []
    with pytest.raises(ConfigError, match="holds None; expected whole numbers"):
        resolve_tokens(own, 320, True, extra_eos_ids=[4, None])
