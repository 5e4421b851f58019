"""The command `latent-grpo reproduce SUITE`, which runs a suite's starts and arms over seeds and writes one report.

    suite ─► units (start or arm, seed) ─► child processes, side by side where resources allow ─► result.json each
                     │ finished ones are skipped, interrupted ones continue                            │
                     └────────────────────── report.md, report.html, report.json ◄─────────────────────┘

    FOLDER/
        suite.json        the definition and every unit's resolved settings, which may not change when it continues
        manifest.json     commit, versions, hashes of grader and data, seeds, machine (`deploy.reproduce.manifest`)
        starts/, runs/    one run folder per unit, with its result.json, log.txt and sessions.json (minutes of each)
        report.*          rewritten after every unit

A unit is a process of its own (`--unit KEY`), so its memory and its end do not affect the others.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_grpo.common.config import RunConfig, parse_config
from latent_grpo.common.errors import ConfigError, RunError
from latent_grpo.common.files import write_atomically
from latent_grpo.common.interrupts import (
    LEAVE_S,
    Interrupted,
    check_interrupt,
    deferred_interrupts,
    sigterm_as_interrupt,
)
from latent_grpo.deploy.reproduce.gpus import NO_GPU, Devices, GpuNeed, at_once, gpu_need, visible_gpus
from latent_grpo.deploy.reproduce.inputs import check_inputs
from latent_grpo.deploy.reproduce.manifest import Session, check_session, make_manifest, this_session
from latent_grpo.deploy.reproduce.report import write_report
from latent_grpo.deploy.reproduce.results import read_result
from latent_grpo.deploy.reproduce.suite import (
    Suite,
    SuiteError,
    Unit,
    changes,
    resolved,
    start_of,
    unit_config,
    unit_folder,
    units,
    units_of,
)
from latent_grpo.deploy.reproduce.unit import Request
from latent_grpo.deploy.run.folder import in_use, run_lock
from latent_grpo.deploy.run.foreign_code import announced
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.ray_session import needed_resources

POLL_S = 0.3
LOG_LINES = 12
SUITE_FILE = "suite.json"
Start = Callable[[Request, Unit, Sequence[str]], "subprocess.Popen[bytes]"]
"""Starts a unit's process; the strings name the GPUs that it may see, and none of them means all GPUs."""


class SuiteFailed(RunError):
    """Raised for units that did not finish; the report has those that did."""


def default_folder(source: str, quick: bool) -> Path:
    """Returns the folder of a suite's results where the user names none."""
    return Path("runs") / (f"reproduce-{Path(source).stem}" + ("-quick" if quick else ""))


def reproduce(
    request: Request, parallel: int | None = None, reporter: Reporter | None = None, *, arms: Sequence[str] = ()
) -> Path:
    """Runs the suite's unfinished units and writes the report; returns the suite's folder.

    `parallel` units run at the same time, by default as many as the machine (or the Ray cluster that RAY_ADDRESS
    names) holds. With `arms` only these run now, with their starts.
    Raises :class:`SuiteError` for missing models and files and for another configuration than the folder's, and
    :class:`SuiteFailed` for failed units.
    """
    reporter = reporter or Reporter()
    suite = request.load()
    wanted = list(units_of(suite, arms))
    todo = [unit for unit in wanted if read_result(unit_folder(request.folder, unit)) is None]
    _announce(suite, wanted, request.folder, reporter.say)
    for note in check_inputs(suite, todo, request.folder):
        reporter.say(f"[yellow]{note}[/]")
    open_folder(request, suite)
    if parallel is None:
        parallel = max_parallel_units([unit_config(suite, unit, request.folder) for unit in todo], suite.runner)
    with run_lock(request.folder):
        reporter.say(
            f"suite {suite.title}: {len(wanted)} units, {len(wanted) - len(todo)} finished before, "
            f"{parallel} at the same time · {request.folder}"
        )
        try:
            with sigterm_as_interrupt():
                failed = run_units(request, suite, todo, parallel, reporter)
        finally:
            paths = write_report(suite, request.folder)
    reporter.say(f"report {paths[0]} · {paths[1]} · {paths[2]}")
    if failed:
        raise SuiteFailed("; ".join(f"{unit.key}: {reason}" for unit, reason in failed.items()))
    return request.folder


def _announce(suite: Suite, wanted: Sequence[Unit], folder: Path, say: Callable[[str], None]) -> None:
    """Says which code the settings of the units name: problems and verifiers of an import path are imported."""
    lines = (line for unit in wanted for line in announced(unit_config(suite, unit, folder)))
    for line in dict.fromkeys(lines):
        say(line)


