"""A local Ray that needs longer than Ray allows is started again, and a head that no longer answers is noticed."""

import subprocess
import sys
import threading
import time

import pytest

from latent_grpo.common.config import ConfigError
from latent_grpo.common.seen_time import SeenTime
from latent_grpo.deploy.run.head_watch import head_watch
from latent_grpo.deploy.run.local_ray import given_up, started_within
from latent_grpo.deploy.run.ray_session import start_errors

LIMIT_S = 100.0


class Starts:
    """A machine on which so many attempts fail after `attempt_s`; `lived`: what they had started was only slow."""

    def __init__(self, failures, *, lived=True, attempt_s=31.0, error=None):
        self.failures, self.lived, self.attempt_s = failures, lived, attempt_s
        self.error = error or RuntimeError("The current node timed out during startup")
        self.now, self.attempts, self.said = 0.0, 0, []

    def attempt(self):
        self.attempts += 1
        if self.attempts <= self.failures:
            self.now += self.attempt_s
            raise self.error

    def run(self):
        started_within(LIMIT_S, self.attempt, lambda: self.lived, self.said.append, lambda: self.now)


def test_a_ray_that_comes_up_at_once_says_nothing():
    machine = Starts(0)
    machine.run()
    assert (machine.attempts, machine.said) == (1, [])


def test_a_ray_that_is_slow_is_started_again_and_each_time_that_is_said():
    machine = Starts(3)
    machine.run()
    assert machine.attempts == 4
    assert len(machine.said) == 3
    assert "not come up within 31 s" in machine.said[0]
    assert "at most 69 s more (deadlines.start_s)" in machine.said[0]


def test_a_ray_that_stays_slow_ends_with_one_line_that_names_the_deadline():
    machine = Starts(100)
    with pytest.raises(ConfigError) as refused, start_errors("its folder /x, below TMPDIR"):
        machine.run()
    assert machine.attempts == 4
    assert "did not come up within 124 s, in 4 attempt(s) (deadlines.start_s = 100)" in str(refused.value)
    assert "too busy" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_ray_whose_processes_died_late_gets_one_more_attempt():
    machine = Starts(1, lived=False)
    machine.run()
    assert (machine.attempts, len(machine.said)) == (2, 1)
    machine = Starts(2, lived=False)
    with pytest.raises(RuntimeError, match="timed out during startup"):
        machine.run()
    assert machine.attempts == 2


@pytest.mark.parametrize(
    "machine", [Starts(1, attempt_s=2.0), Starts(1, error=ConfigError("lower ray.object_store_bytes"))]
)
def test_what_another_attempt_would_not_change_is_said_at_once(machine):
    with pytest.raises(type(machine.error), match=str(machine.error)):
        machine.run()
    assert (machine.attempts, machine.said) == (1, [])


@pytest.mark.parametrize(("names", "lived"), [(["gcs_server", "raylet"], True), (["raylet"], False)])
def test_what_an_attempt_has_left_is_ended_and_its_files_do_not_hinder_the_next_one(tmp_path, names, lived):
    folder, left = tmp_path / "lg-attempt", []
    folder.mkdir()
    (folder / "gcs.log").write_text("slow")
    for name in names:
        (tmp_path / name).symlink_to(sys.executable)  # a process is called as what was started
        left.append(subprocess.Popen([tmp_path / name, "-c", "import time; time.sleep(600)", folder]))
    assert given_up(str(folder)) is lived
    for process in left:
        process.wait(10)
    assert (folder / "gcs.log").read_text() == "slow"


class Head:
    """A head that answers as the list says, then as its last entry; each answer takes two seconds of its clock."""

    def __init__(self, *answers):
        self.answers, self.said, self.over = answers, [], threading.Event()
        self.asked = 0

    def answer(self, address, limit_s):
        self.asked += 1
        if self.asked > len(self.answers) + 1:
            self.over.set()
        return self.answers[min(self.asked, len(self.answers)) - 1]

    def say(self, line):
        self.said.append(line)
        self.over.set()

    def watched(self):
        clock = SeenTime(lambda: 2.0 * self.asked)
        with head_watch("head:6379", 20.0, self.say, self.answer, every_s=0.001, clock=clock):
            assert self.over.wait(60)
        return self.said


def test_a_head_that_no_longer_answers_is_said_once():
    (line,) = Head(True, True, *[False] * 10).watched()
    assert "Ray's head (the GCS at head:6379) has not answered for 20 s (deadlines.driver_s = 20)" in line


def test_one_late_answer_is_no_fault_however_short_the_limit():
    head = Head(True, *[False] * 4)
    with head_watch("head:6379", 0.0, head.say, head.answer, every_s=0.001, clock=SeenTime(lambda: 2.0 * head.asked)):
        assert head.over.wait(60)
    assert head.asked >= 4


def test_a_head_that_answers_late_now_and_then_is_no_fault():
    assert Head(*[True, *[False] * 9] * 5, True).watched() == []


def test_a_watch_that_breaks_says_so_and_the_run_goes_on(caplog):
    def answers(address, limit_s):
        raise OSError("no descriptors left")

    end = time.monotonic() + 60
    with head_watch("head:6379", 20.0, print, answers, every_s=0.001):
        while "the watch over Ray's head has ended: OSError: no descriptors left" not in caplog.text:
            assert time.monotonic() < end
            time.sleep(0.01)
