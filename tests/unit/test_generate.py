"""`latent-grpo generate` and `serve`: what they print and write, and one line for what cannot work."""

from __future__ import annotations

import io
import itertools
import json
import shlex

import pytest
from rich.console import Console
from typer.testing import CliRunner

from latent_grpo import LatentModel
from latent_grpo.common.config import ConfigError, PromptConfig, load_config
from latent_grpo.common.models import load_tokenizer
from latent_grpo.common.tasks.benchmarks import prompt_of
from latent_grpo.deploy.cli.app import app
from latent_grpo.deploy.run.problems import read_task
from latent_grpo.deploy.serving.generate import Wish, as_row, generate_rows, problems_of, typed_problems
from latent_grpo.deploy.serving.serve import chat_template, serve
from latent_grpo.rollout_workers.trained_model import read_trained_model

QUESTIONS = ["1+2*3?", "9-4+0?"]
CPU = ("cpu", "0.32.0")


def run(*arguments, stdin=""):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"problem": question, "answer": "?"}) + "\n" for question in QUESTIONS))
    return path


def test_a_prompt_is_answered_with_its_thoughts_if_wished_for(trained_folder):
    (expected,) = LatentModel(trained_folder).generate(QUESTIONS[0], seed=2, noise=0.5)
    plain = run("--model", trained_folder, "--prompt", QUESTIONS[0], "--seed", 2, "--noise", 0.5)
    assert plain.exit_code == 0, plain.output
    assert plain.stdout.startswith(expected.text)
    assert f"{expected.latent_steps} latent and {len(expected.token_ids)} visible steps" in plain.stdout
    thoughts = run("--model", trained_folder, "--prompt", QUESTIONS[0], "--seed", 2, "--noise", 0.5, "--thoughts")
    first = expected.thoughts[0]
    assert f"{first.texts[0]} {first.weights[0]:.2f}" in thoughts.stdout.splitlines()[0]
    assert len(thoughts.stdout.splitlines()) >= expected.latent_steps + 1


def test_samples_are_shown_one_after_the_other(trained_folder):
    found = run("--model", trained_folder, "--prompt", QUESTIONS[0], "--samples", 2, "--noise", 1.0)
    assert 0 <= found.stdout.find("sample 0") < found.stdout.find("sample 1")


def test_lines_of_standard_input_are_problems(trained_folder):
    found = run("--model", trained_folder, stdin=f"{QUESTIONS[0]}\n\n{QUESTIONS[1]}\n")
    assert found.exit_code == 0
    assert found.stdout.count("visible steps") == 2
    assert list(typed_problems(io.StringIO("a\n\n b \n"), Console(quiet=True))) == ["a", "b"]


def test_the_rows_of_a_file_become_rows_of_json(trained_folder, rows, tmp_path):
    out = tmp_path / "out.jsonl"
    settings = ("--samples", 2, "--noise", 1.0, "--max-tokens", 6, "--thoughts")
    assert run("--model", trained_folder, "--file", rows, "--output", out, *settings).exit_code == 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    expected = LatentModel(trained_folder).generate(QUESTIONS, samples=2, noise=1.0, max_tokens=6)
    assert written == [as_row(r, r.problem, QUESTIONS[r.problem], thoughts=True) for r in expected]
    assert [(row["row"], row["sample"]) for row in written] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(len(row["thoughts"]) == row["latent_steps"] for row in written)
    printed = run("--model", trained_folder, "--file", rows, *settings)
    assert [json.loads(line) for line in printed.stdout.splitlines()] == written
    again = run("--model", trained_folder, "--file", rows, "--output", out)
    assert isinstance(again.exception, ConfigError)
    assert "exists already" in str(again.exception)