def check(request: Request, *, arms: Sequence[str] = (), say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Checks the suite and returns one line per unit that it would run; writes nothing.

    `say` is told which code the settings name, before any of it is imported. Raises :class:`SuiteError` for settings
    that cannot work, for missing models and files, and for another configuration than the folder's.
    """
    suite = request.load()
    resolved(suite, request.folder)
    _announce(suite, list(units_of(suite, arms)), request.folder, say)
    configs = [(unit, unit_config(suite, unit, request.folder)) for unit in units_of(suite, arms)]
    notes = check_inputs(suite, [unit for unit, _ in configs], request.folder)
    check_folder(request, suite)
    if (used := in_use(request.folder)) is not None:
        notes.append(used)
    lines = [f"suite {suite.title}: {len(configs)} units, all settings valid, local models and files exist", *notes]
    for unit, config in configs:
        work = "start" if unit.is_start else f"{config.steps} steps of {config.algorithm}"
        tasks = ", ".join(task.name for task in config.evaluation.tasks)
        lines.append(f"  {unit.key}: {work}, evaluated on {tasks}")
    return lines


def open_folder(request: Request, suite: Suite) -> None:
    """Creates the suite's folder, or continues in one that passes :func:`check_folder`."""
    wanted, session = check_folder(request, suite)
    request.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(request.folder / SUITE_FILE, json.dumps(wanted, indent=2) + "\n")
    make_manifest(request.folder, suite, session)


def check_folder(request: Request, suite: Suite) -> tuple[dict[str, Any], Session]:
    """Checks that the suite's folder is new, or holds this very suite, made with this grader and these data.

    Writes nothing. Returns the resolved suite and the manifest's entry of this session.
    """
    wanted = resolved(suite, request.folder)
    known = request.folder / SUITE_FILE
    if known.is_file():
        stored = json.loads(known.read_text(encoding="utf-8"))
        held = stored["units"]  # titles and claims may change, and units may be added to those that it holds
        gone = [key for key in held if key not in wanted["units"]]
        if gone:
            raise SuiteError(
                f"{request.folder} also holds {', '.join(gone[:6])}{' and more' * (len(gone) > 6)}, which this command "
                "leaves out: include those seeds and arms, or give another --folder"
            )
        differing = [*changes(_computed(stored, held), _computed(wanted, held))]
        if differing:
            shown = "; ".join(differing[:6]) + (f"; and {len(differing) - 6} more" if len(differing) > 6 else "")
            raise SuiteError(
                f"{request.folder} holds the suite with another configuration: {shown}. Its finished units would not "
                "be comparable with new ones; continue with the same configuration, or give another --folder"
            )
    elif request.folder.exists() and any(request.folder.iterdir()):
        raise SuiteError(f"{request.folder} is not empty and holds no suite; give another --folder")
    session = this_session(unit_config(suite, unit, request.folder) for unit in units(suite))
    check_session(request.folder, session)
    return wanted, session


def _computed(resolved_suite: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Returns what decides the numbers of these units."""
    configs = {key: _complete(resolved_suite["units"].get(key)) for key in keys}
    return {"runner": resolved_suite["suite"]["runner"], "units": configs}


def _complete(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """Completes settings that an earlier version wrote with the defaults of later keys."""
    with contextlib.suppress(ConfigError):
        return config and json.loads(parse_config(config).model_dump_json(exclude={"runs_folder"}))
    return config


def max_parallel_units(
    configs: list[RunConfig],
    runner: str,
    available: Mapping[str, float] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> int:
    """Returns how many units fit at once into `available` (default: all resources), by the most demanding unit."""
    available = _resources() if available is None else available
    fits = [max(len(configs), 1)]
    for config in configs:
        needs = {"CPU": 1.0} if runner == "in_process" else needed_resources(config)
        if (gpus := _gpus_here(config, runner, environment)).devices:  # of this machine each unit sees its own
            fits.append(at_once(gpus, int(available.get("GPU", 0))))
            del needs["GPU"]
        fits += [math.floor(available.get(name, 0.0) / amount + 1e-9) for name, amount in needs.items()]
    return max(min(fits), 1)


def _gpus_here(config: RunConfig, runner: str, environment: Mapping[str, str]) -> GpuNeed:
    """Returns what a unit needs of this machine's GPUs; a cluster (RAY_ADDRESS) hands out its own."""
    return NO_GPU if runner == "in_process" or environment.get("RAY_ADDRESS") else gpu_need(config)


def _resources() -> dict[str, float]:
    if os.environ.get("RAY_ADDRESS"):
        import ray

        if not ray.is_initialized():
            ray.init(address=os.environ["RAY_ADDRESS"], logging_level=logging.WARNING)
        available: dict[str, float] = ray.cluster_resources()
        return available
    import torch

    return {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}


# --- scheduling ----------------------------------------------------------------------------------------------------


def run_units(
    request: Request,
    suite: Suite,
    todo: list[Unit],
    parallel: int,
    reporter: Reporter,
    *,
    start: Start | None = None,
    devices: Devices | None = None,
    environment: Mapping[str, str] = os.environ,
) -> dict[Unit, str]:
    """Runs the units, starts before their arms. Returns those that failed, with the reason.

    `start` starts a unit's process (default: the command, on this machine); `devices` are the GPUs of this machine.
    """
    start = start or _start
    waiting = list(todo)
    running: dict[Unit, subprocess.Popen[bytes]] = {}
    failed: dict[Unit, str] = {}
    configs = {unit: unit_config(suite, unit, request.folder) for unit in todo}
    needs = {unit: _gpus_here(config, suite.runner, environment) for unit, config in configs.items()}
    devices = devices or _devices(needs.values())
    began, finished, number = time.monotonic(), 0, signal.SIGTERM
    try:
        with deferred_interrupts():  # a started process is recorded in `running` before an interrupt
            while waiting or running:
                for unit in [u for u in waiting if not u.is_start and start_of(suite, u) in failed]:
                    waiting.remove(unit)
                    failed[unit] = f"its start {start_of(suite, unit).key} failed"
                while len(running) < parallel and (ready := next_unit(suite, waiting, running)) is not None:
                    if (gpus := devices.take(ready, needs[ready])) is None:
                        break  # until a unit ends
                    waiting.remove(ready)
                    running[ready] = start(request, ready, gpus)
                    reporter.say(f"{ready.key}: started" + (f" on GPU {', '.join(gpus)}" if gpus else ""))
                for unit in [u for u, process in running.items() if process.poll() is not None]:
                    running.pop(unit)
                    devices.give_back(unit)
                    result = read_result(unit_folder(request.folder, unit))
                    finished += 1
                    if result is None:
                        failed[unit] = f"see {unit_folder(request.folder, unit) / 'log.txt'}: {_tail(request, unit)}"
                        reporter.say(f"[red]{unit.key}: failed[/]")
                        continue
                    left = (time.monotonic() - began) / finished * (len(waiting) + len(running))
                    reporter.say(
                        f"{unit.key}: {result.headline} · {result.minutes:.1f} min · about {left / 60:.0f} min left"
                    )
                    write_report(suite, request.folder)
                time.sleep(POLL_S)
                check_interrupt()
    except Interrupted as interrupt:
        number = signal.SIGTERM if interrupt.terminated else signal.SIGINT
        raise
    finally:
        terminated = number == signal.SIGTERM
        step_s = {unit: configs[unit].deadlines.after_signal(terminated)[0] for unit in running}
        _stop(running, number, step_s, reporter)
    return failed


def next_unit(suite: Suite, waiting: list[Unit], running: Iterable[Unit]) -> Unit | None:
    """Returns the first unit whose start has finished."""
    blocked = {*waiting, *running}
    return next((unit for unit in waiting if unit.is_start or start_of(suite, unit) not in blocked), None)


def _devices(needs: Iterable[GpuNeed]) -> Devices:
    if not any(need.devices for need in needs):
        return Devices([])
    import torch

    return Devices(visible_gpus(torch.cuda.device_count(), os.environ))


def _start(request: Request, unit: Unit, gpus: Sequence[str]) -> subprocess.Popen[bytes]:
    folder = unit_folder(request.folder, unit)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "latent_grpo.deploy", "reproduce", request.source, "--folder", str(request.folder)]
    command += ["--unit", unit.key, *(["--quick"] if request.quick else [])]
    command += [*(["--seeds", ",".join(map(str, request.seeds))] if request.seeds else []), *request.overrides]
    with (folder / "log.txt").open("ab") as log:
        # a session of its own: Ctrl-C reaches the suite first, which passes it on once
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else None
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment)


