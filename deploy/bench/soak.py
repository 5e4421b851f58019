"""A soak: processes of a training run are killed at random, and its end is compared with an undisturbed run.

The run is tiny, deterministic and started as the command that a user starts, with its own Ray. Its processes are killed
in turns of a seeded order, spread over the run's steps: rollout workers, their graders, the learner's rank, the
controller, the supervisor, and the raylet and GCS of the run's Ray; all but the supervisor are stopped (SIGSTOP), too.
The next kill comes once the run has recovered, which it does by itself; without its supervisor it saves its state and
ends, and is resumed. Afterwards every group must have been trained on exactly once in the surviving lineage, and the
weights must be those of the undisturbed run, bit for bit.

What was done is kept in `soak.json` of its folder after every kill, so a soak that was interrupted goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.table import Table

from latent_grpo.common.errors import ConfigError, RunError
from latent_grpo.common.files import file_hash, write_atomically
from latent_grpo.common.metrics import FILE as METRICS
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.deploy.run.recoveries import FILE as RECOVERIES
from latent_grpo.reward.verifier import Grade

CONTROLLER, SUPERVISOR, GRADER = "controller", "supervisor", "grader"
COMMANDS = {
    "rollout worker": "WorkerActor",
    GRADER: "grader_process",
    "learner rank": "LearnerRank",
    CONTROLLER: "",
    SUPERVISOR: "",
    "raylet": "raylet/raylet",
    "GCS": "gcs_server",
}
"""Kinds of processes, and what their command lines hold; the controller is the supervisor's child."""
STOPPED = "stopped "
KINDS = (*COMMANDS, *(STOPPED + kind for kind in COMMANDS if kind != SUPERVISOR))
"""What is killed; what is called stopped gets SIGSTOP, which nothing but its silence shows.

Of a stopped supervisor a run knows nothing: it goes on, and so does the supervisor after SIGCONT.
"""
OF_WORKERS = ("rollout worker", STOPPED + "rollout worker")
OF_GRADERS = (GRADER, STOPPED + GRADER)
GOES_ON = (*OF_WORKERS, *OF_GRADERS)  # the run takes no step back
SILENCE_S = 20.0  # deadlines of the run
STEPS_A_KILL = 10
LAST_STEPS = 80  # after the last kill they show that the run goes on, as it does for a while where its GCS is stopped
PAUSE_S = 0.5  # at most, from a step's end to the next kill: it falls anywhere in a step
POLL_S = 0.1
GRADING_S = 0.02  # a response
STUCK_S = 600.0
TAIL_BYTES = 2**16  # of the metrics, which hold the last step whole
LOST = re.compile(rb"rollout worker-\d+ lost ")
FILE, REPORT = "soak.json", "report.md"
UNDISTURBED, DISTURBED = "undisturbed", "disturbed"  # names of the runs
WORKERS = 2
TASK = {
    "name": "chains", "path": "builtin:chain_arithmetic", "verifier": f"{__name__}:Coin", "max_prompt_tokens": 10,
    "max_response_tokens": 22, "options": {"operations": 2},
}  # fmt: skip
PROFILE: dict[str, Any] = {
    "deterministic": True, "k": 3, "group_size": 4, "prompts_per_step": 4, "minibatch_prompts": 2,
    "dynamic_sampling": "drop", "noise": {"scale": 1.0}, "temperature": 1.0, "masking": "off",
    "optimizer": {"lr": 2e-5},
    "model": {
        "new": {"hidden_size": 32, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "max_positions": 32}
    },
    "tasks": [TASK], "rollout": {"workers": WORKERS, "max_restarts": 10_000, "resources": {"num_cpus": 0.25}},
    "learner": {"resources": {"num_cpus": 0.25}}, "evaluation": {"tasks": []}, "checkpoint": {"every": 5},
    "dump": {"every": 1}, "metrics": {"sinks": []}, "max_recoveries": 10_000, "self_test_groups": 0,
    "deadlines": dict.fromkeys(("driver_s", "learner_s", "rollout_s", "weights_s"), SILENCE_S),
}  # fmt: skip


