"""What a suite's numbers were made with: commit, versions, hashes of grader and data, seeds, machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from pathlib import Path

from common.config import RunConfig, TaskConfig
from deploy.run_folder import write_atomically
from deploy.run_manifest import program_commit
from deploy.suite import Suite
from deploy.versions import versions

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown (not a git checkout)"


def provenance() -> dict:
    """Commit and versions of this process."""
    return {"commit": commit(), "versions": versions()}


def commit() -> str:
    """Of the checkout, or of the one that the job was sent from, with `+changes` where files differ from it."""
    head, changed = program_commit()
    return UNKNOWN if head is None else head + ("+changes" if changed else "")


def make_manifest(folder: Path, suite: Suite, configs: list[RunConfig]) -> dict:
    """Writes `manifest.json`; a suite that goes on keeps the first one and adds when and with what it went on."""
    path = folder / "manifest.json"
    now = {"time": time.strftime("%FT%T%z"), **provenance(), "grader": grader_hash(), "data": data_hashes(configs)}
    if path.is_file():
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["sessions"].append(now)
    else:
        manifest = {
            "suite": suite.title,
            "profile": suite.profile,
            "runner": suite.runner,
            "seeds": suite.seeds,
            "machine": f"{platform.platform()}, {os.cpu_count()} CPUs",
            "sessions": [now],
        }
    write_atomically(path, json.dumps(manifest, indent=2) + "\n")
    return manifest


def grader_hash() -> str:
    """Of all files that decide a reward; the same for all arms by construction."""
    return _hash(*sorted((ROOT / "reward").glob("*.py")))


def data_hashes(configs: list[RunConfig]) -> dict[str, str]:
    """Task and source -> hash of what it is read or generated from."""
    found: dict[str, str] = {}
    for config in configs:
        for task in (*config.tasks, *config.evaluation.tasks):
            found.setdefault(f"{task.name} ({task.path})", _data_hash(task))
    return found


def _data_hash(task: TaskConfig) -> str:
    if task.path is None or task.path.startswith("hf:"):
        return "a hub dataset: not hashed"
    if task.path.startswith("builtin:"):
        return "generator " + _hash(ROOT / "common" / "arithmetic.py")
    return _hash(Path(task.path)) if Path(task.path).is_file() else "file is missing"


def _hash(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return f"sha256:{digest.hexdigest()[:32]}"
