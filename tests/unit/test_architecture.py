"""The architecture's promises: imports go one way, and settings are readable without the heavy packages."""

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "common": {"common"},
    "reward": {"reward", "common"},
    "rollout_workers": {"rollout_workers", "common", "reward"},
    "learner": {"learner", "common"},
    "deploy": {"deploy", "common", "reward", "rollout_workers", "learner"},
}
HEAVY = ("torch", "transformers", "ray", "deepspeed", "vllm", "datasets")
LIGHT_MODULES = (
    "latent_grpo.common.config",
    "latent_grpo.common.schema",
    "latent_grpo.common.types",
    "latent_grpo.common.store",
    "latent_grpo.common.metrics",
)


def imported(path):
    """(line, module) of every import of a file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # relative: resolve against the file's package
                package = path.relative_to(ROOT).parts[: -node.level]
                module = ".".join((*package, module)).rstrip(".")
            yield node.lineno, module


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, module in imported(path)
        if (top := module.partition(".")[0]) in MAY_IMPORT and top not in MAY_IMPORT[package]
    ]
    assert not wrong, f"{package} may import {sorted(MAY_IMPORT[package])} only:\n" + "\n".join(wrong)


def runtime_imports(path, known):
    """Our modules that a file imports when it runs, inside functions too; not those for annotations alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for block in [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]:
        block.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in names)


def test_no_module_imports_itself_through_others():
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in MAY_IMPORT
        for path in (ROOT / package).rglob("*.py")
    }
    graph = {name: {m for m in runtime_imports(path, files) if m in files} - {name} for name, path in files.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules of a cycle


def test_the_packages_never_import_the_tests():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for package in MAY_IMPORT
        for path in (ROOT / package).rglob("*.py")
        for line, module in imported(path)
        if module.partition(".")[0] in {"tests", "pytest", "hypothesis"}
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_settings_and_records_are_read_without_the_heavy_packages(module):
    program = (
        f"import sys, json; import {module}; "
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"  # a fresh process: ours has torch already
    )
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(output.stdout) == []