class Coin:
    """Reward 1 for half of all texts, and for other texts with each answer, so that nothing can be learned for long.

    A policy that has collapsed would have no signal, and a run without updates ends with the same weights whatever was
    killed. A verdict takes its time: with shorter steps the run would end before all kills were made, since it goes on
    while a worker is replaced.
    """

    def grade(self, response_text: str, gold: str) -> Grade:
        time.sleep(GRADING_S)
        good = zlib.crc32(f"{gold}: {response_text}".encode()) % 2
        return Grade(reward=float(good), reason="correct" if good else "wrong", parsed=response_text[:10])


@dataclass(frozen=True, slots=True)
class Kill:
    """A kill after step `step`.

    `noticed_s` is the time in seconds until the run knew of it; None for a grader, whose worker does not tell, and for
    a supervisor, without which the run ends.
    `recovered_s` is that until a step ended in which all was as before: in a new lineage, or with all workers.
    """

    kind: str
    step: int
    noticed_s: float | None
    recovered_s: float


@dataclass(slots=True)
class Soak:
    """The result of a soak. Samples are counted over all steps of the surviving lineage."""

    seed: int
    steps: int
    kills: list[Kill] = field(default_factory=list)
    lost: int = 0
    duplicated: int = 0
    different: int = 0  # steps whose samples are not those of the undisturbed run
    same_weights: bool = False
    seconds: dict[str, float] = field(default_factory=dict)  # by the name of the run, all its sessions together
    memory_mib: dict[str, tuple[float, float]] = field(default_factory=dict)  # of the undisturbed run, early and late
    descriptors: dict[str, tuple[int, int]] = field(default_factory=dict)
    running: tuple[int, float] | None = None  # process id and time of creation of the command that goes on

    def keep(self, root: Path) -> None:
        """Writes what was done so far."""
        write_atomically(root / FILE, json.dumps(asdict(self), indent=1) + "\n")


