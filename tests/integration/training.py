"""A tiny run for tests: random weights, rewards that depend on the text alone, so that every step has signal."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib

from latent_grpo.common.config import load_config
from latent_grpo.reward.verifier import Grade


class Parity:
    """Reward 1 for half of all texts; stands for a task with signal, whatever the model says."""

    def grade(self, response_text: str, gold: str) -> Grade:
        good = zlib.crc32(response_text.encode()) % 2
        return Grade(reward=float(good), reason="correct" if good else "wrong", parsed=response_text[:10])


class SecretSink:
    """Writes the hash of a variable that only the job has, to prove that it arrived."""

    def __init__(self, folder):
        (folder / "secret").write_text(hashlib.sha256(os.environ["JOB_SECRET"].encode()).hexdigest())

    def write(self, step, values):
        pass

    def close(self):
        pass


class HangingSink:
    """Does not come back from step 3 of a run's first attempt, as a network's file system may."""

    def __init__(self, folder):
        self.mark = folder.parent / "hung"

    def write(self, step, values):
        if step == 3 and not self.mark.exists():
            self.mark.touch()
            threading.Event().wait()

    def close(self):
        pass


TASK = {
    "name": "chains", "path": "builtin:chain_arithmetic", "verifier": "training:Parity",
    "max_prompt_tokens": 10, "max_response_tokens": 22,
}  # fmt: skip
PROFILE = {
    "steps": 3, "k": 3, "group_size": 4, "prompts_per_step": 4, "minibatch_prompts": 2, "noise": {"scale": 1.0},
    "temperature": 1.0, "masking": "off", "optimizer": {"lr": 1e-3},
    "model": {
        "new": {
            "hidden_size": 32, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "max_positions": 32,
        }
    },
    "tasks": [{**TASK, "options": {"operations": 2}}],
    "rollout": {"workers": 1, "resources": {"num_cpus": 0.25}},
    "learner": {"resources": {"num_cpus": 0.25}},
    "evaluation": {
        "runs": 1,
        "tasks": [{**TASK, "name": "held-out", "options": {"operations": 2, "split": "evaluation", "size": 8}}],
    },
    "checkpoint": {"every": 1}, "metrics": {"sinks": []},
    "deadlines": {"start_s": 300, "rollout_s": 300, "learner_s": 300, "weights_s": 300},
}  # fmt: skip
# epochs of ten problems: a run of three steps and its resumption cross from one to the next
COMMON = ("deterministic=true", "tasks.0.options.size=10")
WHOLE = (*COMMON, "steps=6", "evaluation.every=4", "dump.evaluation=true")


def tiny(*overrides):
    """The run's settings with dotted overrides."""
    return load_config(PROFILE, list(overrides))
