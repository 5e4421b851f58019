"""A soak: processes of a training run are killed at random, and its end is compared with an undisturbed run.

The run is tiny, deterministic and started as the command that a user starts, with its own Ray. Its processes are killed
in turns of a seeded order: rollout workers, their graders, the learner's rank, the controller, and the raylet
and GCS of the run's Ray. Afterwards every group must have been trained on exactly once in the surviving lineage, and
the weights must be those of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from latent_grpo.common.errors import RunError
from latent_grpo.common.files import file_hash
from latent_grpo.common.metrics import read_metrics
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.reward.verifier import Grade

KINDS = {
    "rollout worker": "WorkerActor",
    "grader": "grader_process",
    "learner rank": "LearnerRank",
    "controller": "",
    "raylet": "raylet/raylet",
    "GCS": "gcs_server",
}
"""What is killed, and what its command line holds; the controller is the supervisor's child."""
STEPS_A_KILL = 10
PAUSE_S = 0.5  # at most, from a step's end to the next kill: it falls anywhere in a step
STUCK_S = 600.0
TASK = {
    "name": "chains", "path": "builtin:chain_arithmetic", "verifier": f"{__name__}:Coin", "max_prompt_tokens": 10,
    "max_response_tokens": 22, "options": {"operations": 2},
}  # fmt: skip
PROFILE: dict[str, Any] = {
    "deterministic": True, "k": 3, "group_size": 4, "prompts_per_step": 4, "minibatch_prompts": 2,
    "dynamic_sampling": "drop", "noise": {"scale": 1.0}, "temperature": 1.0, "masking": "off",
    "optimizer": {"lr": 1e-3},
    "model": {
        "new": {"hidden_size": 32, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "max_positions": 32}
    },
    "tasks": [TASK], "rollout": {"workers": 2, "max_restarts": 10_000, "resources": {"num_cpus": 0.25}},
    "learner": {"resources": {"num_cpus": 0.25}}, "evaluation": {"tasks": []}, "checkpoint": {"every": 5},
    "dump": {"every": 1}, "metrics": {"sinks": []}, "max_recoveries": 10_000, "self_test_groups": 0,
}  # fmt: skip


class Coin:
    """Reward 1 for half of all texts, so that every step has signal, whatever the model says."""

    def grade(self, response_text: str, gold: str) -> Grade:
        good = zlib.crc32(response_text.encode()) % 2
        return Grade(reward=float(good), reason="correct" if good else "wrong", parsed=response_text[:10])


@dataclass(frozen=True, slots=True)
class Kill:
    """A kill: `recovered_s` is the time in seconds until the next step ended, `step` the last one before it."""

    kind: str
    step: int
    recovered_s: float


@dataclass(slots=True)
class Soak:
    """The result of a soak. Groups are counted over all steps of the surviving lineage."""

    seed: int
    steps: int
    kills: list[Kill] = field(default_factory=list)
    lost: int = 0
    duplicated: int = 0
    different: int = 0  # steps whose samples are not those of the undisturbed run
    same_weights: bool = False
    undisturbed_s: float = 0.0
    disturbed_s: float = 0.0
    memory_mib: dict[str, tuple[float, float]] = field(default_factory=dict)  # of the undisturbed run, early and late
    descriptors: dict[str, tuple[int, int]] = field(default_factory=dict)


def measure(kills: int, seed: int, steps: int | None, folder: Path | None, say: Callable[[str], None] = print) -> Soak:
    """Runs both runs in `folder`. Raises RunError where one of them fails or stands still."""
    with tempfile.TemporaryDirectory(prefix="lgk-") as private:
        root = folder or Path(private)
        root.mkdir(parents=True, exist_ok=True)
        soak = Soak(seed, steps or max(kills * STEPS_A_KILL, 20))
        profile = root / "soak.yaml"
        profile.write_text(yaml.safe_dump({**PROFILE, "steps": soak.steps, "runs_folder": str(root)}))
        with tempfile.TemporaryDirectory(prefix="lgh-") as home:
            began = time.monotonic()
            with _Command(root, "undisturbed", profile, home) as undisturbed:
                undisturbed.watch(soak)
            soak.undisturbed_s = time.monotonic() - began
            say(f"undisturbed: {soak.steps} steps within {soak.undisturbed_s:.0f} s")
            began = time.monotonic()
            with _Command(root, "disturbed", profile, home) as disturbed:
                disturbed.disturb(kills, random.Random(seed), soak, say)
            soak.disturbed_s = time.monotonic() - began
        compare(soak, undisturbed.run, disturbed.run)
        return soak


