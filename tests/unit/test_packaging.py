"""What is installed is what is in the tree, and the version is said once everywhere."""

import ast
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from latent_grpo.common import __version__
from latent_grpo.deploy.run.program import OUR_PACKAGES
from latent_grpo.rollout_workers.vllm_engine import WORKERS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_every_package_of_the_tree_is_installed():
    inside = {
        "latent_grpo." + ".".join(path.parent.relative_to(ROOT).parts)
        for package in OUR_PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert set(SETUPTOOLS["packages"]) == {"latent_grpo", *inside}
    modules = {p.parent for package in OUR_PACKAGES for p in (ROOT / package).rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in modules), "modules in a folder that is no package"
    places = SETUPTOOLS["package-dir"]
    assert {name: places[f"latent_grpo.{name}"] for name in OUR_PACKAGES} == {name: name for name in OUR_PACKAGES}


def test_every_file_that_is_no_module_is_installed():
    patterns = SETUPTOOLS["package-data"]["latent_grpo.deploy"]
    files = {p for package in OUR_PACKAGES for p in (ROOT / package).rglob("*") if p.is_file()}
    data = {p for p in files if p.suffix not in {".py", ".pyc"}}
    assert data
    assert data <= {p for pattern in patterns for p in (ROOT / "deploy").glob(pattern)}
    assert (ROOT / "latent_grpo" / "py.typed").is_file()


def test_the_command_is_there():
    module, _, function = PROJECT["project"]["scripts"]["latent-grpo"].partition(":")
    source = Path(find_spec(module).origin).read_text()
    assert function in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def test_the_version_is_the_same_everywhere():
    (newest, released), *_ = re.findall(r"(?m)^## \[([0-9.]+)\] - ([0-9-]+)$", (ROOT / "CHANGELOG.md").read_text())
    citation = (ROOT / "CITATION.cff").read_text()
    assert newest == __version__
    assert re.search(r"(?m)^version: (\S+)$", citation)[1] == __version__
    assert re.search(r"(?m)^date-released: (\S+)$", citation)[1] == released
    cluster = [p.read_text() for p in (ROOT / "deploy" / "cluster").iterdir() if p.is_file()]
    tags = {tag for text in cluster for tag in re.findall(r"REGISTRY/latent-grpo:([0-9.]+[0-9])", text)}
    assert tags == {__version__}


def test_the_licence_is_the_same_everywhere():
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "\nlicense: Apache-2.0\n" in (ROOT / "CITATION.cff").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_image_gets_what_the_build_needs():
    """`pip install .` in the image reads these; a package that is not copied would be a build that fails."""
    lines = (ROOT / "deploy" / "cluster" / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    needed = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert copied >= needed | {"constraints.txt", "latent_grpo", *OUR_PACKAGES}


def test_a_job_uploads_every_package():
    ignored = (ROOT / ".rayignore").read_text().split()
    kept = {"latent_grpo", *OUR_PACKAGES, "pyproject.toml"}
    assert not kept & {line.strip("/") for line in ignored}


@pytest.mark.parametrize("path", sorted(WORKERS.values()))
def test_the_worker_classes_that_vllm_imports_by_name_are_there(path):
    module, _, name = path.rpartition(".")
    assert module.startswith("latent_grpo.rollout_workers.")
    source = Path(find_spec(module).origin).read_text()  # read, not imported: it needs vLLM
    assert name in {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
