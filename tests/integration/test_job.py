"""Runs as Ray jobs on a head of this machine, with token authentication: what the user sees, and the exit code."""

import contextlib
import hashlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from training import PROFILE

from latent_grpo.deploy.run.program import OUR_PACKAGES

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
START_S, JOB_S, END_S = 180, 600, 60


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head():
    """(job server's address, environment of its users): a head of its own, ended with all that belongs to it."""
    home = tempfile.mkdtemp(prefix="lgt-")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "HOME": home,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    try:
        with contextlib.ExitStack() as stack:
            try:
                address = stack.enter_context(started(environment, Path(home, "r")))
            except HeadError:  # a port may have been taken between its choice and its use
                address = stack.enter_context(started(environment, Path(home, "s")))
            yield address, environment
    finally:
        shutil.rmtree(home, ignore_errors=True)


class HeadError(Exception):
    pass


@contextlib.contextmanager
def started(environment, folder):
    port, dashboard, agent, client = free_ports(4)
    log = folder.with_suffix(".log")
    process = subprocess.Popen(
        ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
         f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
         f"--ray-client-server-port={client}", "--num-cpus=4", f"--object-store-memory={256 * 2**20}",
         f"--temp-dir={folder}"],
        env=environment, stdout=log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        end = time.monotonic() + START_S
        while not answers(address):
            if process.poll() is not None or time.monotonic() > end:
                raise HeadError(f"no job server after at most {START_S} s:\n{log.read_text()}")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may wait for its workers
            process.wait(END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def answers(address):
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=2)
    except urllib.error.HTTPError:
        return True  # it is there, and asks for the token
    except OSError:
        return False
    return True


def run(environment, *command):
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=JOB_S
    )
    return done.returncode, done.stdout


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "tiny.yaml"
    evaluation = {**PROFILE["evaluation"], "at_start": False}
    settings = {**PROFILE, "steps": 1, "runs_folder": str(tmp_path / "runs"), "evaluation": evaluation}
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.slow  # test_secrets.py has what is passed and refused; this is the way through a live job server
def test_a_variable_reaches_the_job_and_stands_in_nothing_that_this_program_writes(head, profile, tmp_path):
    address, environment = head
    secret = secrets.token_hex(16)
    submit = (sys.executable, "-m", "deploy", "submit", "--address", address, "--env", "JOB_SECRET")
    overrides = ("metrics.sinks=[training:SecretSink]", "deadlines.start_s=299")
    code, output = run({**environment, "JOB_SECRET": secret}, *submit, "--profile", str(profile), *overrides)
    assert code == 0, output
    assert secret not in output
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "secret").read_text() == hashlib.sha256(secret.encode()).hexdigest()
    ours = [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert ours == []
    rays = [path for path in Path(environment["HOME"]).rglob("*") if holds(path, secret)]
    assert {path.name for path in rays} <= {"runtime_env_agent.log"}, "docs/cluster.md says where Ray keeps it"
    listing = subprocess.run(
        ["ray", "job", "list", "--address", address], env=environment, capture_output=True, text=True, timeout=JOB_S
    )
    assert secret in listing.stdout, "as docs/cluster.md warns"

    code, output = run(environment, *submit, "--profile", str(profile))
    assert code == 2, output
    assert "--env JOB_SECRET: there is no such variable here" in output


def holds(path, secret):
    try:
        return path.is_file() and secret.encode() in path.read_bytes()
    except OSError:  # a log that Ray has just moved
        return False


def test_submit_runs_a_training_on_the_cluster_and_shows_its_log(head, profile, tmp_path):
    address, environment = head
    latent_grpo = (sys.executable, "-m", "deploy", "submit", "--address", address)
    code, output = run(environment, *latent_grpo, "--profile", str(profile))
    assert code == 0, output
    assert "self-test: learner and engine agree" in output
    assert "SUCCEEDED" in output
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "model" / "model.safetensors").is_file()
    assert environment["RAY_AUTH_TOKEN"] not in output

    code, output = run(environment, *latent_grpo, "--profile", str(profile), "group_size=1")
    assert code == 2, output
    assert "group_size" in output
    assert "Traceback" not in output

    stranger = {**environment, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    code, output = run(stranger, *latent_grpo, "--profile", str(profile))
    assert code == 2, output
    assert "RAY_AUTH_TOKEN" in output


@pytest.mark.slow  # the test above runs a job of this program's upload, too
def test_the_plain_ray_job_submit_runs_it_too_and_uploads_little(head, profile, tmp_path):
    address, environment = head
    command = ("ray", "job", "submit", "--address", address, "--working-dir", ".", "--")
    code, output = run(environment, *command, "python", "-m", "deploy", "train", "--profile", str(profile))
    assert code == 0, output
    assert "self-test: learner and engine agree" in output
    packages = Path(environment["HOME"]).glob("*/session_[0-9]*/runtime_resources/working_dir_files/_ray_pkg_*")
    uploads = [p for p in packages if (p / "pyproject.toml").is_file()]
    files = [p for p in uploads[0].rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) < 5 * 2**20
    top = {p.relative_to(uploads[0]).parts[0] for p in files}
    assert not {".git", ".venv", "tests", "docs"} & top
    assert {"latent_grpo", *OUR_PACKAGES} <= top
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "summary.json").is_file()
