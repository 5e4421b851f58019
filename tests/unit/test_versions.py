"""A run says where its versions differ from the installation's and from the submitter's."""

import importlib.metadata
import json
import shutil

import pytest
from typer.testing import CliRunner

from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.deploy.cli.app import app, command_of_job
from latent_grpo.deploy.run import program, versions
from latent_grpo.deploy.run.folder import RunFolder, write_identity
from latent_grpo.deploy.run.versions import ARITHMETIC, bits_may_differ


def test_nothing_is_said_where_all_versions_agree():
    here = versions.versions() | {"latent-grpo": importlib.metadata.version("latent-grpo")}
    assert versions.differences(here, {versions.SUBMITTED: json.dumps(here)}) == []
    assert versions.differences(here, {}) == []


def test_every_difference_is_one_sentence():
    here = versions.versions() | {"latent-grpo": "99.0"}
    submitted = here | {"torch": "1.0", "unheard-of": "3"}
    first, *others = versions.differences(here, {versions.SUBMITTED: json.dumps(submitted)})
    assert first.startswith("the code that runs is latent-grpo 99.0, but latent-grpo ")
    assert any("torch is" in line and "1.0 where the job was submitted" in line for line in others)
    assert not any("unheard-of" in line for line in others)


def dist_info(folder):
    metadata = folder / "latent_grpo-0.2.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: latent-grpo\nVersion: 0.2.0\n")


def test_an_installed_copy_of_the_same_version_with_other_sources_is_named(tmp_path):
    copy = tmp_path / "latent_grpo"
    for package in program.OUR_PACKAGES:
        shutil.copytree(program.ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    dist_info(tmp_path)
    assert list(program.installed_copies([str(tmp_path)])) == [("0.2.0", copy)]
    assert versions.differing_copies([str(tmp_path)]) == []
    with (copy / "learner" / "rank.py").open("a") as file:
        file.write("# changed\n")
    (said,) = versions.differing_copies([str(tmp_path)])
    assert said == (
        f"the code that runs is {program.ROOT}, whose sources differ from those of latent-grpo 0.2.0 installed in "
        f"{copy}"
    )


def test_an_editable_installation_is_no_copy(tmp_path):
    dist_info(tmp_path)
    assert list(program.installed_copies([str(tmp_path)])) == []


def test_a_job_without_a_command_trains():
    assert command_of_job(["--profile", "svamp"]) == ["train", "--profile", "svamp"]
    assert command_of_job(["steps=3"]) == ["train", "steps=3"]
    assert command_of_job([]) == ["train"]
    for arguments in (["report", "runs/a"], ["data", "fetch", "svamp"], ["reproduce", "study"]):
        assert command_of_job(arguments) == arguments
    assert command_of_job(["validate", "--profile", "svamp"]) == ["validate", "--profile", "svamp"]
    with pytest.raises(ConfigError, match="'trian' is not a command; give one of"):
        command_of_job(["trian", "--profile", "svamp"])


def test_help_of_submit_names_its_options():
    assert "--address" in CliRunner().invoke(app, ["submit", "--help"]).output


@pytest.mark.parametrize(
    ("arithmetic", "said"), [([2], False), ([2, 2, 2], False), ([1, 2], True), ([1, 1, 2, 2], True)]
)
def test_a_run_that_began_with_other_arithmetic_is_told(arithmetic, said):
    assert bool(bits_may_differ(arithmetic)) == said


def test_each_lineage_says_with_which_arithmetic_it_began(tmp_path):
    folder = RunFolder(tmp_path)
    config = load_config("quickstart")
    write_identity(folder, config, 0, "train")
    assert folder.read_json("run.json")["arithmetic"] == [ARITHMETIC]
    folder.write_json("run.json", {"kind": "train", "lineage": 1})  # of a version that did not say it
    write_identity(folder, config, 2, "train")
    assert folder.read_json("run.json")["arithmetic"] == [1, 1, ARITHMETIC]
    assert folder.read_json("run.json")["dtypes"] == [None, None, "float32"]
