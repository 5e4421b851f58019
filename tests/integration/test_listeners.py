"""What docs/cluster.md says about a local run's listening sockets is what its processes have."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from training import PROFILE

ROOT = Path(__file__).resolve().parents[2]
RUN_S = 900  # an upper bound for a busy machine


def local_table():
    """Names of processes -> where they listen in a local run, of the table `What listens where`."""
    text = (ROOT / "docs" / "cluster.md").read_text().partition("## What listens where")[2]
    rows = [line.split("|")[1:-1] for line in text.partition("\n\nThe supervisor")[0].splitlines() if "|" in line][2:]
    return {name: row[2].strip() for row in rows for name in re.findall(r"`([\w:]+)`", row[0])}


def listening(process):
    """(name of a process as the table has it, address) of every listening socket of the process and its children."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            sockets = [s.laddr.ip for s in one.net_connections("inet") if s.status == psutil.CONN_LISTEN]
            name = (one.cmdline() or [one.name()])[0].split()[0] if one.name().startswith("ray::") else one.name()
            found |= {(name.partition(".")[0], address) for address in sockets}
    return found


def test_the_table_names_the_processes_of_a_local_run():
    table = local_table()
    assert {"gcs_server", "raylet", "python", "ray::WorkerActor", "ray::LearnerRank"} <= table.keys()


@pytest.mark.integration
@pytest.mark.slow  # a whole run; the table's form is held by the test above, each binding by test_secrets and below
def test_a_local_run_listens_on_the_loopback_interface_alone_and_only_where_the_table_says(tmp_path):
    learner = {**PROFILE["learner"], "ranks": 2}
    profile, home = tmp_path / "tiny.yaml", tmp_path / "home"
    home.mkdir()
    changes = {"steps": 1, "learner": learner, "weights": {"transport": "collective"}}
    profile.write_text(yaml.safe_dump({**PROFILE, **changes, "runs_folder": str(tmp_path / "r")}))
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    environment |= {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "latent_grpo.deploy", "train", "--profile", str(profile)]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    seen, niceness, deadline = set(), set(), time.monotonic() + RUN_S
    try:
        while run.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(psutil.Error):
                seen |= listening(psutil.Process(run.pid))
                niceness |= niceness_of_services(psutil.Process(run.pid))
            time.sleep(0.2)
    finally:
        run.terminate()
        run.wait(60)
    assert run.returncode == 0, (tmp_path / "log").read_text()
    table = local_table()
    assert {"gcs_server", "raylet", "ray::LearnerRank", "ray::WorkerActor"} <= {name for name, _ in seen}
    strangers = {(name, address) for name, address in seen if table.get(name) != "loopback" or not is_loopback(address)}
    assert not strangers
    token = home / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o077 == 0
    assert niceness == {psutil.Process().nice()}  # beside other programs a run has its share of the cores


def niceness_of_services(process):
    """Returns the niceness of each actor of a run that has begun its work."""
    found = set()
    for one in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if one.name().startswith(("ray::LearnerRank", "ray::WorkerActor")):
                found.add(one.nice())
    return found


def is_loopback(address):
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback
