"""A bound of a dependency has its reason beside it, and a version outside of what was tested is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import versions as trial
from packaging.utils import canonicalize_name
from packaging.version import Version

from latent_grpo.deploy.checks.tested_versions import known_versions, never_tested

ROOT = Path(__file__).resolve().parents[2]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"(?m)^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text())
}


def test_every_upper_bound_has_its_reason_beside_it():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    bounded = [line for line in lines if re.search(r'"[\w.\[\]-]+[><=~].*?<\d', line)]
    assert len(bounded) >= 3
    unexplained = [line.strip() for line in bounded if len(line.partition("#")[2].split()) < 3]
    assert unexplained == []


def test_the_pinned_version_of_each_dependency_is_among_those_that_were_tested():
    tested = known_versions()
    assert {canonicalize_name(r.name) for r in trial.requirements()} == set(tested)
    assert {name: PINS[name] for name in tested if PINS[name] not in tested[name]} == {}


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("5.18.0", True),
        ("5.19.0", False),
        ("5.20.1", False),
        ("5.24.0+local", False),
        ("5.25.0", True),
    ],
)
def test_a_version_outside_of_what_was_tested_is_named(version, said):
    found = never_tested({"Trans_Formers": version, "unknown": "1"}, {"trans-formers": ["5.24.0", "5.19.0"]})
    assert found == (
        [f"Trans_Formers {version} was never tested with this program; tested: 5.19.0 to 5.24.0"] if said else []
    )


def test_a_trial_says_what_broke_and_remembers_what_passed(tmp_path):
    page, tested = tmp_path / "page.md", tmp_path / "tested.json"
    page.write_text("| date |\n|---|---|---|---|---|\n| old |\n")
    report = "FAILED tests/a.py::test_b[x-y] - boom\nFAILED tests/a.py::test_b[z] - boom\n2 failed, 3 passed in 1.2s\n"
    assert trial.outcome(report) == "2 failed, 3 passed: `tests/a.py::test_b`"
    assert trial.outcome("nothing") == "pytest did not run"
    trial.add_row("latest", {"transformers": "99.0", "torch": PINS["torch"]}, "`make test`", "3 passed", page)
    assert re.search(
        r"-\|\n\| [\d-]+ \| latest \| transformers 99.0 \| `make test` \| 3 passed \|\n\| old", page.read_text()
    )
    tested.write_text(json.dumps({"torch": ["2.13.0"]}))
    trial.add_tested({"torch": "2.9.0+cpu"}, tested)
    assert json.loads(tested.read_text()) == {"torch": ["2.9.0", "2.13.0"]}


def test_bounds_are_read_from_the_requirements():
    needed = trial.requirements()
    assert all(Version(trial.lower_bound(r).partition("==")[2]) for r in needed)
    assert set(trial.beyond(needed)) == {r.name for r in needed if "<" in str(r.specifier)}
