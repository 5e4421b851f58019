"""docs/architecture.md leads into the code: each file and each name that it gives is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
QUOTED = list(dict.fromkeys(re.findall(r"`([^`\n]+)`", PAGE)))
PACKAGES = ("common", "reward", "rollout_workers", "learner", "deploy", "latent_grpo", "examples", "tests", "docs")
FILES = [text for text in QUOTED if re.fullmatch(r"[\w./-]+/[\w.-]*", text) and text.partition("/")[0] in PACKAGES]
NAMES = [text for text in QUOTED if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", text)]
READ = [
    path.read_text(encoding="utf-8")
    for package in PACKAGES[:6]
    for pattern in ("*.py", "*.yaml")
    for path in sorted((ROOT / package).rglob(pattern))
]
SOURCES = "\n".join(READ)
MEMBERS = [text for text in NAMES if re.fullmatch(r"[A-Z]\w*\.\w+", text)]
OTHER = {"latent_grpo", "unit", "contracts", "integration", "gpu"}  # folders


def test_the_page_was_read():
    assert len(FILES) > 30
    assert len(NAMES) > 80


@pytest.mark.parametrize("file", FILES)
def test_each_file_is_there(file):
    assert (ROOT / file).exists()


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_used_in_the_code(name):
    if name in OTHER or (ROOT / name).is_dir():
        return
    for part in name.split("."):
        assert re.search(rf"\b{part}\b", SOURCES), f"{name}: nothing is called {part}"


@pytest.mark.parametrize("name", MEMBERS)
def test_each_member_is_one_of_its_class(name):
    """`Problems.request` is used everywhere as a word, and was a method until it became `requests`."""
    owner, member = name.split(".")
    bodies = [body for source in READ for body in re.findall(rf"^class {owner}\b.*?(?=^\S|\Z)", source, re.M | re.S)]
    made = re.compile(rf"^    (?:def {member}\(|{member}(?:: | = ))|\bself\.{member}: ", re.M)
    assert any(map(made.search, bodies)), f"{name}: not in {len(bodies)} class(es) called {owner}"
