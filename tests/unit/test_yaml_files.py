"""What a settings file or an override says counts as it is written, or is refused in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from latent_grpo.common.config import ConfigError, load_config, read_profile
from latent_grpo.common.config.yaml_files import parse_override, read_yaml
from latent_grpo.deploy.cli.arguments import overrides
from latent_grpo.deploy.cluster.staging import SubmitError, stage_modules, stage_profile
from latent_grpo.deploy.reproduce.suite import SuiteError, load_suite

PROFILE = {"model": {"path": "some/model"}, "tasks": [{"name": "a", "path": "a.jsonl"}]}


def written(folder, content, name="p.yaml"):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def fault_of(call, *arguments, **options):
    with pytest.raises(ConfigError) as found:
        call(*arguments, **options)
    assert "\n" not in str(found.value), found.value
    return str(found.value)


TWICE = {
    "a section": ("rollout: {workers: 1}\nsteps: 2\nrollout: {}\n", "'rollout' is given twice, in lines 1 and 3"),
    "a number": ("steps: 2\nsteps: 2\n", "'steps' is given twice, in lines 1 and 2"),
    "below a section": ("rollout:\n  workers: 1\n  workers: 3\n", "'workers' is given twice, in lines 2 and 3"),
    "in one line": ("rollout: {workers: 1, workers: 3}\n", "'workers' is given twice, in line 1"),
    "in a list": ("tasks:\n- name: a\n  name: b\n", "'name' is given twice, in lines 2 and 3"),
    "with quotes": ("steps: 2\n'steps': 3\n", "'steps' is given twice, in lines 1 and 2"),
    "a merge": ("a: {<<: {b: 1}, <<: {b: 2}}\n", "'<<' is given twice, in line 1"),
    "in JSON": ('{"steps": 2,\n "steps": 3}', "'steps' is given twice, in lines 1 and 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", TWICE)
def test_a_key_that_is_given_twice_is_refused_with_both_lines(tmp_path, case):
    content, message = TWICE[case]
    line = fault_of(read_yaml, written(tmp_path, content))
    assert message in line
    assert "p.yaml" in line


@pytest.mark.parametrize("arguments", [["steps=1", "steps=2"], ["--rollout.workers", "1", "rollout.workers=2"]])
def test_an_override_that_is_given_twice_with_other_values_is_refused(arguments):
    assert "is given twice, as '1' and as '2'" in fault_of(overrides, arguments)
    assert overrides(["steps=1", "steps=1"])


def test_a_section_that_is_shared_by_an_anchor_may_be_changed(tmp_path):
    file = written(tmp_path, "base: &b {k: 0, n: 1}\none: &o {<<: *b, k: 1}\ntwo: {<<: *o, k: 2}\n")
    assert read_yaml(file)["two"] == {"k": 2, "n": 1}


UNREADABLE = {
    "Latin-1": ("# Größe\nsteps: 2\n".encode("latin-1"), r"not UTF-8 (byte 0xf6 in line 1); save it as UTF-8"),
    "UTF-16": ("steps: 2\n".encode("utf-16"), "not UTF-8 (byte 0xff in line 1)"),
    "nothing": ("", "expected a mapping of keys, got an empty file"),
    "a comment": ("# nothing\n", "expected a mapping of keys, got an empty file"),
    "a list": ("- steps: 2\n", "expected a mapping of keys, got list"),
    "a text": ("steps\n", "expected a mapping of keys, got str"),
    "two documents": ("steps: 2\n---\nsteps: 3\n", "expected a single document in the stream: but found another"),
    "tabs": ("rollout:\n\tworkers: 2\n", "(line 2, column 1); indent with spaces, not with tabs"),
    "an open quote": ("run_name: 'a\n", "while scanning a quoted scalar: found unexpected end of stream (line 2,"),
    "an open bracket": ("tasks: [\n", "not valid YAML: while parsing"),
    "binary": (b"steps: \x00\x01", "not valid YAML: unacceptable character #x0000"),
    "an object": ("a: !!python/object:os.system x\n", "not valid YAML: could not determine a constructor for the tag"),
    "an unknown alias": ("a: *b\n", "not valid YAML: found undefined alias 'b' (line 1, column 4)"),
    "an alias of itself": ("a: &a [*a]\n", "the alias in line 1 contains itself"),
    "an alias of what is above": ("a: &a {b: {c: *a}}\n", "the alias in line 1 contains itself"),
    "laughs": (
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)),
        "its aliases write out",
    ),
    "depth": ("a: " + "[" * 5000, "not valid YAML: it is nested too deeply"),
    "digits": ("steps: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
    "a number as a key": ("5: 3\n", "got the key 5; keys are texts"),
    "a list as a key": ("? [a]\n: 3\n", "not valid YAML: while constructing a mapping: found unhashable key"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path, case):
    content, message = UNREADABLE[case]
    file = written(tmp_path, content)
    line = fault_of(load_config, file)
    assert line.startswith(f"{file}: ")
    assert message in line


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    assert read_yaml(written(tmp_path, b"\xef\xbb\xbfsteps: 2\n")) == {"steps": 2}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_rights_is_named(tmp_path):
    file = written(tmp_path, "steps: 2\n")
    file.chmod(0)
    assert f"{file} cannot be read: Permission denied" in fault_of(load_config, file)


VALUES = {
    "010": "010", "1:30": "1:30", "0x1F": "0x1F", "2026-11-28": "2026-11-28", "12:30:45": "12:30:45", "yes": "yes",
    "no": "no", "on": "on", "off": "off", "y": "y", ".inf": ".inf", ".nan": ".nan", "=": "=", "0o17": "0o17",
    "5": 5, "-3": -3, "0": 0, "1e-6": 1e-6, "2.5": 2.5, "true": True, "null": None, "~": None, "'5'": "5",
}  # fmt: skip


@pytest.mark.parametrize("text", VALUES)
def test_only_what_looks_like_a_number_is_one(tmp_path, text):
    assert read_yaml(written(tmp_path, f"a: {text}\n")) == {"a": VALUES[text]}
    assert parse_override(f"a={text}") == (["a"], VALUES[text])


def test_texts_of_yaml_1_1_reach_settings_as_written():
    given = ["run_name=010", "model.prompt.system=no", "tasks.0.name=1:30"]
    config = load_config(PROFILE, given)
    assert (config.run_name, config.model.prompt.system, config.tasks[0].name) == ("010", "no", "1:30")
    assert "steps: Input should be a valid integer" in fault_of(load_config, PROFILE, ["steps=1:30"])


@pytest.mark.parametrize(
    "given",
    [
        "steps=true",
        "temperature=true",
        "tasks.0.limit=true",
        "rollout.workers=true",
        "rollout.resources.custom.x=true",
    ],
)
def test_a_boolean_is_no_number(given):
    key, _, value = given.partition("=")
    assert fault_of(load_config, PROFILE, [given]) == f"{key}: expected a number, got {value}"
    config = load_config(PROFILE, ["deterministic=true", "tasks.0.options={visible: true}"])
    assert (config.deterministic, config.tasks[0].options) == (True, {"visible": True})


def test_a_parent_by_way_of_the_home_folder_is_found(tmp_path):
    base = written(tmp_path, "steps: 7\n", "base.yaml")
    way = f"~/{os.path.relpath(base, Path.home())}"
    assert read_profile(written(tmp_path, f"extends: {way}\n")) == {"steps": 7}


@pytest.mark.parametrize("key", ["runs_folder", "work_folder"])
@pytest.mark.parametrize("path", ["$HOME/runs", "${HOME}/runs", "/data/$USER", "/data/a$b-$HOME"])
def test_a_variable_in_a_folder_that_would_be_made_is_refused(key, path, tmp_path):
    assert "is not written out here" in fault_of(load_config, "quickstart", [f"{key}={path}"])
    (tmp_path / "a$b").mkdir()  # whose name is no fault, but hides none
    assert "$HOME is not written out" in fault_of(load_config, "quickstart", [f"{key}={tmp_path}/a$b/$HOME/runs"])
    stored = load_config("quickstart").model_dump(mode="json") | {key: path}
    assert getattr(load_config(stored), key) == path, "a run that was moved has no such folder, and is opened"


@pytest.mark.parametrize("name", ["us$1/x", "a$", "$/x", "a$b", "a$b/new/runs", "${HOME}/new"])
def test_a_name_with_a_dollar_that_is_there_or_that_is_no_variable_is_a_path(name, tmp_path):
    for there in ("a$b", "${HOME}"):
        (tmp_path / there).mkdir()
    given = [f"{key}={tmp_path}/{name}" for key in ("runs_folder", "tasks.0.path")]
    config = load_config("quickstart", given)
    assert config.runs_folder == config.tasks[0].path == f"{tmp_path}/{name}"


OVERRIDES = {
    "model.prompt.system=Solve task #1 with care": "Solve task #1 with care",
    "model.prompt.system=#1": "#1",
    "model.prompt.system='Solve #1'": "Solve #1",
    "model.prompt.system=one\ntwo": "one\ntwo",
    "model.prompt.system=a#b": "a#b",
    "model.prompt.system=5 # five": "5 # five",
    "model.prompt.system=a=b": "a=b",
    "model.prompt.system=&a b": "&a b",
    "model.prompt.system=|": "|",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_override_is_taken_whole(override):
    assert load_config(PROFILE, [override]).model.prompt.system == OVERRIDES[override]


@pytest.mark.parametrize("override", ["steps=5 # five", "tasks=[] # none", "run_name='a' # b", "steps={a: 1} #"])
def test_an_override_that_yaml_would_cut_is_refused(override):
    line = fault_of(load_config, PROFILE, [override])
    assert "YAML would drop '#" in line or "got '5 # five'" in line


SEEDS = [-1, 2**63, 99999999999999999999, -(2**70), 10**60]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_that_does_not_fit_is_refused_wherever_one_is_given(tmp_path, seed):
    assert fault_of(load_config, PROFILE, [f"seed={seed}"]).startswith(
        "seed: expected a whole number from 0 to 2**63 - 1"
    )
    suite = "profile: quickstart\nseeds: [SEED]\nstarts: {}\narms: {a: {start: null}}\nclaims: []\n"
    with pytest.raises(SuiteError, match=r"seeds\.0"):
        load_suite(written(tmp_path, suite.replace("SEED", str(seed))))
    with pytest.raises(SuiteError, match=r"seeds must be from 0 to 2\*\*63 - 1"):
        load_suite("words-small", seeds=[seed])


@pytest.mark.parametrize(
    "key", ["optimizer.lr", "tau", "temperature", "noise.scale", "deadlines.start_s", "tasks.0.weight"]
)
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999", "inf", "nan"])
def test_a_number_that_is_not_finite_is_refused(key, value):
    assert f"{key}: " in fault_of(load_config, PROFILE, [f"{key}={value}"])


@pytest.mark.parametrize("value", ["1e999", str(2**64)])
def test_a_number_of_free_options_must_fit_too(value):
    verifiers = f"verifiers={{mine: {{kind: number, options: {{a: [{value}]}}}}}}"
    assert "verifiers.mine.options.a.0: expected a " in fault_of(load_config, PROFILE, [verifiers])


# --- one file extends another --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"p.yaml": "p.yaml"}, "it extends itself (p.yaml -> p.yaml)"),
        ({"p.yaml": "q.yaml", "q.yaml": "p.yaml"}, "it extends itself (p.yaml -> q.yaml -> p.yaml)"),
        ({"p.yaml": "q.yaml", "q.yaml": "r.yaml", "r.yaml": "./q.yaml"}, "itself (q.yaml -> r.yaml -> q.yaml)"),
        ({"p.yaml": "q"}, "no profile 'q' (extended by"),
        ({"p.yaml": "[q, r]"}, "extends: expected the name or the path of one profile, got ['q', 'r']"),
        ({"p.yaml": "5"}, "extends: expected the name or the path of one profile, got 5"),
    ],
)  # fmt: skip
def test_parents_that_lead_nowhere_are_refused(tmp_path, files, message):
    for name, parent in files.items():
        written(tmp_path, f"extends: {parent}\nsteps: 3\n", name)
    assert message in fault_of(load_config, tmp_path / "p.yaml")


def test_a_parent_is_found_beside_its_child_wherever_the_program_starts(tmp_path):
    written(tmp_path, "extends: quickstart\nsteps: 5\n", "base.yaml")
    child = written(tmp_path, "extends: ../base.yaml\nsteps: 6\nseed: 1\n", "mine/p.yaml")
    by_name = written(tmp_path, "extends: base\nseed: 2\n", "q.yaml")
    found = load_config(child)
    assert (found.steps, found.seed, load_config(by_name).steps) == (6, 1, 5)
    assert found.tasks == load_config("quickstart").tasks


def test_a_job_takes_along_what_a_local_profile_leads_to(tmp_path):
    written(tmp_path, "extends: quickstart\nsteps: 5\n", "base.yaml")
    task = "{name: t, path: 'python:my_tasks:T', verifier: 'my_rewards:R'}"
    child = written(tmp_path, f"extends: ../base.yaml\ntasks: [{task}]\n", "mine/p.yaml")
    written(tmp_path, "import json\nimport my_words\n", "mine/my_rewards.py")
    written(tmp_path, "", "mine/my_words.py")
    written(tmp_path, "", "mine/my_tasks/__init__.py")
    written(tmp_path, "", "mine/unrelated.py")
    job = tmp_path / "job"
    place = stage_profile(child, job)
    assert place == "submitted/mine/p.yaml"
    found = sorted(str(file.relative_to(job)) for file in job.rglob("*") if file.is_file())
    assert found == ["my_rewards.py", "my_tasks/__init__.py", "my_words.py", "submitted/base.yaml", place]
    assert read_profile(job / place) == read_profile(child)
    assert read_profile(child)["steps"] == 5


def test_a_job_refuses_what_the_cluster_would_not_find(tmp_path):
    base = written(tmp_path, "steps: 5\n", "base.yaml")
    child = written(tmp_path, f"extends: {base}\n", "p.yaml")
    with pytest.raises(SubmitError, match="which is no path on the cluster; write it relative to the file"):
        stage_profile(child, tmp_path / "job")
    stage_modules(["my_rewards:R", "latent_grpo.reward.verifier:X", "not a path"], [tmp_path], tmp_path / "job")
    assert not list((tmp_path / "job").glob("my_rewards*"))


def test_a_suite_finds_its_profile_beside_it_and_a_job_takes_both(tmp_path):
    written(tmp_path, "extends: words-small\nsteps: 7\n", "mine.yaml")
    suite = written(tmp_path, "extends: words-small\nprofile: mine.yaml\n", "suite.yaml")
    assert load_suite(suite).profile == str(tmp_path / "mine.yaml")
    assert stage_profile(suite, tmp_path / "job", suite=True) == "submitted/suite.yaml"
    assert load_suite(tmp_path / "job" / "submitted" / "suite.yaml").profile.endswith("job/submitted/mine.yaml")
