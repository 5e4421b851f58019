"""The program as its users have it: from a wheel, beside a project of their own, from a checkout, sent to a cluster.

Each environment is a fresh one whose dependencies are this one's. Every process in it tells which of its modules came
from which file, so that what is asserted holds in the driver, the actors and the graders alike.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from training import PROFILE

from latent_grpo.common import __version__
from latent_grpo.common.metrics import read_metrics
from latent_grpo.deploy.run.program import OUR_PACKAGES

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
COMMAND_S = 600
NOT_COPIED = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "docs", "tests", "data", "examples"
)
TELLING = """
import json, os, sys, threading, time


def tell(path):
    told = -1
    while True:
        time.sleep(0.1)
        modules = list(sys.modules.items())
        if len(modules) == told:
            continue
        told = len(modules)
        files = {name: getattr(module, "__dict__", {}).get("__file__") for name, module in modules}
        theirs = (sys.base_prefix, os.path.join(sys.prefix, "theirs"))
        with open(path + ".part", "w") as file:
            json.dump({name: f for name, f in files.items() if f and not f.startswith(theirs)}, file)
        os.replace(path + ".part", path)


if folder := os.environ.get("TEST_MODULES"):
    threading.Thread(target=tell, args=(os.path.join(folder, f"{os.getpid()}.json"),), daemon=True).start()
"""
KINDS = {
    "driver": "latent_grpo.deploy.controller",
    "worker": "latent_grpo.rollout_workers.worker",
    "rank": "latent_grpo.learner.rank",
    "grader": "latent_grpo.reward.grader_process",
}
USERS_MODULE = "users_parity"
VERIFIER = '''
"""A verifier of the user's; every process in which it grades leaves a file."""
import os
import time
import zlib
from pathlib import Path

from latent_grpo.reward.verifier import Grade


class Parity:
    def __init__(self):
        time.sleep(1.0)  # so that a grader lives long enough to tell of itself

    def grade(self, response_text, gold):
        Path(os.environ["TEST_CALLED"], str(os.getpid())).touch()
        good = zlib.crc32(response_text.encode()) % 2
        return Grade(float(good), "correct" if good else "wrong")
