"""Every command of docs/tutorial.md, in its order and with the page's own words; runs are cut short."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from page_commands import commands
from test_job import head  # noqa: F401  # a Ray head, which the page starts with `ray start`

pytestmark = [pytest.mark.integration, pytest.mark.slow]  # quick: tests/unit/test_tutorial.py runs the short ones
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
SHORTER = "steps=10 warm_start.max_steps=20 warm_start.stop_at=null prompts_per_step=8 minibatch_prompts=8"
NOT_RUN = ("make demo", "export", "ray ")  # the demo is `make test`'s own; the head is the fixture's


@pytest.mark.timeout(3600)
def test_the_tutorial(head, tmp_path):  # noqa: F811
    address, environment = head
    environment = environment | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"}
    folder, ran = tmp_path, []
    for line in commands(PAGE):
        if line.startswith(NOT_RUN):
            continue
        if line.startswith("cd "):
            folder = folder / shlex.split(line)[1]
            continue
        given = line.replace("http://127.0.0.1:8265", address)
        if " train " in given:
            short = SHORTER if "warm_start=null" not in given else "steps=10 prompts_per_step=8 minibatch_prompts=8"
            given = f"{given} {short}"
        done = subprocess.run(
            ["bash", "-c", given], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        ran.append(given)
        assert done.returncode == 0, f"{given}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert len(ran) > 20
    assert (folder / "comparison.html").is_file()
    assert (folder / "runs" / "job" / "model").is_dir(), "the job wrote where the page says"
