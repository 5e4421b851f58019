"""`make gpu-proof` leaves a file of each part as it ends, whatever happens to the others."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("proof", ROOT / "tests" / "gpu" / "proof.py")
proof = importlib.util.module_from_spec(spec)
sys.modules["proof"] = proof
spec.loader.exec_module(proof)


def part(name, program, limit_s=60.0, skipped=""):
    return proof.Part(name, (sys.executable, "-c", program), limit_s, skipped)


def test_each_part_leaves_its_file_and_none_stops_the_next(tmp_path):
    todo = [
        part("good", "print('noise'); print('42 passed')"),
        part("bad", "print('1 failed'); raise SystemExit(1)"),
        part("endless", "import time; print('begun', flush=True); time.sleep(600)", limit_s=1.0),
        part("elsewhere", "print('never')", skipped="no such package"),
        part("last", "print('still here')"),
    ]
    found = proof.prove(todo, 5.0, tmp_path, dict(os.environ))
    assert [(o.name, o.state, o.last) for o in found] == [
        ("good", "passed", "42 passed"),
        ("bad", "failed", "1 failed"),
        ("endless", "too long", "begun"),
        ("elsewhere", "not run", "no such package"),
        ("last", "passed", "still here"),
    ]
    written = sorted(path.name for path in tmp_path.iterdir())
    names = ["01-good.json", "02-bad.json", "03-endless.json", "04-elsewhere.json", "05-last.json", "proof.json"]
    assert written == names
    assert json.loads((tmp_path / "01-good.json").read_text())["output"] == ["noise", "42 passed"]
    assert [line["state"] for line in json.loads((tmp_path / "proof.json").read_text())] == [o.state for o in found]


def test_what_there_is_no_time_for_is_named(tmp_path):
    (outcome,) = proof.prove([part("late", "print()")], 0.0, tmp_path, dict(os.environ))
    assert (outcome.state, outcome.last) == ("not run", "0 minutes were over")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_correctness_comes_before_numbers_and_every_test_file_is_there(device, tmp_path):
    todo = proof.parts(device, tmp_path)
    names = [part.name for part in todo]
    assert names.index("engine_gpu") < names.index("learner_gpu") < names.index("bench")
    for part in todo:
        files = [argument for argument in part.command if argument.startswith("tests/gpu/")]
        assert all((ROOT / file).is_file() for file in files)
    tests = {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    named = {Path(argument).name for part in todo for argument in part.command if argument.startswith("tests/gpu/")}
    assert named == tests, "a test of this folder is in no part of the proof"
