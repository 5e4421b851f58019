"""Workers without a model, whose pace and faults a test decides through files; importable in the pool's actors."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latent_grpo.common.types import PolicyVersion, Trajectory
from latent_grpo.reward.pool import VerifierPool
from latent_grpo.rollout_workers.worker import RolloutWorker


class ScriptedEngine:
    """Finishes one group a step of `step_s` seconds, while the file `hold` is not there."""

    name = "scripted"

    def __init__(self, hold, step_s):
        self.version, self.groups, self._hold, self._step_s = PolicyVersion(version=0, checksum=""), [], hold, step_s

    @property
    def pending(self):
        return sum(len(group.sample_indices) for group in self.groups)

    def add(self, request):
        self.groups.append(request)

    def step(self):
        time.sleep(self._step_s)
        return [] if self._hold.exists() else [self._trajectories(self.groups.pop(0))]

    def _trajectories(self, request):
        version = self.version.version
        return tuple(
            Trajectory(
                purpose=request.purpose, task=request.task, problem_uid=request.problem_uid,
                group_uid=request.group_uid, sample_index=i, epoch=0, run_seed=0, policy_version_min=version,
                policy_version_max=version, engine=self.name, sampling=request.sampling, prompt_ids=request.prompt_ids,
                gold_answer=request.gold_answer, latent_ids=np.zeros((0, 2), np.int32),
                latent_scores=np.zeros((0, 2), np.float32), latent_log_probs=np.zeros((0, 2), np.float32),
                hard_ids=np.array([i], np.int32), hard_log_probs=np.zeros(1, np.float32), finish_reason="stop",
            )
            for i in request.sample_indices
        )  # fmt: skip

    def load_weights(self, version, tensors, unchanged=()):
        self.version = version

    def close(self):
        pass


@dataclass(frozen=True)
class Script:
    """A factory of workers. `folder` holds the files: `hold` stops all engines; the worker of a name does not start
    while `hold-NAME` is there, and then makes `held-NAME`; `fault-NAME` is what it raises instead."""

    folder: Path
    step_s: float = 0.02

    def __call__(self, name):
        while (self.folder / f"hold-{name}").exists():
            (self.folder / f"held-{name}").touch()
            time.sleep(0.02)
        if (fault := self.folder / f"fault-{name}").exists():
            raise OSError(fault.read_text())
        engine = ScriptedEngine(self.folder / "hold", self.step_s)
        return RolloutWorker(name, engine, VerifierPool(processes=1), lambda ids, reason: str(ids), k=2, run_id="run")


@dataclass(frozen=True)
class Ending:
    """A factory whose process ends: at once (`exit`), or as a package does that gives up (`sys.exit`)."""

    fault: str

    def __call__(self, name):
        os._exit(3) if self.fault == "exit" else sys.exit("no licence")


class Unloadable:
    """A factory that a worker cannot load."""

    def __reduce__(self):
        return _missing, ()


def _missing():
    raise ImportError("libfoo.so is missing")
