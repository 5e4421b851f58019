"""The manifest: what a run was made with; a resume adds its lineage; bad ones are named in a sentence."""

import json
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from fake_run import fake_config

from latent_grpo.common.config import TaskConfig
from latent_grpo.common.files import file_hash
from latent_grpo.common.tasks.sources import load_task
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.run.manifest import (
    COMMIT_VARIABLE,
    ManifestError,
    data_facts,
    model_facts,
    program_commit,
    read_manifest,
    record_model,
    write_manifest,
)
from latent_grpo.deploy.run.problems import PreparedTask
from latent_grpo.deploy.run.program import OUR_PACKAGES, hashed_form, source_hash


@pytest.fixture
def run(tmp_path):
    """A folder, a model folder, and problems of a file and of a generator."""
    folder, model, data = tmp_path / "run", tmp_path / "model", tmp_path / "data.jsonl"
    folder.mkdir()
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    data.write_text("".join(json.dumps({"problem": f"{i}+1", "answer": str(i + 1)}) + "\n" for i in range(3)))
    stored = TaskConfig(name="stored", path=str(data), verifier="number")
    made = TaskConfig(name="made", path="builtin:chain_arithmetic", options={"operations": 2}, verifier="number")
    tasks = [PreparedTask(load_task(task, 0), None) for task in (stored, made)]
    return RunFolder(folder), model, SimpleNamespace(training=tasks[:1], evaluation=tasks[1:])


def test_it_names_program_settings_data_model_grader_seeds_and_hardware(run):
    folder, model, problems = run
    config = fake_config(seed=7)
    write_manifest(folder, config, 0, model, data_facts(problems))
    manifest = read_manifest(folder.path)
    assert manifest.config == config.model_dump(mode="json")
    stored, made = manifest.data
    assert (stored.use, stored.problems, stored.xxh3_128) == (
        "training", 3, file_hash(model.parent / "data.jsonl"),
    )  # fmt: skip
    assert made.options == {"operations": 2}
    assert manifest.model["initial"].files["model.safetensors"].bytes == 7
    assert manifest.seeds.run == 7
    assert manifest.grader.sources == source_hash(["reward"])
    (start,) = manifest.lineages
    assert start.versions.keys() >= {"torch", "ray", "deepspeed", "math-verify", "python"}
    assert start.hardware.cpus > 0
    assert start.program.sources == source_hash(OUR_PACKAGES)


def test_a_resume_adds_its_lineage_and_a_trained_model_is_added(run):
    folder, model, problems = run
    write_manifest(folder, fake_config(), 0, model, data_facts(problems))
    write_manifest(folder, fake_config(), 1, model, data_facts(problems))
    record_model(folder, "trained", model)
    manifest = read_manifest(folder.path)
    assert [entry.lineage for entry in manifest.lineages] == [0, 1]
    assert manifest.model["trained"] == manifest.model["initial"]


def test_another_weight_or_source_is_another_hash(run, tmp_path):
    _, model, _ = run
    before = model_facts(model)
    (model / "model.safetensors").write_bytes(b"weightz")
    assert model_facts(model) != before
    assert source_hash(["reward"]) != source_hash(["common"])


def test_the_commit_is_that_of_our_checkout_and_of_no_other(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("needs git")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(tmp_path)]
    source = tmp_path / "deploy" / "run" / "manifest.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    assert program_commit(source, {}) == (None, None)
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "somebody else's"], check=True)
    assert program_commit(source, {}) == (None, None), "our file is not in it"
    assert program_commit(source, {COMMIT_VARIABLE: "abc+changed"}) == ("abc", True), "a job says what it was sent from"
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    commit, changed = program_commit(source, {})
    assert len(commit) == 40
    assert not changed
    source.write_text("x = 2\n")
    assert program_commit(source, {}) == (commit, True)


BEFORE = b"""from reward.answers import Grade, grade, settled_by_long_name, another_long_name, one_more_long_name, last
from reward.verifier import Grade
import reward.pool


def load():
    from reward import algebra
    kept = (
        1,
    )
    return algebra, "reward.answers:Math"
"""
NOW = b"""from latent_grpo.reward.answers import (
    Grade,
    grade,
    settled_by_long_name,
    another_long_name,
    one_more_long_name,
    last,
)
from latent_grpo.reward.verifier import Grade
import latent_grpo.reward.pool


def load():
    from latent_grpo.reward import algebra
    kept = (
        1,
    )
    return algebra, "latent_grpo.reward.answers:Math"
"""


def test_a_file_of_which_imports_alone_were_renamed_keeps_its_hash(tmp_path):
    assert hashed_form(BEFORE) == BEFORE, "what runs of 0.1.0 have in their manifests"
    assert hashed_form(NOW) == BEFORE
    assert hashed_form(NOW.replace(b"1,", b"2,")) != BEFORE
    hashes = []
    for source in (BEFORE, NOW):
        path = tmp_path / str(len(hashes)) / "reward" / "grader.py"
        path.parent.mkdir(parents=True)
        path.write_bytes(source)
        hashes.append(source_hash(["reward"], path.parents[1]))
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no manifest.json"),
        ("{", "not a manifest"),
        ("[]", "not a manifest"),
        ('{"format": 9}', "format 9, this"),
    ],
)
def test_a_missing_foreign_or_newer_manifest_is_refused_in_a_sentence(tmp_path, content, words):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ManifestError, match=words):
        read_manifest(tmp_path)