class _Command:
    """`latent-grpo train` as a process, with a home of its own and no Ray of anybody else."""

    def __init__(self, root: Path, name: str, profile: Path, home: str):
        self.run, self.log = root / name, root / f"{name}.log"
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "latent_grpo.deploy", "train", "--profile", str(profile), f"run_name={name}"],
            env=kept | {"HOME": home, "OMP_NUM_THREADS": "1"},
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> _Command:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:  # an interrupt, or a run that stands still
            self._process.terminate()
            self._process.wait()

    def steps(self) -> int:
        """The last step of the live lineage."""
        if not (self.run / "metrics.jsonl").is_file():
            return 0
        return max((row["step"] for row in read_metrics(self.run)), default=0)

    def lines(self) -> int:
        """Steps that have ended, of all lineages."""
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b'"kind": "train"') if path.is_file() else 0

    def watch(self, soak: Soak) -> None:
        """Waits for the end; notes memory and descriptors at a fifth of the steps and near the end."""
        early: dict[str, tuple[float, int]] = {}
        while self._process.poll() is None:
            done = self.steps()
            if not early and done >= soak.steps // 5:
                early = self._use()
            if early and done < soak.steps - 2:
                for name, (mib, files) in self._use().items():
                    if name in early:
                        soak.memory_mib[name] = early[name][0], mib
                        soak.descriptors[name] = early[name][1], files
            time.sleep(1.0)
        self._ensure_success()

    def disturb(self, kills: int, order: random.Random, soak: Soak, say: Callable[[str], None]) -> None:
        """Kills processes until there were so many kills, or the run has ended."""
        kinds: list[str] = []
        while len(soak.kills) < kills:
            self._await_lines(self.lines() + order.randint(1, STEPS_A_KILL // 2))
            time.sleep(order.uniform(0.0, PAUSE_S))
            if not kinds:
                kinds = order.sample(list(KINDS), len(KINDS))
            kind = kinds.pop()
            found = self._processes(kind)
            if self._process.poll() is not None or not found:
                break
            step, lines, at = self.steps(), self.lines(), time.monotonic()
            order.choice(found).send_signal(signal.SIGKILL)
            if not self._await_lines(lines + 1):
                break
            soak.kills.append(Kill(kind, step, time.monotonic() - at))
            said = f"kill {len(soak.kills)} of {kills}: {kind} after step {step}"
            say(f"{said}; the next step ended {soak.kills[-1].recovered_s:.1f} s later")
        while self._process.poll() is None:
            time.sleep(1.0)
        self._ensure_success()

    def _await_lines(self, lines: int) -> bool:
        """Waits for a step to end; False: the run has ended before. Raises RunError where the run stands still."""
        end = time.monotonic() + STUCK_S
        while self.lines() < lines:
            if self._process.poll() is not None:
                return False
            if time.monotonic() > end:
                raise RunError(f"the run stands still for {STUCK_S:g} s; its log is {self.log}")
            time.sleep(0.05)
        return True

    def _processes(self, kind: str) -> list[psutil.Process]:
        try:
            supervisor = psutil.Process(self._process.pid)
            if kind == "controller":
                return supervisor.children()
            return [p for p in supervisor.children(recursive=True) if KINDS[kind] in " ".join(_command_line(p))]
        except psutil.NoSuchProcess:
            return []

    def _use(self) -> dict[str, tuple[float, int]]:
        """Memory in MiB and open files of one process of each kind."""
        used = {}
        for kind in KINDS:
            for process in self._processes(kind)[:1]:
                try:
                    used[kind] = process.memory_info().rss / 2**20, process.num_fds()
                except psutil.Error:
                    continue
        return used

    def _ensure_success(self) -> None:
        if self._process.returncode:
            raise RunError(f"the run {self.run.name} ended with {self._process.returncode}; its log is {self.log}")


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def compare(soak: Soak, undisturbed: Path, disturbed: Path) -> None:
    """Counts what the disturbed run has lost, repeated or made otherwise, step by step of its live lineage."""
    stores = TrajectoryStore(undisturbed / "trajectories"), TrajectoryStore(disturbed / "trajectories")
    columns = ["group_uid", "sample_index", "latent_ids", "hard_ids", "reward"]
    for step in range(1, soak.steps + 1):
        expected, found = (store.read(step).select(columns).to_pylist() for store in stores)
        wanted = {(row["group_uid"], row["sample_index"]) for row in expected}
        got = [(row["group_uid"], row["sample_index"]) for row in found]
        soak.lost += len(wanted - set(got))
        soak.duplicated += len(got) - len(set(got))
        soak.different += expected != found
    models = [file_hash(path / "model" / "model.safetensors") for path in (undisturbed, disturbed)]
    soak.same_weights = models[0] == models[1]


def show(soak: Soak) -> None:
    """Prints the result as tables."""
    console = Console(highlight=False)
    table = Table(title=f"{len(soak.kills)} kills in {soak.steps} steps, seed {soak.seed}")
    for name in ("killed", "times", "next step after, s", "at most, s"):
        table.add_column(name, justify="left" if name == "killed" else "right")
    for kind in KINDS:
        if seconds := [kill.recovered_s for kill in soak.kills if kill.kind == kind]:
            table.add_row(kind, str(len(seconds)), f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}")
    console.print(table)
    console.print(
        f"samples lost {soak.lost}, duplicated {soak.duplicated}; steps with other samples {soak.different}; weights "
        f"{'equal bit for bit' if soak.same_weights else 'DIFFERENT'}; {soak.disturbed_s:.0f} s, undisturbed "
        f"{soak.undisturbed_s:.0f} s"
    )
    for name, (early, late) in soak.memory_mib.items():
        files = soak.descriptors[name]
        console.print(f"{name}: {early:.0f} -> {late:.0f} MiB, {files[0]} -> {files[1]} descriptors (undisturbed run)")
