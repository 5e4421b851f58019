"""The contract of tasks, on generated and stored ones and on a user's; and what it finds in those that break it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from latent_grpo.common.config import ConfigError, TaskConfig
from latent_grpo.common.tasks.sources import BUILTIN, load_task
from latent_grpo.common.testing import check_task
from latent_grpo.common.types import Problem

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("name", sorted(BUILTIN))
@pytest.mark.parametrize("options", [{}, {"size": 5}])
def test_generated_tasks_keep_the_contract(name, options):
    assert len(check_task(f"builtin:{name}", options=options)) == options.get("size", 32)


def test_stored_tasks_keep_the_contract(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{i} + 1?", "answer": i + 1}) + "\n" for i in range(6)))
    assert len(check_task(str(path))) == 6


def test_the_example_keeps_the_contract(importable):
    importable(EXAMPLES / "own_task")
    problems = check_task("python:shopping:Shopping", options={"most": 5})
    assert all(problem.cot.endswith(f"={problem.answer};") for problem in problems)
    assert len(check_task("python:shopping:Shopping", options={"size": 3})) == 3
    assert len(check_task("python:shopping:Shopping", limit=2)) == 2


# --- those that break it


class Counting:
    """A user's task with an end; `fault` says what is wrong with it."""

    def __init__(self, name, seed, split, fault=""):
        if fault == "made":
            raise OSError("no data base")
        self._name, self._split, self._fault = name, split, fault
        self.size = 0 if fault == "size" else 4
        self._last = 0

    def problem(self, index):
        if self._fault == "raises":
            raise KeyError(index)
        if self._fault == "dict":
            return {"problem": "1?"}
        asked = f"{self._split} {index}?" if self._fault != "splits" else f"{index}?"
        if self._fault == "another process":
            asked = f"{self._split} {hash(str(index))}?"
        if self._fault == "order":
            asked = f"{self._split} {index} {'back' if index == self._last - 1 else 'on'}?"
            self._last = index
        if self._fault == "moody":
            asked = f"{random.random()}?"
        return Problem(
            uid=f"{'other' if self._fault == 'uid' else self._name}/{0 if self._fault == 'uids' else index}",
            task="other" if self._fault == "task" else self._name,
            messages=() if self._fault == "messages" else (("user", asked),),
            answer=7 if self._fault == "answer" else str(index),
        )


class NoProblem:
    def __init__(self, name, seed, split):
        pass


def test_a_users_task_may_end():
    assert len(check_task("python:test_task_contract:Counting")) == 4


@pytest.mark.parametrize(
    ("path", "fault", "message"),
    [
        ("python:test_task_contract:Nothing", "", "has no attribute 'Nothing'"),
        ("python:no_such_module:Task", "", "cannot be imported .*No module named 'no_such_module'.*PYTHONPATH"),
        ("python:test_task_contract", "", "no import path; expected package.module:Name"),
        ("python:test_task_contract:NoProblem", "", r"made a NoProblem, which has no method problem\(index\)"),
        (
            "python:test_task_contract:Counting",
            "made",
            "cannot be made with name='t', split='training', seed=0.*no data base",
        ),
        ("python:test_task_contract:Counting", "size", "size must be a positive whole number, or None, got 0"),
        ("python:test_task_contract:Counting", "raises", r"problem\(0\) failed: KeyError"),
        ("python:test_task_contract:Counting", "dict", "is a dict; expected a latent_grpo.common.types.Problem"),
        ("python:test_task_contract:Counting", "uid", "uid is 'other/0'; expected 't/' and a part of its own"),
        ("python:test_task_contract:Counting", "uids", "first 4 problems have the same uid: t/0, t/0"),
        ("python:test_task_contract:Counting", "task", "task is 'other'; expected the task's name 't'"),
        ("python:test_task_contract:Counting", "messages", r"messages is \(\); expected a tuple"),
        ("python:test_task_contract:Counting", "answer", "answer is 7; expected a text that is not empty"),
        ("python:test_task_contract:Counting", "moody", r"problem\(0\) was .* the same index must give the same one"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused_in_a_sentence(path, fault, message):
    with pytest.raises(ConfigError, match=f"task t: .*{message}"):
        load_task(TaskConfig(name="t", path=path, options={"fault": fault} if fault else {}), seed=0)


def test_answers_that_the_verifier_cannot_read_are_refused():
    with pytest.raises(ConfigError, match="verifier 'number' cannot grade against the answer '0'"):
        load_task(
            TaskConfig(name="t", path="python:test_task_contract:Counting", verifier="number"), 0, lambda gold: False
        )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("splits", "4 problem.s. are in both splits"),
        ("another process", "another process makes other problems of the same seed"),
        ("order", "depends on the problems requested before it"),
    ],
)
def test_the_contract_finds_what_a_start_does_not(fault, message):
    with pytest.raises(AssertionError, match=message):
        check_task("python:test_task_contract:Counting", options={"fault": fault})
