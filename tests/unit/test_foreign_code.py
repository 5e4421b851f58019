"""Somebody else's profile, run folder or checkpoint runs nothing; what the user names runs, after it is printed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sys
import unicodedata

import numpy as np
import pytest
import torch
import yaml
from fake_run import fake_run, fake_trajectory
from foreign_state import Touch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from latent_grpo.common.config import ConfigError, load_config, read_profile
from latent_grpo.common.config.loading import with_value
from latent_grpo.common.schema import encode
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.deploy.cli.app import app, run_command
from latent_grpo.deploy.cluster.submit import stage
from latent_grpo.deploy.evaluation.evaluate import evaluation_config
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.run.foreign_code import check_origin, named_code
from latent_grpo.deploy.run.preparation import prepare
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.serving.serve import serve
from latent_grpo.deploy.sft.loop import resume_sft
from latent_grpo.deploy.single_service import train_only
from latent_grpo.deploy.train import resume

NAMED = {
    "tasks.0.verifier": "foreign_trap:Verifier",
    "tasks.0.path": "python:foreign_trap:Task",
    "metrics.sinks": ["foreign_trap:Sink"],
}
COMPOSED = {
    "verifiers": {
        "mine": {"kind": "gate", "options": {"gate": {"kind": "foreign_trap:Verifier"}, "then": {"kind": "math"}}}
    },
    "tasks.0.verifier": "mine",
}
SOMEBODY = 54321  # a uid
CPU = ("cpu", "0.32.0")  # a build of vLLM and its version


@pytest.fixture(autouse=True)
def _unloaded():
    sys.modules.pop("foreign_trap", None)
    yield
    sys.modules.pop("foreign_trap", None)


def loaded():
    return "foreign_trap" in sys.modules


def with_values(data, values):
    for key, value in values.items():
        data = with_value(data, key.split("."), value, key)
    return data


def profile(path, values):
    path.write_text(yaml.safe_dump(with_values(read_profile("quickstart"), values)))
    return str(path)


@pytest.fixture
def somebodys_run(tmp_path):
    """A run with dumps whose settings name code of every kind, in a folder that everybody may write into."""
    run = fake_run(tmp_path / "run", steps=2)
    stored = with_values(json.loads((run.path / "config.json").read_text()), NAMED)
    (run.path / "config.json").write_text(json.dumps(stored))
    os.chmod(run.path, 0o777)
    return run.path


def output_of(*arguments):
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "300"})
    return done, " ".join(f"{done.output} {done.exception or ''}".split())


# --- commands that only look


@pytest.mark.parametrize("values", [NAMED, COMPOSED, {"tasks.0.verifier": "os:system"}], ids=["named", "inside", "os"])
def test_validate_runs_nothing_and_says_what_it_left_out(tmp_path, values):
    done, text = output_of("validate", "--profile", profile(tmp_path / "p.yaml", values), "--files")
    assert done.exit_code == 0, text
    assert not loaded()
    assert "not checked, since it would run code that the settings name: " in text
    for path in ("os:system",) if "os:system" in str(values) else ("foreign_trap:Verifier",):
        assert path in text
    assert "--allow-plugins" in text


def test_plan_runs_nothing_and_says_what_it_left_out(tmp_path):
    done, text = output_of("plan", "--profile", profile(tmp_path / "p.yaml", NAMED))
    assert done.exit_code == 0, text
    assert not loaded()
    assert "not checked, since it would run code that the settings name: " in text


def test_submit_reads_a_profile_for_what_it_takes_along_and_imports_none_of_it(tmp_path):
    (tmp_path / "job").mkdir()
    staged = stage(tmp_path / "job", ["train", "--profile", profile(tmp_path / "p.yaml", NAMED)])
    assert staged[0] == "train"
    assert not loaded()


def test_validate_checks_a_module_that_the_user_allows(tmp_path):
    name = profile(tmp_path / "p.yaml", NAMED)
    done, text = output_of("validate", "--profile", name, "--files", "--allow-plugins", "foreign_trap")
    assert done.exit_code == 0, text
    assert loaded()
    assert "not checked, since" not in text


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "RUN"),
        ("inspect", "RUN", "--step", "1", "--show", "1"),
        ("report", "RUN"),
        ("replay", "RUN", "--step", "1"),
        ("export", "RUN", "--to", "exported"),
        ("scale", "RUN", "--workers", "2"),
    ],
    ids=lambda command: command[0],
)
def test_a_command_that_reads_a_run_imports_nothing_that_its_settings_name(somebodys_run, command):
    output_of(*(str(somebodys_run) if part == "RUN" else part for part in command))
    assert not loaded()


# --- commands that run


def test_what_the_users_own_profile_names_is_printed_and_then_imported(tmp_path):
    shown = io.StringIO()
    config = load_config(profile(tmp_path / "p.yaml", NAMED))
    prepare(config, Reporter(Console(file=shown, width=300)))
    assert loaded()
    assert (
        "runs code that the settings name: foreign_trap:Task (tasks.0.path), foreign_trap:Verifier (tasks.0.verifier), "
        "foreign_trap:Sink (metrics.sinks.0)"
    ) in shown.getvalue()


@pytest.mark.parametrize("go_on", [resume, resume_sft, train_only])
def test_somebody_elses_run_does_not_go_on_with_code_that_the_user_has_not_allowed(somebodys_run, go_on):
    (somebodys_run / "base").mkdir(exist_ok=True)
    start = somebodys_run / "base" / "config.json"
    if go_on is train_only:
        start.write_text("{}")
    else:
        start.unlink(missing_ok=True)  # of a Latent-SFT that is not finished
    with pytest.raises(ConfigError, match=r"another user's.*foreign_trap:Verifier.*--allow-plugins foreign_trap"):
        go_on(somebodys_run, [])
    assert not loaded()


def test_an_evaluation_by_the_settings_of_somebody_elses_run_is_refused_unless_allowed(somebodys_run):
    stored = json.loads((somebodys_run / "config.json").read_text())
    stored["evaluation"]["tasks"] = stored["tasks"]
    (somebodys_run / "config.json").write_text(json.dumps(stored))
    model = str(somebodys_run / "model")
    with pytest.raises(ConfigError, match="--allow-plugins foreign_trap"):
        evaluation_config(model, [])
    assert evaluation_config(model, [], allowed=["foreign_trap"]).config.tasks[0].verifier == "foreign_trap:Verifier"
    assert not loaded()


def test_the_users_own_run_needs_no_flag_and_an_override_counts_as_the_users_word(somebodys_run):
    config = RunFolder(somebodys_run).config()
    with pytest.raises(ConfigError, match="everybody"):
        check_origin(somebodys_run, config)
    os.chmod(somebodys_run, 0o755)
    check_origin(somebodys_run, config)
    with pytest.raises(ConfigError, match="another user's"):
        check_origin(somebodys_run, config, user=SOMEBODY)
    overrides = ["tasks.0.verifier=foreign_trap:Verifier", "tasks.0.path=python:foreign_trap:Task"]
    with pytest.raises(ConfigError, match=r"would run: foreign_trap:Sink \(metrics.sinks.0\); ") as refused:
        check_origin(somebodys_run, config, overrides, user=SOMEBODY)
    assert "Verifier" not in str(refused.value)
    check_origin(somebodys_run, config, [*overrides, "metrics.sinks=[foreign_trap:Sink]"], user=SOMEBODY)
    check_origin(somebodys_run, config, allowed=["foreign_trap"], user=SOMEBODY)
    with pytest.raises(ConfigError, match="foreign_trap"):
        check_origin(somebodys_run, config, allowed=["foreign"], user=SOMEBODY)


def test_registered_names_and_this_programs_own_verifiers_are_no_foreign_code(tmp_path):
    own = {"verifiers": {"mine": {"kind": "latent_grpo.reward.answers:NumberVerifier"}}, "tasks.0.verifier": "mine"}
    assert named_code(load_config(profile(tmp_path / "p.yaml", own))) == []


# --- what strangers wrote is text in a terminal

HOSTILE = "x[/b]\x1b]0;title\x07\x9b31m\u202eend"
SHOWN = "x[/b]␛]0;title␇⟨009B⟩31m⟨202E⟩end"


def is_plain(text):
    return not [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf")] and "x[/b]" in text


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_what_a_foreign_profile_says_is_neither_markup_nor_a_control_sequence(tmp_path, command):
    name = profile(tmp_path / "x[b].yaml", {"tasks.0.name": HOSTILE, "model.path": HOSTILE, "model.new": None})
    done = CliRunner().invoke(app, [command, "--profile", name], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.exception
    assert is_plain(done.output)
    assert SHOWN in done.output


def test_a_cell_of_a_table_is_shown_whole_whatever_its_characters():
    shown, path = io.StringIO(), "/data/می\u200cخواهم/👩\u200d👧/rows.jsonl"
    table = Table("path", "name")
    table.add_row(path, HOSTILE)
    table.add_row(Text(path), "a\tb")
    TextConsole(file=shown, width=80).print(table)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.getvalue().split("\n") if "│" in line]
    assert rows == [[path, SHOWN], [path, "a       b"]]


@pytest.mark.parametrize("field", ["finish_reason", "engine", "problem_uid", "worker", "response_text"])
def test_what_a_foreign_dump_says_is_neither_markup_nor_a_control_sequence(tmp_path, field):
    run, rng = fake_run(tmp_path / "x[b]", steps=1), np.random.default_rng(0)
    rows = [fake_trajectory(rng, step=2, group=9, index=index, reward=1.0) for index in range(2)]
    TrajectoryStore(run.trajectories).write(
        2, encode([dataclasses.replace(row, **{field: HOSTILE}) for row in rows], 3)
    )
    shown = ""
    for more in ([], ["--show", "1"]):
        done = CliRunner().invoke(app, ["inspect", str(run.path), "--step", "2", *more], env={"COLUMNS": "300"})
        assert done.exit_code == 0, done.exception
        shown += done.output
    assert is_plain(shown)


def test_an_error_that_names_a_foreign_folder_sends_no_control_sequence(tmp_path, capsys):
    assert run_command(["inspect", str(tmp_path / HOSTILE)]) == 2
    assert is_plain(capsys.readouterr().err)


# --- models, suites and files of answers


@pytest.fixture
def somebodys_model(somebodys_run, trained_folder):
    """The model of that run: its settings name code beside them, which everything that loads code would import."""
    model = somebodys_run / "model"
    shutil.copytree(trained_folder, model)
    own = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model", "AutoTokenizer": ["mine.Tokens", None]}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        file = model / name
        stored = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(stored | {"auto_map": own, "custom_generate": "mine"}))
    (model / "mine.py").write_text(f"open({str(somebodys_run / 'touched')!r}, 'w')\nimport foreign_trap\n")
    (model / "custom_generate").mkdir()
    shutil.copy(model / "mine.py", model / "custom_generate" / "generate.py")
    return model


def test_a_model_of_somebody_elses_run_answers_without_its_code(somebodys_model):
    done, text = output_of("generate", "--model", somebodys_model, "--prompt", "1+2?")
    assert done.exit_code == 0, text
    assert "code of its own (auto_map), which is never run" in text
    assert "visible steps" in text
    command = serve(str(somebodys_model), [], say=print, only_print=True, installed=lambda: CPU)
    assert "--model" in command
    assert not [part for part in command if "trust" in part]
    assert not (somebodys_model.parent / "touched").exists()
    assert not loaded()


def test_a_pickle_in_a_model_of_somebody_else_is_refused_and_not_run(somebodys_model):
    (somebodys_model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Touch(somebodys_model / "touched")}, somebodys_model / "pytorch_model.bin")
    done, text = output_of("generate", "--model", somebodys_model, "--prompt", "1+2?")
    assert done.exit_code != 0
    assert "pytorch_model.bin cannot be read as tensors alone" in text
    with pytest.raises(ConfigError, match="cannot be read as tensors alone"):
        serve(str(somebodys_model), [], say=print, only_print=True, installed=lambda: CPU)
    assert not (somebodys_model / "touched").exists()


def suite_of(folder, values):
    """A suite whose profile and whose arm name code."""
    suite = {
        "title": "t", "profile": profile(folder / "p.yaml", values), "seeds": [0],
        "starts": {"begin": {"title": "Begin"}}, "arms": {"a": {"title": "A", "start": "begin"}},
    }  # fmt: skip
    (folder / "s.yaml").write_text(yaml.safe_dump(suite))
    return folder / "s.yaml"


def test_a_suite_of_somebody_else_says_what_it_runs_before_it_does(tmp_path):
    suite = suite_of(tmp_path, NAMED)
    done, text = output_of("reproduce", suite, "--check", "--folder", tmp_path / "results")
    assert done.exit_code == 0, text
    named = "runs code that the settings name: foreign_trap:Task (tasks.0.path), foreign_trap:Verifier"
    assert 0 <= text.find(named) < text.find("all settings valid")


def test_grading_by_somebody_elses_profile_says_what_it_runs_before_it_does(tmp_path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"response": "\\boxed{1}", "gold": "1"}) + "\n")
    name = profile(tmp_path / "p.yaml", COMPOSED)
    done, text = output_of("grade", answers, "--kind", "math", "--profile", name)
    assert done.exit_code == 0, text
    assert "runs code" not in text, "a verifier of the profile that is not asked for is not built"
    done, text = output_of("grade", answers, "--kind", "mine", "--profile", name)
    assert "runs code that the command names: foreign_trap:Verifier" in text


def test_a_results_folder_of_somebody_else_adds_nothing_to_what_a_suite_runs(tmp_path):
    suite, results = suite_of(tmp_path, {}), tmp_path / "results"
    results.mkdir()
    (results / "suite.json").write_text(json.dumps({"units": {"a-0": {"metrics": {"sinks": ["foreign_trap:Sink"]}}}}))
    done, text = output_of("reproduce", suite, "--check", "--folder", results)
    assert done.exit_code != 0
    assert "which this command leaves out" in text
    assert not loaded()
