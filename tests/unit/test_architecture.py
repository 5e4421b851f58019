"""The architecture's promises: imports go one way, and settings are readable without the heavy packages."""

import ast
import graphlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "common": {"common"},
    "reward": {"reward"},
    "rollout_workers": {"rollout_workers", "common", "reward"},
    "learner": {"learner", "common"},
    "deploy": {"deploy", "common", "reward", "rollout_workers", "learner"},
}
"""What each package may import of ours."""
ROOMS = {
    "buffer": set(),
    "controller": {"buffer"},
    "run": {"controller"},
    "cluster": {"run"},
    "checks": {"run", "evaluation"},
    "planning": {"run", "checks", "controller"},
    "view": {"run"},
    "data": {"run"},
    "evaluation": {"controller", "run"},
    "replay": {"run"},
    "sft": {"controller", "run", "evaluation"},
    "grading": {"run", "view"},
    "serving": set(),
    "export": {"run"},
    "single_service": {"controller", "run", "replay"},
    "supervisor": {"run"},
    "template": set(),  # of `latent-grpo init`: a user's files
    "train": {"controller", "run", "evaluation", "sft", "view"},
    "reproduce": {"controller", "run", "evaluation", "sft", "train"},
    "bench": {"controller", "run", "sft", "reproduce", "view", "planning", "checks"},
    "cli": None,  # may use every room
    "__main__": {"cli"},
}
"""What each room or file of `deploy/` may import of the others: everything points to `run`, and `run` to the loop."""
LONGEST = 500  # lines of a product file
HEAVY = ("torch", "transformers", "ray", "deepspeed", "vllm", "datasets")
LIGHT_MODULES = (
    "latent_grpo",
    "latent_grpo.common.config",
    "latent_grpo.common.config.reference_formats",
    "latent_grpo.common.schema",
    "latent_grpo.common.types",
    "latent_grpo.common.store",
    "latent_grpo.common.metrics",
    "latent_grpo.deploy.supervisor",
)


def modules(package):
    """Path -> dotted name of every module of a package."""
    return {
        path: ".".join(("latent_grpo", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for path in sorted((ROOT / package).rglob("*.py"))
    }


KNOWN = {name for package in MAY_IMPORT for name in modules(package).values()}


def imported(path, *, at_runtime=False):
    """(line, module) of every import of a file, inside functions too; `at_runtime`: not those for annotations alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    if at_runtime:
        for block in [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]:
            block.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} is a relative import; name the module in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name if name in KNOWN else node.module) for name in names)


def top_of(module):
    """`common` of `latent_grpo.common.latent`; None for what is not ours."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "latent_grpo" else None


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in modules(package)
        for line, module in imported(path)
        if (top := top_of(module)) and top not in MAY_IMPORT[package]
    ]
    assert not wrong, f"{package} may import {sorted(MAY_IMPORT[package])} only:\n" + "\n".join(wrong)


def test_every_module_has_one_name():
    """`common` beside `latent_grpo.common` would be a second copy of it, and a user's own package elsewhere."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for package in (*MAY_IMPORT, "tests")
        for path in modules(package)
        for line, module in imported(path)
        if module.partition(".")[0] in MAY_IMPORT
    ]
    assert not wrong, "import it as latent_grpo...:\n" + "\n".join(wrong)


def room_of(module):
    """`run` of `latent_grpo.deploy.run.folder`, `train` of `latent_grpo.deploy.train`; None outside of `deploy`."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["latent_grpo", "deploy"] and len(parts) > 2 else None


def test_the_rooms_of_deploy_are_used_one_way():
    files = modules("deploy")
    rooms = {room for name in files.values() if (room := room_of(name)) is not None}
    assert rooms == set(ROOMS), "a new room says here what it may import"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path, name in files.items()
        for line, module in imported(path)
        if (room := room_of(name)) and (other := room_of(module)) and other != room
        and ROOMS[room] is not None and other not in ROOMS[room]
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_no_product_file_is_too_long_to_read():
    long = {
        str(path.relative_to(ROOT)): lines
        for package in MAY_IMPORT
        for path in modules(package)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST
    }
    assert not long


def test_no_module_imports_itself_through_others():
    graph = {
        name: {module for _, module in imported(path, at_runtime=True) if module in KNOWN} - {name}
        for package in MAY_IMPORT
        for path, name in modules(package).items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules of a cycle


def test_the_packages_never_import_the_tests():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for package in MAY_IMPORT
        for path in modules(package)
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


def test_every_console_prints_text_and_obeys_nobody():
    makers = [
        path.relative_to(ROOT).as_posix()
        for package in MAY_IMPORT
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"(?<!\w)Console\(", path.read_text(encoding="utf-8"))
    ]
    assert not makers, "use TextConsole, which shows markup and control characters as text"