'''


class Environment:
    """A Python of its own, with the packages of ours except this project."""

    def __init__(self, folder):
        self.folder = folder
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        theirs = folder / "theirs"
        theirs.mkdir()
        for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            for entry in Path(path).iterdir():
                if "latent_grpo" not in entry.name and not (theirs / entry.name).exists():
                    (theirs / entry.name).symlink_to(entry)
        (self.site / "theirs.pth").write_text(f"{theirs}\n")
        (self.site / "sitecustomize.py").write_text(TELLING)

    def install(self, wheel):
        install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(self.python)]
        done(subprocess.run([*install, "install", "--no-deps", "--no-index", str(wheel)], **CAPTURED))

    def run(self, *command, cwd, **variables):
        """Standard output and error of a command that succeeds, with a home of its own for Ray."""
        with tempfile.TemporaryDirectory(prefix="lgt-") as home:
            kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON", "LATENT_GRPO"))}
            variables = {"HOME": home, "OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in variables.items()}
            return done(subprocess.run([*map(str, command)], cwd=cwd, env=kept | variables, **CAPTURED))


CAPTURED = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": COMMAND_S}


def done(process):
    assert process.returncode == 0, process.stdout
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The one that `make dist` made, or one that is built from a copy of the tree."""
    if given := os.environ.get("LATENT_GRPO_WHEEL"):
        return (ROOT / given).resolve()
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "tree", ignore=NOT_COPIED)
    build = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    done(subprocess.run([*build, "--wheel-dir", str(folder), str(folder / "tree")], **CAPTURED))
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("installed") / "env")
    environment.install(wheel)
    return environment


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("bare") / "env")


def told(folder):
    """Kind of process -> module -> file, of each process that told."""
    found = {}
    for path in folder.glob("*.json"):
        modules = {name: str(Path(file).resolve()) for name, file in json.loads(path.read_text()).items()}
        for kind, module in KINDS.items():
            if module in modules:
                found[kind] = modules
                break
    assert found.keys() == KINDS.keys(), f"processes of {sorted(found)} told of themselves"
    return found


def check_one_name(found, root):
    """Every module of ours is loaded as `latent_grpo...`, from `root`, and no file twice."""
    for kind, modules in found.items():
        assert not {"common", "reward", "learner", "rollout_workers"} & modules.keys(), kind
        ours = {name: file for name, file in modules.items() if file.startswith(f"{root}{os.sep}")}
        elsewhere = {n for n in modules if n.partition(".")[0] == "latent_grpo"} - ours.keys()
        assert not elsewhere, f"{kind}: not from {root}"
        # `python -m deploy` itself: the program's file, and the package around it, which is empty
        program = {"__main__", "__mp_main__", "deploy", "deploy.__main__"} | {USERS_MODULE}
        assert {name for name in ours if not name.startswith("latent_grpo")} <= program, kind
        named = {name: file for name, file in ours.items() if name not in program}
        twice = [name for name, file in named.items() if list(named.values()).count(file) > 1]
        assert not twice, f"{kind}: {twice}"


# --- from a wheel


def test_the_wheel_holds_one_package_with_all_that_belongs_to_it(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {"latent_grpo", f"latent_grpo-{__version__}.dist-info"}
    tree = {
        f"latent_grpo/{path.relative_to(ROOT).as_posix()}"
        for package in OUR_PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    inside = {name for name in names if name.startswith("latent_grpo/")}
    assert inside == tree | {"latent_grpo/__init__.py", "latent_grpo/py.typed"}
    assert f"latent_grpo-{__version__}.dist-info/licenses/LICENSE" in names


def test_from_an_empty_folder_it_validates_and_trains_a_step(installed, tmp_path):
    places = (installed.folder / "bin", installed.site)
    assert {p.name for p in places[1].iterdir() if "latent" in p.name} == {
        "latent_grpo",
        f"latent_grpo-{__version__}.dist-info",
    }
    command, empty = places[0] / "latent-grpo", tmp_path / "empty"
    empty.mkdir()
    assert "prompts per step" in installed.run(command, "validate", cwd=empty)
    small = ["steps=1", "prompts_per_step=4", "minibatch_prompts=4", "group_size=2", "rollout.workers=1"]
    small += [
        "warm_start.max_steps=2",
        "warm_start.stop_at=null",
        "warm_start.batch_size=8",
        "optimizer.warmup_steps=0",
    ]
    small += ["warm_start.evaluation_problems=4", "evaluation.tasks.0.options.size=8"]
    modules = tmp_path / "modules"
    modules.mkdir()
    output = installed.run(command, "train", "--profile", "quickstart", *small, cwd=empty, TEST_MODULES=modules)
    (run,) = (empty / "runs").iterdir()
    assert [row["step"] for row in read_metrics(run)] == [1]
    assert (run / "report.html").stat().st_size > 10_000, output
    driver = [json.loads(path.read_text()) for path in modules.glob("*.json")]
    ours = {f for files in driver for name, f in files.items() if name.partition(".")[0] == "latent_grpo"}
    assert all(file.startswith(f"{installed.site.resolve()}{os.sep}latent_grpo{os.sep}") for file in ours)


def users_profile(folder, verifier):
    """`mine.yaml`: one step whose rewards come from the user's verifier, and folders for what processes tell."""
    settings = {
        **PROFILE,
        "steps": 1,
        "tasks": [{**PROFILE["tasks"][0], "verifier": verifier}],
        "rollout": {**PROFILE["rollout"], "workers": 1},
        "evaluation": {"at_start": False, "at_end": False},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(settings))
    for told_here in ("called", "modules"):
        (folder / told_here).mkdir()
    return {"TEST_CALLED": folder / "called", "TEST_MODULES": folder / "modules"}


@pytest.mark.parametrize("by", ["command", "module"])
def test_a_project_with_its_own_common_and_reward_trains_beside_it(installed, tmp_path, by):
    for package in ("common", "reward"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("SHARED = 'of the user'\n")
    own = VERIFIER.replace("import os\n", "import os\n\nfrom common import SHARED\n", 1)
    (tmp_path / "reward" / "parity.py").write_text(own)
    variables = users_profile(tmp_path, "reward.parity:Parity")
    start = [installed.folder / "bin" / "latent-grpo"]
    if by == "module":
        start = [installed.python, "-m", "latent_grpo.deploy"]
    installed.run(*start, "train", "--profile", "mine.yaml", cwd=tmp_path, TEST_CALLED=variables["TEST_CALLED"])
    (run,) = (tmp_path / "runs").iterdir()
    (row,) = read_metrics(run)
    assert 0 < row["metrics"]["rollout/reward"] < 1
    assert list((tmp_path / "called").iterdir()), "the user's verifier graded nothing"


# --- from a checkout


@pytest.fixture
def checkout(tmp_path):
    """A copy of the tree, as a user has it, with a verifier of the user's in it."""
    shutil.copytree(ROOT, tmp_path / "tree", ignore=NOT_COPIED)
    (tmp_path / "tree" / f"{USERS_MODULE}.py").write_text(VERIFIER)
    return tmp_path / "tree"


def test_a_checkout_trains_without_installation_and_every_module_has_one_name(bare, checkout):
    variables = users_profile(checkout, f"{USERS_MODULE}:Parity")
    with pytest.raises(AssertionError, match="No module named 'latent_grpo'"):
        bare.run(bare.python, "-c", "import latent_grpo", cwd=checkout.parent)
    bare.run(bare.python, "-m", "deploy", "train", "--profile", "mine.yaml", cwd=checkout, **variables)
    assert list((checkout / "called").iterdir())
    check_one_name(told(checkout / "modules"), checkout.resolve())
    assert "prompts per step" in bare.run(bare.python, "-m", "latent_grpo.deploy", "validate", cwd=checkout)


def test_a_checkout_wins_over_an_installed_copy_and_the_difference_is_said(installed, checkout):
    """As in a job that brings its code along to nodes where an older one is installed."""
    variables = users_profile(checkout, f"{USERS_MODULE}:Parity")
    with (checkout / "learner" / "rank.py").open("a") as file:
        file.write("\n# changed since it was installed\n")
    train = ("-m", "deploy", "train", "--profile", "mine.yaml")
    output = installed.run(installed.python, *train, cwd=checkout, **variables)
    check_one_name(told(checkout / "modules"), checkout.resolve())
    assert "whose sources differ from those of latent-grpo" in " ".join(output.split()), output