def begun(root: Path, seed: int, steps: int) -> Soak:
    """Returns the soak that has begun in a folder, or a new one. Raises ConfigError where it is another one."""
    if not (root / FILE).is_file():
        return Soak(seed, steps)
    try:
        stored = json.loads((root / FILE).read_text(encoding="utf-8"))
        soak = Soak(**{**stored, "kills": [Kill(**kill) for kill in stored["kills"]]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{root / FILE} is damaged ({error}); give the soak another folder") from error
    if (soak.seed, soak.steps) != (seed, steps):
        raise ConfigError(
            f"{root} has a soak of seed {soak.seed} over {soak.steps} steps, not of seed {seed} over {steps}; go on "
            "with it, or give another folder"
        )
    return soak


def measure(kills: int, seed: int, steps: int | None, folder: Path | None, say: Callable[[str], None] = print) -> Soak:
    """Runs both runs in `folder`, or what is left of them. Raises RunError where one of them fails or stands still."""
    with tempfile.TemporaryDirectory(prefix="lgk-") as private, tempfile.TemporaryDirectory(prefix="lgh-") as home:
        root = (folder or Path(private)).resolve()
        root.mkdir(parents=True, exist_ok=True)
        soak = begun(root, seed, steps or kills * STEPS_A_KILL + LAST_STEPS)
        (root / "soak.yaml").write_text(yaml.safe_dump({**PROFILE, "steps": soak.steps, "runs_folder": str(root)}))
        if not (root / UNDISTURBED / "model").is_dir():
            with _Command(root, UNDISTURBED, soak, home) as command:
                command.watch()
        say(f"undisturbed: {soak.steps} steps within {soak.seconds.get(UNDISTURBED, 0.0):.0f} s")
        if not (root / DISTURBED / "model").is_dir():
            with _Command(root, DISTURBED, soak, home) as command:
                command.disturb(kills, say)
        compare(soak, root / UNDISTURBED, root / DISTURBED)
        soak.keep(root)
        write_atomically(root / REPORT, report(soak))
        return soak


def planned(seed: int, number: int) -> tuple[str, random.Random]:
    """Returns what the kill of a number (from 0) hits, and the random numbers of its moment: kinds come in turns."""
    turn, place = divmod(number, len(KINDS))
    return random.Random(f"{seed}/{turn}").sample(list(KINDS), len(KINDS))[place], random.Random(f"{seed}/at {number}")


@dataclass(frozen=True, slots=True)
class _Last:
    """The last step that has ended."""

    step: int = 0
    lineage: int = 0
    workers: int = 0


class _Command:
    """`latent-grpo train` as a process, with a home of its own and no Ray of anybody else. One that ended goes on."""

    def __init__(self, root: Path, name: str, soak: Soak, home: str):
        self.run, self.log = root / name, root / f"{name}.log"
        self._root, self._soak, self._home = root, soak, home
        _end(soak.running)
        self._start()

    def _start(self) -> None:
        """Starts the run, or resumes the one of this name."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        profile = str(self._root / "soak.yaml")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "latent_grpo.deploy", "train", "--profile", profile, f"run_name={self.run.name}"],
            env=kept | {"HOME": self._home, "OMP_NUM_THREADS": "1"},
            stdout=self.log.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._soak.running = self._process.pid, psutil.Process(self._process.pid).create_time()
        self._soak.keep(self._root)

    def __enter__(self) -> _Command:
        self._began = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:  # an interrupt, or a run that stands still
            _end_process(psutil.Process(self._process.pid))
        seconds = self._soak.seconds.get(self.run.name, 0.0) + time.monotonic() - self._began
        self._soak.seconds[self.run.name], self._soak.running = seconds, None
        self._soak.keep(self._root)

    def last(self) -> _Last:
        """Reads the last step of the live lineage."""
        path = self.run / METRICS
        if not path.is_file():
            return _Last()
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
            whole = [line for line in file.read().split(b"\n")[:-1] if b'"kind": "train"' in line]
        if not whole or not whole[-1].startswith(b"{"):
            return _Last()
        row = json.loads(whole[-1])
        return _Last(row["step"], row["lineage"], int(row["metrics"].get("rollout/workers", 0)))

    def watch(self) -> None:
        """Waits for the end; notes memory and descriptors at a fifth of the steps and near the end."""
        early: dict[str, tuple[float, int]] = {}
        soak = self._soak

        def look() -> bool:
            done = self.last().step
            if not early and done >= soak.steps // 5:
                early.update(self._use())
            if early and done < soak.steps - 2:
                for name, (mib, files) in self._use().items():
                    if name in early:
                        soak.memory_mib[name] = early[name][0], mib
                        soak.descriptors[name] = early[name][1], files
            return False

        self._await(look, every=1.0)
        self._ensure_success()
        if lost := self._noticed("rollout worker") + self._noticed(CONTROLLER):
            raise RunError(
                f"the undisturbed run lost {lost} process(es) by itself, by its deadlines of {SILENCE_S:g} s on a busy "
                f"machine; its log is {self.log}. Remove {self.run} and begin again"
            )

    def disturb(self, kills: int, say: Callable[[str], None]) -> None:
        """Kills processes until there were so many kills, or the run has ended."""
        soak = self._soak
        until = max(soak.steps - LAST_STEPS, soak.steps / 2)
        while (number := len(soak.kills)) < kills:
            kind, moment = planned(soak.seed, number)
            due = until * (number + moment.random()) / kills
            if not self._await(partial(self._beyond, due)):
                break
            time.sleep(moment.uniform(0.0, PAUSE_S))
            kill = self._kill(kind, moment)
            if kill is None:
                break
            soak.kills.append(kill)
            soak.keep(self._root)
            noticed = "" if kill.noticed_s is None else f"noticed within {kill.noticed_s:.1f} s, "
            over = f"{noticed}over {kill.recovered_s:.1f} s later"
            say(f"kill {number + 1} of {kills}: {kind} after step {kill.step}; {over}")
        self._await(lambda: False)
        self._ensure_success()

    def _beyond(self, steps: float) -> bool:
        return self.last().step > steps

    def _kill(self, kind: str, moment: random.Random) -> Kill | None:
        """Kills a process of the kind and waits until all is as before; None: the run has ended."""
        found: list[psutil.Process] = []

        def present() -> bool:
            found[:] = self._processes(kind)
            return bool(found)

        family: list[psutil.Process] | None = None
        while family is None:
            if not self._await(present):  # in a run that is being started again there is none for a while
                return None
            before, known, at = self.last(), self._noticed(kind), time.monotonic()
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                victim = moment.choice(found)
                children = victim.children(recursive=True)
                victim.send_signal(signal.SIGSTOP if kind.startswith(STOPPED) else signal.SIGKILL)
                family = children
        noticed = None
        if kind == SUPERVISOR:
            self._resume(family)
        elif kind not in OF_GRADERS:
            if not self._await(lambda: self._noticed(kind) > known):
                return None
            noticed = time.monotonic() - at
        known_at = self.last()  # a step that had ended by then counted the worker that was killed

        def over() -> bool:
            now = self.last()
            if kind not in GOES_ON:
                return now.lineage > before.lineage
            return now.step > known_at.step and (kind in OF_GRADERS or now.workers == WORKERS)

        return Kill(kind, before.step, noticed, time.monotonic() - at) if self._await(over) else None

    def _noticed(self, kind: str) -> int:
        """How many losses the run knows of: in its log those of workers, in its record those of everything else."""
        if kind in GOES_ON:
            return len(LOST.findall(self.log.read_bytes()))
        record = self.run / RECOVERIES
        return record.read_bytes().count(b"\n") if record.is_file() else 0

    def _resume(self, family: list[psutil.Process]) -> None:
        """Starts the run again once the family of its killed supervisor has ended."""
        self._process.wait()
        end = time.monotonic() + STUCK_S
        while any(map(_runs, family)):
            if time.monotonic() > end:
                raise RunError(f"the run did not end within {STUCK_S:g} s of its supervisor; its log is {self.log}")
            time.sleep(POLL_S)
        self._start()

    def _await(self, done: Callable[[], bool], every: float = POLL_S) -> bool:
        """Waits until `done`; False: the run has ended before. Raises RunError where the run stands still."""
        end = time.monotonic() + STUCK_S
        shown = self.last()
        while not done():
            if self._process.poll() is not None:
                return False
            if (now := self.last()) != shown:
                shown, end = now, time.monotonic() + STUCK_S
            if time.monotonic() > end:
                raise RunError(f"the run stands still for {STUCK_S:g} s; its log is {self.log}")
            time.sleep(every)
        return True

    def _processes(self, kind: str) -> list[psutil.Process]:
        try:
            supervisor, kind = psutil.Process(self._process.pid), kind.removeprefix(STOPPED)
            if kind == SUPERVISOR:
                return [supervisor] if supervisor.children() else []
            if kind == CONTROLLER:
                return supervisor.children()
            return [p for p in supervisor.children(recursive=True) if COMMANDS[kind] in " ".join(_command_line(p))]
        except psutil.NoSuchProcess:
            return []

    def _use(self) -> dict[str, tuple[float, int]]:
        """Memory in MiB and open files of one process of each kind."""
        used = {}
        for kind in COMMANDS:
            for process in self._processes(kind)[:1]:
                try:
                    used[kind] = process.memory_info().rss / 2**20, process.num_fds()
                except psutil.Error:
                    continue
        return used

    def _ensure_success(self) -> None:
        if self._process.returncode:
            raise RunError(f"the run {self.run.name} ended with {self._process.returncode}; its log is {self.log}")


def _end(running: tuple[int, float] | None) -> None:
    """Ends the command of a soak that was killed, which may go on without it."""
    if running is None:
        return
    try:
        process = psutil.Process(running[0])
        if process.create_time() == running[1]:
            _end_process(process)
    except psutil.NoSuchProcess:
        pass


def _end_process(process: psutil.Process) -> None:
    """Ends a command with what it has started, in time to save its state."""
    family = process.children(recursive=True)
    process.terminate()
    _, left = psutil.wait_procs([process, *family], timeout=STUCK_S)
    for survivor in left:
        survivor.kill()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def compare(soak: Soak, undisturbed: Path, disturbed: Path) -> None:
    """Counts what the disturbed run has lost, repeated or made otherwise, step by step of its live lineage."""
    stores = TrajectoryStore(undisturbed / "trajectories"), TrajectoryStore(disturbed / "trajectories")
    columns = ["group_uid", "sample_index", "latent_ids", "hard_ids", "reward"]
    soak.lost = soak.duplicated = soak.different = 0
    for step in range(1, soak.steps + 1):
        expected, found = (store.read(step).select(columns).to_pylist() for store in stores)
        wanted = {(row["group_uid"], row["sample_index"]) for row in expected}
        got = [(row["group_uid"], row["sample_index"]) for row in found]
        soak.lost += len(wanted - set(got))
        soak.duplicated += len(got) - len(set(got))
        soak.different += expected != found
    models = [file_hash(path / "model" / "model.safetensors") for path in (undisturbed, disturbed)]
    soak.same_weights = models[0] == models[1]


def rows(soak: Soak) -> list[tuple[str, ...]]:
    """Returns a row for each kind that was killed: times, median and largest seconds until noticed and until over."""
    found: list[tuple[str, ...]] = []
    for kind in KINDS:
        kills = [kill for kill in soak.kills if kill.kind == kind]
        noticed = [kill.noticed_s for kill in kills if kill.noticed_s is not None]
        over = [kill.recovered_s for kill in kills]
        if kills:
            found.append((kind, str(len(kills)), *_middle_and_most(noticed), *_middle_and_most(over)))
    return found


COLUMNS = ("killed", "times", "noticed after, s", "at most, s", "over after, s", "at most, s")


def verdict(soak: Soak) -> str:
    """Returns what was lost, and how long both runs took, in a sentence."""
    return (
        f"samples lost {soak.lost}, duplicated {soak.duplicated}; steps with other samples {soak.different}; weights "
        f"{'equal bit for bit' if soak.same_weights else 'DIFFERENT'}; "
        f"{soak.seconds.get(DISTURBED, 0.0):.0f} s, undisturbed {soak.seconds.get(UNDISTURBED, 0.0):.0f} s"
    )


def use(soak: Soak) -> list[str]:
    """Returns a sentence for each kind of process about its memory and descriptors in the undisturbed run."""
    return [
        f"{name}: {early:.0f} -> {late:.0f} MiB, {soak.descriptors[name][0]} -> {soak.descriptors[name][1]} descriptors"
        for name, (early, late) in soak.memory_mib.items()
    ]


def show(soak: Soak) -> None:
    """Prints the result as a table and sentences."""
    console = TextConsole(highlight=False)
    table = Table(title=_title(soak))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "killed" else "right")
    for row in rows(soak):
        table.add_row(*row)
    console.print(table)
    console.print(verdict(soak))
    for line in use(soak):
        console.print(f"{line} (undisturbed run, from a fifth of its steps to the end)")


def report(soak: Soak) -> str:
    """Returns the result as Markdown."""
    lines = [f"**{_title(soak)}**", "", *(f"| {' | '.join(row)} |" for row in (COLUMNS, ("---",) * len(COLUMNS)))]
    lines += [f"| {' | '.join(row)} |" for row in rows(soak)]
    lines += ["", f"{verdict(soak)}.", "", "From a fifth of the undisturbed run's steps to its end:", ""]
    return "\n".join([*lines, *(f"* {line}" for line in use(soak))]) + "\n"


def _title(soak: Soak) -> str:
    return f"{len(soak.kills)} kills in {soak.steps} steps, seed {soak.seed}"


def _middle_and_most(seconds: list[float]) -> tuple[str, str]:
    return (f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}") if seconds else ("-", "-")
