"""A run's folder that is damaged somewhere: every command answers in one line, and loses nothing of what is left.

Each file is removed, emptied, cut, flipped, replaced by JSON of another type, by a folder, or by something that cannot
be read. Commands that would start Ray end before: RAY_ADDRESS names a job server. `tests/integration/
test_resumed_damage.py` lets a resume go on.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import socket
from pathlib import Path

import pytest
import torch
from damage import DAMAGE, pipe
from fake_run import fake_run
from hypothesis import given
from safetensors.torch import save_file
from test_any_input import SAMPLE, SEEDS, VALUES, answer_in_one_line, broken_json, inside

from latent_grpo import open_run
from latent_grpo.common.config import config_as_json, load_config
from latent_grpo.common.errors import MetricsError, RunError
from latent_grpo.common.files import read_text
from latent_grpo.deploy.run import link, recoveries
from latent_grpo.deploy.run.folder import keep_workers
from latent_grpo.deploy.run.manifest import write_manifest
from latent_grpo.deploy.view.run_view import open_run as open_view
from latent_grpo.deploy.view.status import status_of
from latent_grpo.learner.checkpoint import write_checkpoint
from latent_grpo.learner.state import FACTS, StateFacts

REWRITTEN = {"config.json", "run.json"}  # by a resume that goes as far as Ray
COMMANDS: tuple[tuple[tuple[str, ...], str | None], ...] = (
    (("inspect", "r"), None),
    (("inspect", "r", "--failed", "--json"), None),
    (("status", "r"), None),
    (("runs", "."), None),
    (("report", "r", "--sample", "4"), "r/report.html"),
    (("export", "r", "--to", "out"), "out"),
    (("replay", "r", "--step", "2"), None),
    (("evaluate", "--model", "r/model"), None),
    (("sft", "--resume", "r"), None),
    (("train", "--resume", "r"), None),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, trained_folder):
    """The folder of a run of three steps with everything that such a folder may hold, checkpoints among it."""
    path = tmp_path_factory.mktemp("whole") / "r"
    folder = fake_run(path)
    for name in ("model", "base"):
        shutil.copytree(trained_folder, path / name)
    config = load_config({**folder.settings(), "warm_start": {}})
    (path / "config.json").write_text(config_as_json(config))
    (path / ".lock").touch()
    write_manifest(folder, config, 0, folder.base_model, [])
    recoveries.begin(path, "learner rank 0 died", lineage=1, limit=3)
    keep_workers(folder, config, 2)
    (path / "alarms.jsonl").touch()
    for step in (1, 2):
        write_checkpoint(
            folder.checkpoints, step, state_of(step), {"step": step, "next_ordinal": 4 * step, "lineage": 0}, 2
        )
    return folder


def state_of(step):
    def fill(at: Path) -> None:
        (at / "learner").mkdir()
        names = {f"{kind}/w": torch.full((3,), float(step)) for kind in ("weight", "exp_avg", "exp_avg_sq")}
        save_file(names, at / "learner" / "00000.safetensors")
        saved = {"w": {"shape": (3,), "file": "00000.safetensors"}}
        facts = {"ranks": 1, "zero_stage": 2, "dtype": "float32", "steps": step, "bad_in_a_row": 0, "parameters": saved}
        (at / "learner" / FACTS).write_text(StateFacts.model_validate(facts).model_dump_json())

    return fill


def files_of(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.startswith("."))


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".")}


def damaged(source: Path, folder: Path, file: str, how: str) -> None:
    """Damages a file of a copy of the run, gives the copy to every command, and removes it."""
    run = folder / "r"
    shutil.copytree(source, run)
    DAMAGE[how](run / file)
    before = contents(run)
    for command, made in COMMANDS:
        answer_in_one_line(folder, *command, codes=(0, 1, 2), made=made)
    after = contents(run)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} <= REWRITTEN
    for name in REWRITTEN - {file}:
        assert isinstance(json.loads(after[name]), dict)
    shutil.rmtree(run)


@pytest.fixture
def stopped_before_ray(monkeypatch):
    """Commands that start Ray end with one line before they do; `train` needs no supervisor."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    monkeypatch.setenv(link.PIPES, "unused")


@pytest.mark.parametrize(
    ("place", "how"), [(3 * number, how) for number, how in enumerate((*DAMAGE, "cut", "flipped"))]
)
def test_a_damaged_file(whole, tmp_path, stopped_before_ray, place, how):
    files = files_of(whole.path)
    damaged(whole.path, tmp_path, files[place % len(files)], how)


@pytest.mark.slow  # the sample above has every kind of damage
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", DAMAGE)
def test_every_damaged_file(whole, tmp_path, stopped_before_ray, how):
    for file in files_of(whole.path):
        damaged(whole.path, tmp_path, file, how)


# --- what is no file, and what has another type --------------------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("config.json", ("status", "r")),
        ("config.json", ("evaluate", "--model", "r/model")),
        ("run.json", ("inspect", "r")),
        ("run.json", ("train", "--resume", "r")),
        ("metrics.jsonl", ("runs", ".")),
        ("metrics.jsonl", ("replay", "r", "--step", "2")),
        ("alarms.jsonl", ("report", "r")),
        ("summary.json", ("status", "r")),
        ("manifest.json", ("inspect", "r")),
        ("trajectories/training/step=2/lineage-0000-part-0000.parquet", ("inspect", "r", "--step", "2", "--failed")),
        ("learner_records/training/step=2/lineage-0000-part-0000.parquet", ("inspect", "r", "--failed")),
        ("model/latent_chain.json", ("generate", "--model", "r/model", "--prompt", "1+2?")),
    ],
)
def test_nobody_waits_for_a_pipe(whole, tmp_path, stopped_before_ray, file, command):
    shutil.copytree(whole.path, tmp_path / "r")
    DAMAGE["a pipe"](tmp_path / "r" / file)
    made = "r/report.html" if command[0] == "report" else None
    assert "a named pipe" in answer_in_one_line(tmp_path, *command, codes=(0, 1, 2), made=made)


