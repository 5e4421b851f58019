"""The contracts of tasks and metric sinks, as functions for a test suite.

def test_my_task() -> None:
    check_task("python:my_package.my_module:MyTask", options={"longest": 4})

def test_my_sink(tmp_path: Path) -> None:
    check_sink("my_package.my_module:MySink", tmp_path)
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_grpo.common.config import TaskConfig
from latent_grpo.common.sinks import MetricSink, make_sink
from latent_grpo.common.tasks.sources import TaskSource, is_generated, load_task
from latent_grpo.common.types import Problem

_PROGRAM = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from latent_grpo.common.testing import _print_digest; _print_digest(*sys.argv[2:])"
)
_PROCESS_S = 120


def check_task(
    path: str, *, options: Mapping[str, Any] | None = None, seed: int = 0, count: int = 32, **settings: Any
) -> list[Problem]:
    """Loads a task as a run does and asserts its contract on its first `count` problems, which it returns.

    `path`, `options` and further `settings` are those of a run's `tasks`. The contract: a problem has a uid that no
    other one has, a message of the user and an answer; the same index is the same problem whenever it is asked, in
    whatever order, and in another process too; an index beyond a size is an IndexError; of a generated task the split
    `evaluation` asks nothing that `training` does. Raises AssertionError with the problem, and what `load_task` raises
    for a task that cannot be used.
    """
    config = TaskConfig(name="task", path=path, options=dict(options or {}), **settings)
    source = load_task(config, seed)
    count = count if source.size is None else min(count, source.size)
    problems = [source.problem(index) for index in range(count)]
    for index, problem in enumerate(problems):
        assert problem.task == "task", f"problem({index}) is of task {problem.task!r}, not of 'task'"
        assert problem.answer.strip(), f"problem({index}) has no answer: {problem}"
        asked = [text for role, text in problem.messages if role == "user" and text.strip()]
        assert asked, f"problem({index}) asks nothing: {problem}"
    uids = [problem.uid for problem in problems]
    assert len(set(uids)) == count, f"some problems have the same uid: {', '.join(sorted(uids))}"
    fresh = load_task(config, seed)
    for index in reversed(range(count)):
        assert fresh.problem(index) == problems[index], f"problem({index}) depends on the problems requested before it"
    if source.size is not None:
        try:
            beyond = source.problem(source.size)
        except IndexError:
            pass
        else:
            raise AssertionError(f"the task has {source.size} problems, and yet problem({source.size}): {beyond}")
    if is_generated(config):
        splits = [_asked(config, seed, count, split) for split in ("training", "evaluation")]
        both = set(splits[0]) & set(splits[1])
        assert not both, f"{len(both)} problem(s) are in both splits, for example {min(both)}"
    arguments = [json.dumps(sys.path), config.model_dump_json(exclude_unset=True), str(seed), str(count)]
    there = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        timeout=_PROCESS_S,
    )
    assert there.returncode == 0, f"the task cannot be loaded in another process:\n{there.stderr}"
    assert there.stdout.strip() == _digest(source, count), (
        "another process makes other problems of the same seed; draw them from an own random.Random(text), not from "
        "hash() or global random state"
    )
    return problems


def _asked(config: TaskConfig, seed: int, count: int, split: str) -> list[tuple[tuple[str, str], ...]]:
    source = load_task(config.model_copy(update={"options": {**config.options, "split": split}}), seed)
    return [source.problem(index).messages for index in range(min(count, source.size or count))]


def _digest(source: TaskSource, count: int) -> str:
    return hashlib.sha256("".join(repr(source.problem(i)) for i in range(count)).encode()).hexdigest()


def _print_digest(config: str, seed: str, count: str) -> None:
    source = load_task(TaskConfig.model_validate_json(config), int(seed))
    print(_digest(source, int(count)))


def check_sink(name: str, run_folder: str | Path) -> None:
    """Uses a metric sink as a run does, and asserts its contract: it accepts what a run writes.

    The contract: it is made with the run's folder alone; it takes names that it has not seen before, steps without
    any value, and after a resume steps that it had before; it leaves the values as they are; it can be closed. What
    it shows is for your own assertions. Raises AssertionError, or whatever the sink raises.
    """
    folder = Path(run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    for steps in ((1, 2, 3), (3, 4)):  # a run, and one that resumed it from step 2
        sink = make_sink(name, folder)
        assert isinstance(sink, MetricSink), f"{name} made a {type(sink).__name__} without write and close"
        for step in steps:
            values = {
                "rollout/reward": 0.25,
                "learner/loss": -1.5e-7,
                **({f"new/metric_{step}": 1e30} if step > 1 else {}),
            }
            given = dict(values)
            sink.write(step, values)
            assert values == given, f"{name} changed the values that it was given"
        sink.write(steps[-1], {"evaluation/pass_at_1": 0.5})
        sink.write(steps[-1] + 1, {})
        sink.close()