def test_long_files_are_written_part_by_part_in_order(trained_folder):
    model, written = LatentModel(trained_folder), []
    problems = [f"{a}+{b}?" for a in range(10) for b in range(7)]
    assert generate_rows(model, problems, Wish(sampling={"max_tokens": 2}), written.append) == 70
    assert [row["row"] for row in written] == list(range(70))
    assert [row["problem"] for row in written] == problems


def test_a_chat_in_a_row_is_used_as_it_is(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": chat, "problem": "p"}) + "\n")
    assert problems_of(tmp_path / "rows.jsonl", None, None) == [chat]
    assert problems_of(tmp_path / "rows.jsonl", "problem", None) == ["p"]


def test_raw_rows_of_gpqa_are_asked_as_an_evaluation_asks_them(tmp_path, trained_folder):
    parts = {"Question": "Which?", "Correct Answer": "right"}
    parts |= {f"Incorrect Answer {i}": text for i, text in enumerate(("one", "two", "three"), start=1)}
    path = tmp_path / "gpqa_diamond.jsonl"
    path.write_text("".join(json.dumps({**parts, "Question": f"Which {n}?"}) + "\n" for n in range(3)))
    config = load_config({"model": {"path": str(trained_folder)}, "tasks": [{"name": "gpqa", "path": str(path)}]})
    source, prompt = read_task(config.tasks[0], config), prompt_of(config.tasks[0], PromptConfig())
    asked = [prompt.user.replace("{problem}", source.problem(n).messages[0][1]) for n in range(3)]
    assert problems_of(path, None, None) == asked
    assert problems_of(path, None, 2) == asked[:2]
    assert problems_of(path, "Question", 1) == ["Which 0?"], "a column that is named is what is read"
    path.write_text(json.dumps({**parts, "Incorrect Answer 2": None}))
    with pytest.raises(ConfigError, match=r"row 0: a question of GPQA needs a text in each of Correct Answer, Inc"):
        problems_of(path, None, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "1+1?", "--file", "x.jsonl"], "--prompt and --file exclude each other"),
        (["--prompt", "1+1?", "--output", "x.jsonl"], "--output has no effect without --file"),
        (["--prompt", "1+1?", "--limit", "2"], "--limit has no effect without --file"),
        (["--file", "missing.jsonl"], "--file missing.jsonl: there is no such file"),
        (["--prompt", "1+1?", "--max-tokens", "500"], "do not fit into the model's 128 positions"),
        (["--prompt", "1+1?", "--temperature", "0"], "temperature must be above 0"),
    ],
)
def test_what_cannot_work_is_one_line(trained_folder, arguments, said):
    found = run("--model", trained_folder, *arguments)
    assert isinstance(found.exception, ConfigError)
    assert said in str(found.exception)
    assert "\n" not in str(found.exception)