def test_a_recovery_does_not_wait_for_a_pipe(tmp_path):
    (tmp_path / recoveries.FILE).touch()
    pipe(tmp_path / recoveries.FILE)
    with pytest.raises(RunError, match=r"rank 0 died, and .*recoveries.jsonl cannot be read .*a named pipe"):
        recoveries.begin(tmp_path, "rank 0 died", lineage=1, limit=3)


def test_what_is_no_file_is_never_opened(tmp_path):
    given = {name: tmp_path / name for name in ("file", "link", "pipe", "socket", "device")}
    given["file"].write_text("whole\n")
    given["link"].symlink_to("file")
    os.mkfifo(given["pipe"])
    given["device"].symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening, inside(tmp_path):  # the path of a socket may have 107 bytes
        listening.bind("socket")
        for name, what in (("pipe", "a named pipe"), ("socket", "a socket"), ("device", "a device")):
            with pytest.raises(OSError, match=f"it is {what} and no file"):
                read_text(given[name])
    assert read_text(given["file"]) == read_text(given["link"]) == "whole\n"


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"noise": "x"}, "config.json is damaged (noise: input should be an object, got 'x')"),
        ("config.json", {"tasks": [7]}, "config.json is damaged (tasks.0: input should be an object, got 7)"),
        ("config.json", {"steps": 10**30}, "config.json is damaged (steps: input should be less than"),
        ("config.json", {"tau": math.nan}, "config.json is damaged (NaN is no finite number)"),
        ("run.json", {"lineage": None}, "run.json is damaged (lineage: input should be a valid integer, got None)"),
        ("run.json", {"kind": ["train"]}, "run.json is damaged (kind: input should be 'train', 'sft' or 'evaluate'"),
        ("summary.json", {"minutes": "soon"}, "summary.json is damaged (minutes: input should be a valid number"),
        ("summary.json", {"after": {"chains/pass_at_1": None}}, "summary.json is damaged (after.chains/pass_at_1: "),
        ("summary.json", {"other": "x", "before": {}}, "state finished after 3 steps"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_file_and_key(tmp_path, file, change, said):
    path = fake_run(tmp_path / "r").path / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert said in answer_in_one_line(tmp_path, "inspect", "r").replace("│", "").replace("  ", " ")


LINE = {"step": 4, "kind": "train", "lineage": 0, "time": 1.0e9, "metrics": {"rollout/reward": 0.5}}
BAD_LINES = (
    ("7", "expected a mapping, got 7"),
    ('"text"', "expected a mapping, got 'text'"),
    (json.dumps(LINE | {"step": "4"}), "step: expected a whole number from 0 up, got '4'"),
    (json.dumps(LINE | {"step": 10**30}), "step: expected a whole number from 0 up, got 1000"),
    (json.dumps({name: LINE[name] for name in ("step", "kind", "lineage", "metrics")}), "time: expected seconds"),
    (
        json.dumps(LINE | {"metrics": {"rollout/reward": "x"}}),
        "metrics.rollout/reward: expected a finite number",
    ),
    (json.dumps(LINE | {"metrics": {"rollout/reward": {"a": 1}}}), "metrics.rollout/reward: expected a finite number"),
    (json.dumps(LINE | {"metrics": {"rollout/reward": 10**400}}), "metrics.rollout/reward: expected a finite number"),
    ("[" * 100_000, "not JSON"),
)


@pytest.mark.parametrize(("line", "said"), BAD_LINES)
def test_a_damaged_line_of_metrics_costs_only_itself_and_is_counted(tmp_path, line, said):
    path = fake_run(tmp_path / "r").path
    whole_lines = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(f"{line}\n{line}\n{whole_lines}{json.dumps(LINE)}\n")
    found = status_of(open_view(path))
    assert (found.step, found.reward) == (4, 0.5)
    assert f"metrics.jsonl, line 1: {'' if said == 'not JSON' else 'not a line of metrics: '}{said}" in found.notes[0]
    assert "; 1 more of its lines are damaged, too" in found.notes[0]
    with pytest.raises(MetricsError, match="line 1: not"):  # a table that lacks rows would say nothing of it
        open_run(path).metrics()


@SAMPLE
@given(SEEDS, VALUES)
def test_a_value_of_a_run(tmp_path, seed, value):
    """The same for any value of any of its files of JSON; other examples each time in the slow tests."""
    choice, run = random.Random(seed), fake_run(tmp_path / "r", steps=1, groups=1).path
    file = run / choice.choice(["config.json", "run.json", "summary.json", "metrics.jsonl"])
    file.write_text(broken_json(file.read_text(), choice, value) + "\n")
    for command in (("inspect", "r"), ("status", "r"), ("runs", ".")):
        answer_in_one_line(tmp_path, *command, codes=(0, 2))
    shutil.rmtree(run)
