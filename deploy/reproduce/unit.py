"""The runner of one unit of a suite, in this process."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from latent_grpo.common.config import RunConfig
from latent_grpo.common.files import write_atomically
from latent_grpo.deploy.reproduce.manifest import provenance
from latent_grpo.deploy.reproduce.results import UnitResult, read_result, write_result
from latent_grpo.deploy.reproduce.suite import (
    Suite,
    SuiteError,
    Unit,
    load_suite,
    unit_config,
    unit_folder,
    units,
)
from latent_grpo.deploy.run.folder import LEASE_FILE, LOCK_FILE, RunFolder, create_run, reopen_run, run_lock
from latent_grpo.deploy.run.foreign_code import check_origin, named_code
from latent_grpo.deploy.run.progress import Reporter

SESSIONS = "sessions.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The user's request for a suite; a unit's process gets the same one."""

    source: str
    folder: Path
    quick: bool = False
    seeds: list[int] = field(default_factory=list)
    """Seeds that replace the suite's."""
    overrides: list[str] = field(default_factory=list)

    def load(self) -> Suite:
        """Reads the suite with what was asked for. Raises SuiteError."""
        return load_suite(self.source, quick=self.quick, seeds=self.seeds, overrides=self.overrides)


def run_unit(
    request: Request, key: str, reporter: Reporter | None = None, *, clock: Callable[[], float] = time.monotonic
) -> UnitResult:
    """Runs one unit in this process and writes its result to its folder. A finished unit is left as it is."""
    suite, reporter = request.load(), reporter or Reporter()
    unit = next((u for u in units(suite) if u.key == key), None)
    if unit is None:
        raise SuiteError(f"--unit {key}: the suite has {', '.join(u.key for u in units(suite))}")
    path = unit_folder(request.folder, unit)
    if (result := read_result(path)) is not None:
        return result
    config = unit_config(suite, unit, request.folder.resolve())  # read by workers, which may run elsewhere
    path.mkdir(parents=True, exist_ok=True)
    began = clock()
    run = _in_process if suite.runner == "in_process" else _pipeline
    try:
        run(unit, config, path, reporter)
    finally:
        minutes = _spent(path, (clock() - began) / 60)
    return write_result(path, unit, config, minutes, provenance(), probe=suite.probe_every)


def _spent(path: Path, minutes: float) -> float:
    """Adds this session's minutes and returns those of all sessions that the unit's state comes from.

    A killed session left no entry.
    """
    sessions = path / SESSIONS
    earlier = json.loads(sessions.read_text(encoding="utf-8")) if sessions.is_file() else []
    write_atomically(sessions, json.dumps([*earlier, minutes]) + "\n")
    return sum(earlier) + minutes


def _in_process(unit: Unit, config: RunConfig, path: Path, reporter: Reporter) -> None:
    from latent_grpo.deploy.reproduce.in_process import start_in_process, train_in_process

    with run_lock(path):
        kept = {"log.txt", LOCK_FILE, LEASE_FILE}
        for left in (p for p in path.iterdir() if p.name not in kept):  # it has no checkpoints: it begins anew
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        folder = create_run(config, unit.name, path, kind="sft" if unit.is_start else "train")
        (start_in_process if unit.is_start else train_in_process)(folder, config, reporter)


def _pipeline(unit: Unit, config: RunConfig, path: Path, reporter: Reporter) -> None:
    from latent_grpo.deploy import train as training

    begun = (path / "config.json").is_file()
    allowed = [code.path for code in named_code(config)]  # the command's suite names it
    if unit.is_start:
        if begun:
            folder, _, lineage = reopen_run(path, [], "sft", check=partial(check_origin, allowed=allowed))
        else:
            folder, lineage = create_run(config, unit.name, path, kind="sft"), 0
        _make_start(folder, config, lineage, reporter)
    elif begun:
        training.resume(path, [], reporter, allowed)
    else:
        training.train(config, unit.name, reporter, path)


def _make_start(folder: RunFolder, config: RunConfig, lineage: int, reporter: Reporter) -> None:
    """The warm start, if the start has one, and the evaluation that its arms are compared with."""
    from latent_grpo.deploy.controller import gather
    from latent_grpo.deploy.evaluation.evaluate import evaluate
    from latent_grpo.deploy.run.preparation import prepare
    from latent_grpo.deploy.run.session import run_session
    from latent_grpo.deploy.sft.loop import warm_start
    from latent_grpo.learner.publication import publish_model

    with run_session(folder, config, lineage, reporter, prepare(config, reporter, folder)) as run:
        base = run.initial if config.warm_start is None else warm_start(run)
        run.await_workers()
        run.pool.publish(publish_model(base, 10**6, config))
        evaluate(run, partial(gather, run.pool), 0, "after")