@pytest.mark.parametrize(
    ("content", "column", "said"),
    [
        ("", None, "has no rows"),
        ("{", None, r"^--file .*rows\.jsonl, line 1 is not valid JSON"),
        ('{"text": "1+1?"}', None, "has no column messages or problem or question or prompt; its columns are text"),
        ('{"problem": "1+1?"}', "text", "has no column 'text'; its columns are problem"),
        ('{"problem": "1+1?"}\n{"problem": true}', None, "row 1: column 'problem' .* a boolean .true.; expected"),
        ('{"problem": "1+1?"}\n{"problem": null}', None, "row 1: column 'problem' must hold a text or a chat"),
    ],
)
def test_a_file_without_problems_says_what_it_has(tmp_path, content, column, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(content + "\n")
    with pytest.raises(ConfigError, match=said):
        problems_of(path, column, None)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    found = run("--model", tmp_path, "--prompt", "1+1?")
    assert "has no config.json; give a Hugging Face model folder" in str(found.exception)
    for name in ("config.json", "run.json"):
        (tmp_path / name).write_text("{}")
    found = run("--model", tmp_path, "--prompt", "1+1?")
    assert "this is the folder of a run; it has no trained model yet" in str(found.exception)
    (tmp_path / "model").mkdir()
    found = run("--model", tmp_path, "--prompt", "1+1?")
    assert f"this is the folder of a run; give its trained model, {tmp_path}/model" in str(found.exception)


# --- the command of vLLM's server


def served(folder, *options, installed=CPU):
    started, said = [], []
    command = serve(
        str(folder),
        options,
        say=said.append,
        installed=lambda: installed,
        start=lambda command, environment: started.append((command, environment)),
        can_listen=lambda host, port: None,
    )
    return command, started, said


def test_the_server_is_vllm_s_own_with_the_model_s_chain(trained_folder):
    command, ((started, environment),), said = served(trained_folder, "--port", "8001")
    assert started == command
    assert command[1:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert command[4] == str(trained_folder)
    assert command[-2:] == ["--port", "8001"]
    given = dict(itertools.pairwise(command))
    sampling = json.loads(given["--override-generation-config"])
    assert (sampling["temperature"], sampling["top_p"], sampling["top_k"]) == (0.6, 0.95, 30)
    assert json.loads(given["--additional-config"]) == {"latent_rollout": {"serving": str(trained_folder)}}
    assert "--no-enable-prefix-caching" in command
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    assert shlex.join(command) in said[0]
    cuda, _, _ = served(trained_folder, installed=("cuda", "0.33.1"))
    assert cuda[1:4] == ["-m", "vllm.entrypoints.cli.main", "serve"]
    assert "--enforce-eager" not in cuda


def test_a_port_that_the_server_cannot_have_is_refused_before_it_loads(trained_folder):
    with pytest.raises(ConfigError, match="serve: the port '99999' is none: ports are 1 to 65535; give another one"):
        served(trained_folder, "--port", "99999")
    asked = []

    def taken(host, port):
        asked.append((host, port))
        return f"the port {port} is in use by another program"

    for options in ((), ("--port=81", "--host", "127.0.0.1")):
        with pytest.raises(ConfigError, match=r"serve: the port \d+ is in use by another program; give another one"):
            serve(str(trained_folder), options, say=print, installed=lambda: CPU, start=print, can_listen=taken)
    assert asked == [("0.0.0.0", 8000), ("127.0.0.1", 81)]


def test_the_server_s_chat_ends_where_thinking_begins(trained_folder):
    model = read_trained_model(trained_folder)
    chat = [{"role": "user", "content": "1+1?"}]
    tokenizer = load_tokenizer(trained_folder)
    tokenizer.chat_template = chat_template(model)
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "1+1?<think>"
    model.tokenizer.chat_template = "{{ messages[0]['content'] }}!"  # a template that knows no thinking
    tokenizer.chat_template = chat_template(model)
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "1+1?!<think>"
    plain = model.defaults.prompt.model_copy(update={"format": 'Q "x"\n{problem}\nA: '})
    object.__setattr__(model, "defaults", model.defaults.model_copy(update={"prompt": plain}))
    tokenizer.chat_template = chat_template(model)
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == 'Q "x"\n1+1?\nA: <think>'


@pytest.mark.parametrize(
    ("options", "installed", "said"),
    [
        ([], None, "serve: vLLM is not installed here"),
        ([], ("cuda", "0.40.0"), "serve: the latent plug-in does not support vLLM 0.40.0"),
        (["--enable-lora"], CPU, "--enable-lora: weights are published whole"),
        (["--speculative-config={}"], CPU, "--speculative-config: a latent step is a mixture and cannot be drafted"),
        (["--enable-prefix-caching"], CPU, "--enable-prefix-caching: histories of latent steps look alike"),
        (["--chat-template", "x.jinja"], CPU, "--chat-template: the server's ends in the text that begins thinking"),
    ],
)
def test_a_server_that_cannot_work_is_not_started(trained_folder, options, installed, said):
    with pytest.raises(ConfigError, match=said):
        served(trained_folder, *options, installed=installed)
