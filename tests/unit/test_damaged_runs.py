"""A run's folder that is damaged somewhere: every command answers in one line, and loses nothing of what is left.

Each file is removed, emptied, cut, flipped, replaced by JSON of another type, by a folder, or by something that cannot
be read. Commands that would start Ray end before: RAY_ADDRESS names a job server. `tests/integration/
test_resumed_damage.py` lets a resume go on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from damage import DAMAGE
from fake_run import fake_run
from safetensors.torch import save_file
from test_any_input import answer_in_one_line

from latent_grpo.common.config import config_as_json, load_config
from latent_grpo.deploy.run import link, recoveries
from latent_grpo.deploy.run.folder import keep_workers
from latent_grpo.deploy.run.manifest import write_manifest
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
