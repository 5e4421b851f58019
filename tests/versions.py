"""Tests the program with other versions of its packages: `python tests/versions.py latest|beyond|oldest [TEST ...]`.

`latest` installs the newest releases that pyproject.toml allows, `beyond` the newest ones at all, `oldest` each direct
dependency at its lower bound; each in an environment of its own below build/versions. The tests are those of
`make test` unless others are named. What broke is a row of docs/versions.md with the date; versions with which all
passed go into deploy/checks/tested.json, from which `doctor` knows what was tested.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "versions.md"
TESTED = ROOT / "deploy" / "checks" / "tested.json"
KINDS = ("latest", "beyond", "oldest")
QUICK = ("-m", "not slow and not gpu and not vllm")
ROWS = "|---|---|---|---|---|"  # above the newest row


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


def lower_bound(requirement: Requirement) -> str:
    """`torch==2.11` for `torch>=2.11`."""
    bound = next(s.version for s in requirement.specifier if s.operator == ">=")
    return f"{requirement.name}=={bound}"


def beyond(needed: Sequence[Requirement]) -> list[str]:
    """The names of the packages whose newest releases an upper bound may exclude."""
    return [r.name for r in needed if any(s.operator in ("<", "<=", "==", "~=") for s in r.specifier)]


def installed_in(kind: str) -> tuple[Path, bool]:
    """Makes the environment; returns its Python, and whether its tests would tell something that others do not.

    `beyond` is `latest` where the newest releases are within the bounds. Raises CalledProcessError where pip finds no
    such set.
    """
    folder = ROOT / "build" / "versions" / kind
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pinned = [lower_bound(r) for r in requirements()] if kind == "oldest" else []
    subprocess.run([*pip, "-e", f"{ROOT}[dev]", *pinned], check=True)
    if kind != "beyond":
        return python, True
    allowed = versions_in(python)
    subprocess.run([*pip, "--upgrade", "--no-deps", *beyond(requirements())], check=True)
    return python, versions_in(python) != allowed


def versions_in(python: Path) -> dict[str, str]:
    """The versions of the direct dependencies that an environment has."""
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True
    )
    have = {canonicalize_name(row["name"]): row["version"] for row in json.loads(listed.stdout)}
    return {name: have[name] for r in requirements() if (name := canonicalize_name(r.name)) in have}


def add_row(kind: str, versions: dict[str, str], tests: str, result: str, page: Path = PAGE) -> None:
    """Puts the newest row first. The versions are those that differ from what constraints.txt pins."""
    lines = re.findall(r"(?m)^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"))
    pins = {canonicalize_name(name): version for name, version in lines}
    shown = [f"{name} {version}" for name, version in versions.items() if pins.get(name) != Version(version).public]
    row = f"| {date.today()} | {kind} | {', '.join(shown) or 'as pinned'} | {tests} | {result} |"
    page.write_text(page.read_text(encoding="utf-8").replace(ROWS, f"{ROWS}\n{row}"), encoding="utf-8")


def add_tested(versions: dict[str, str], file: Path = TESTED) -> None:
    known = json.loads(file.read_text(encoding="utf-8"))
    for name, version in versions.items():
        found = {*known.get(name, []), Version(version).public}
        known[name] = sorted(found, key=Version)
    file.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def outcome(report: str) -> str:
    """`812 passed`, or the numbers with the tests that failed, from what pytest has printed."""
    summary = next(
        (line for line in reversed(report.splitlines()) if re.search(r"\d+ (passed|failed|error)", line)), ""
    )
    numbers = ", ".join(re.findall(r"\d+ (?:failed|passed|errors?)", summary)) or "pytest did not run"
    failed = dict.fromkeys(re.findall(r"(?m)^(?:FAILED|ERROR) (\S+?)(?:\[|\s|$)", report))
    return numbers + (f": {', '.join(f'`{name}`' for name in failed)}" if failed else "")


def main(kind: str, tests: Sequence[str]) -> int:
    if kind not in KINDS:
        print(f"{kind!r}: expected one of {', '.join(KINDS)}", file=sys.stderr)
        return 2
    named = ", ".join(f"`{test}`" for test in tests) or "`make test`"
    try:
        python, telling = installed_in(kind)
    except subprocess.CalledProcessError:
        add_row(kind, {}, named, "pip found no set of versions")
        return 1
    versions = versions_in(python)
    if not telling:
        add_row(kind, versions, "none", "nothing is beyond the bounds: these are the versions of `latest`")
        return 0
    ran = subprocess.run(
        [str(python), "-m", "pytest", "-q", *(tests or QUICK)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(ran.stdout, ran.stderr, sep="\n")
    add_row(kind, versions, named, outcome(ran.stdout))
    if ran.returncode == 0 and not tests:  # chosen tests have not tested a version
        add_tested(versions)
    return ran.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]))
