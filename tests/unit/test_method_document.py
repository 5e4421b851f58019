"""What code, tests and pages cite of the method exists as a section of `docs/method.md`."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "method.md"
FOLDERS = ("common", "reward", "rollout_workers", "learner", "deploy", "tests", "docs", "examples")
SUFFIXES = (".py", ".md", ".yaml", ".js")
FEWEST = 100  # citations; fewer means that this test no longer finds them

PLACE = r"\d+(?:\.\d+)*(?:[a-z]\b|\s[a-z](?=[,);]))?"  # 2.1, 2.1.3, 7a, and 7 a before a comma
CITATION = re.compile(
    rf"\bMETHOD\s+(?P<first>symbols\b|§?{PLACE})"
    rf"(?P<more>(?:(?:,\s+|\s+and\s+|\s*[-–]\s*)(?:§{PLACE}|[a-z]\b(?=[,);])|(?<=-)\d+\b))*)"
)
PART = re.compile(rf"(?P<dash>[-–]\s*)?(?P<name>§?{PLACE}|(?<![a-z])[a-z](?![a-z])|\d+)")


def cited(text):
    """The sections that a text cites, e.g. `2.1`, `7a`, `symbols`; `2.1.4` is point 4 of the list in section 2.1."""
    for citation in CITATION.finditer(text):
        name = re.sub(r"[§\s]", "", citation["first"])
        yield name
        for part in PART.finditer(citation["more"].replace("and", ",")):
            following = re.sub(r"[§\s]", "", part["name"])
            if following.isalpha():  # §7 a, b
                following = name[:-1] + following
            elif part["dash"] and "§" not in part["name"]:  # §2.1.1-4
                following = f"{name.rpartition('.')[0]}.{following}"
            name = following
            yield name


def sections(document):
    """The sections that the document has: numbered headings, the points of their lists, and the symbols."""
    found, section = set(), ""
    for line in document.splitlines():
        if heading := re.match(r"#{2,4} (?:(\d+(?:\.\d+)*[a-z]?)\.? |(Symbols)$)", line):
            section = (heading[1] or heading[2]).lower()
            found.add(section)
        elif line.startswith("#"):
            section = ""
        elif section and (point := re.match(r"(\d+)\. ", line)):
            found.add(f"{section}.{point[1]}")
    return found


def citations():
    """(file, section) of every citation in the repository, but for this test's own examples."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and path != Path(__file__).resolve():
                for name in cited(path.read_text(encoding="utf-8")):
                    yield path.relative_to(ROOT).as_posix(), name


def test_every_cited_section_of_the_method_exists():
    found, there = list(citations()), sections(DOCUMENT.read_text(encoding="utf-8"))
    assert len(found) > FEWEST, f"only {len(found)} citations of the method were found"
    missing = sorted({f"{file} cites METHOD §{name}" for file, name in found if name not in there})
    assert not missing, f"{DOCUMENT.name} has no such section:\n" + "\n".join(missing)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(METHOD §2.1)", ["2.1"]),
        ("METHOD §4: advantages, 3 of them", ["4"]),
        ("METHOD §2 and §3", ["2", "3"]),
        ("METHOD §3-§6)", ["3", "6"]),
        ("METHOD §2.1-§2.3 for rows", ["2.1", "2.3"]),
        ("METHOD §2.1.1-4 and §2.2: ids", ["2.1.1", "2.1.4", "2.2"]),
        ("METHOD §2.1.2: which", ["2.1.2"]),
        ("METHOD §7a)", ["7a"]),
        ("METHOD §7b's three steps", ["7b"]),
        ("METHOD §7 a, b);", ["7a", "7b"]),
        ("METHOD §5 a step", ["5"]),
        ("METHOD 2.5", ["2.5"]),
        ("METHOD symbols, §4.3, §6", ["symbols", "4.3", "6"]),
        ("(METHOD §8, arXiv 2604.27998)", ["8"]),
        ("METHOD §4.1,\n    §4.2)", ["4.1", "4.2"]),
        ("METHOD §8's chain length, METHOD §1.", ["8", "1"]),
        ("the METHOD of 3 steps", []),
    ],
)
def test_citations_are_read_in_every_form_that_occurs(text, expected):
    assert list(cited(text)) == expected


def test_headings_and_the_points_of_their_lists_are_sections():
    headings = ["# The method", "## Symbols", "## 2. Rollout", "### 2.1 Step", "### 7a Uniform", "## Notes"]
    document = "\n1. one\n2. two\n".join(headings)
    assert sections(document) == {
        f"{name}{point}" for name in ("symbols", "2", "2.1", "7a") for point in ("", ".1", ".2")
    }
