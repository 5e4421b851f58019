"""A disk that is full ends a command with one line that names the place; nothing half written has a final name."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil

import pytest
from authors_files import data
from fake_run import fake_run

from latent_grpo.deploy.cli.app import run_command


@contextlib.contextmanager
def full_above(size):
    """Files of this process end at `size` bytes: the disk is full for what is longer (EFBIG, as for quotas)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def place(tmp_path, trained_folder):
    """A folder with a model, a finished run, data and responses."""
    run = fake_run(tmp_path / "my-run").path
    for name in ("model", "base"):
        shutil.copytree(trained_folder, run / name)
    rows = [{"problem": f"{n}+1?", "answer": str(n + 1), "response": rf"\boxed{{{n}}}"} for n in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data(tmp_path / "theirs")
    (tmp_path / "out").mkdir()
    return tmp_path


COMMANDS = {
    "generate": ["generate", "--model", "{0}/my-run/model", "--file", "{0}/rows.jsonl", "--max-tokens", "4",
                 "--limit", "40", "--output", "{0}/out/x.jsonl"],
    "export": ["export", "{0}/my-run", "--to", "{0}/out/model"],
    "data fetch": ["data", "fetch", "svamp", "--from", "{0}/theirs", "--to", "{0}/out"],
    "report": ["report", "{0}/my-run", "--out", "{0}/out/report.html"],
    "grade": ["grade", "{0}/rows.jsonl", "--kind", "number", "--output", "{0}/out/grades.jsonl"],
    "init": ["init", "{0}/out/project"],
    "evaluate": ["evaluate", "--model", "{0}/my-run/model", "--profile", "quickstart", "runs_folder={0}/out"],
    "sft": ["sft", "runs_folder={0}/out"],
}  # fmt: skip
PLACE = {"generate": "x.jsonl", "export": "model", "data fetch": "svamp.parquet", "report": "report.html",
         "grade": "grades.jsonl", "init": "project", "evaluate": "evaluate-", "sft": "quickstart-"}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line_with_the_place_and_leaves_nothing_unfinished(command, place, capsys):
    size = 100 if command == "data fetch" else 1500
    with full_above(size):
        code = run_command([part.format(place) for part in COMMANDS[command]])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2, "a place that the command names"
    assert f"{place / 'out'}/{PLACE[command]}" in line
    assert "File too large" in line
    assert "unexpected" not in line
    left = [path.name for path in (place / "out").iterdir()]
    assert left == (["x.jsonl.part"] if command == "generate" else []), "nothing has a final name"
