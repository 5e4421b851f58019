"""The tests themselves: few patch the program, and none reaches into an object without saying why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
MOST_PATCHES = 60
PATCHES = re.compile("monkey" + r"patch|\bmock\b")
PRIVATE = re.compile(
    r"""(?<=[\w)\]])(?<!\bself)(?<!\bcls)\._[a-zA-Z]       # an attribute of another object
    |\bimport\b.*(?<!\w)_[a-zA-Z]                         # a name of another module
    |attr\((?!self\b)[^,]+,\s*["']_[a-zA-Z]              # either by its name
    """,
    re.VERBOSE,
)
PUBLIC = ("os._exit", "._asdict", "._replace", "__future__")


def reaches_inside(line: str) -> bool:
    """Whether the code of a line uses a private name, and no comment beside it says why."""
    code, _, reason = line.partition("#")
    for name in PUBLIC:
        code = code.replace(name, "")
    return PRIVATE.search(code) is not None and len(reason.split()) < 2


def lines() -> Iterator[tuple[str, str]]:
    """Every line of the tests, and where it stands."""
    for path in sorted(TESTS.rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            yield f"{path.relative_to(TESTS)}:{number}", line


def test_few_lines_patch_the_program():
    """Such a test knows the inside of the program: a parameter with a default, or an object handed in, needs none."""
    found = [place for place, line in lines() if PATCHES.search(line)]
    assert len(found) <= MOST_PATCHES, found


def test_a_private_name_has_its_reason_beside_it():
    assert [f"{place}: {line.strip()}" for place, line in lines() if reaches_inside(line)] == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("pool" + "._members", True),
        ("pool" + "._members  # its workers have no other name", False),
        ("pool" + "._members  # noqa", True),
        ("self._pool.poll()", False),
        ("self.pool" + "._members", True),
        ("from a.b import c, _" + "d", True),
        ("from __future__ import annotations", False),
        ("import a_b", False),
        ("getattr(core, " + '"_ids")', True),
        ("os._exit(3)", False),
    ],
)
def test_what_reaches_inside_is_recognised(line, found):
    assert reaches_inside(line) is found


def test_no_two_files_of_tests_have_one_name():
    """Pytest imports them by their names alone, so a run over all folders would refuse the second."""
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