def _stop(
    running: dict[Unit, subprocess.Popen[bytes]], number: int, step_s: Mapping[Unit, float], reporter: Reporter
) -> None:
    """Stops running units by the signal `number`, so that they save a checkpoint; kills those that do not end in time.

    `step_s` is the time that each has for its running step, in seconds. A second interrupt ends them at once.
    """
    if not running:
        return
    reporter.say(
        f"{', '.join(unit.key for unit in running)}: stopping after the running step, for which there are up to "
        f"{max(step_s.values()):,g} s"
    )
    _signal(running.values(), number)
    began = time.monotonic()
    try:
        for unit, process in running.items():
            _end(process, began + step_s[unit] + LEAVE_S)
    except KeyboardInterrupt:
        _signal(running.values(), number)
        for process in running.values():
            _end(process, time.monotonic() + LEAVE_S)
        raise


def _signal(processes: Iterable[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def _end(process: subprocess.Popen[bytes], deadline: float) -> None:
    """Waits for a process until `deadline` (`time.monotonic()`), then kills it with its children."""
    try:
        process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _tail(request: Request, unit: Unit) -> str:
    log = unit_folder(request.folder, unit) / "log.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    wanted = [line for line in lines if line.startswith("error ")] or lines[-LOG_LINES:]
    return " ".join(wanted[-LOG_LINES:]) or "no output"
