"""A controller whose main thread stands still, or whose Ray does not start in a recovery, is started again."""

import subprocess
import sys
import threading

from latent_grpo.common import main_loop
from latent_grpo.common.interrupts import check_interrupt
from latent_grpo.common.seen_time import SeenTime
from latent_grpo.deploy.run.link import BEAT_S, Standstill

PROGRAM = """
import json, sys, time
from pathlib import Path
from latent_grpo.deploy.run import link
from latent_grpo.deploy.supervisor import supervise

folder = Path(__file__).parent
if not link.supervised():
    sys.exit(supervise([], print))
link.connect()
link.tell(run=str(folder))
link.expect_progress(1.0)
if link.recovery_here(folder) is None:
    time.sleep(600)  # as a sink that does not come back
link.tell(ended=7)
sys.exit(7)
"""


def test_a_main_thread_that_hangs_is_started_again_with_its_stacks_in_the_log(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "run.json").write_text('{"lineage": 0}')
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 7, done.stderr
    assert "the run's controller did nothing but one thing for " in done.stdout
    assert "it starts again from the last checkpoint" in done.stdout
    assert f'File "{program}", line 14 in <module>' in done.stderr


AGAIN = """
import os, signal, sys
from pathlib import Path
from latent_grpo.common.errors import RayLost
from latent_grpo.deploy.run import link
from latent_grpo.deploy.run.machine import check_machine
from latent_grpo.deploy.run.ray_session import start_errors
from latent_grpo.deploy.supervisor import supervise

folder = Path(__file__).parent
if not link.supervised():
    sys.exit(supervise([], print))
link.connect()
link.tell(run=str(folder))
attempt = folder / "attempts"
with attempt.open("a") as file:
    file.write(".")
if attempt.stat().st_size == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    with start_errors("its folder"):
        if attempt.stat().st_size == 2:
            raise TimeoutError("the machine is too busy")
    if attempt.stat().st_size == 3:
        os.environ["RAY_ADDRESS"] = "127.0.0.1:9"
        check_machine(0.5)
except RayLost as error:
    link.tell(crashed=f"has lost its Ray: {error}")
    sys.exit(1)
link.tell(ended=0)
"""


def test_a_recovery_whose_ray_does_not_start_is_tried_again(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "run.json").write_text('{"lineage": 0}')
    program = tmp_path / "program.py"
    program.write_text(AGAIN)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert "was killed by SIGKILL; it starts again" in first
    assert "Ray cannot start (its folder): TimeoutError: the machine is too busy; it starts again" in second
    assert "no Ray head answers at RAY_ADDRESS=127.0.0.1:9" in third


class Hand:
    now = 0.0

    def __call__(self):
        return self.now


def test_what_passes_its_waits_never_stands_still_and_a_pause_of_the_process_does_not_count():
    hand = Hand()
    still = Standstill(SeenTime(hand))
    for count in (5, 6, 6, 6):
        hand.now += BEAT_S
        seconds = still.look(count, BEAT_S)
    assert seconds == 2 * BEAT_S
    hand.now += 3600  # Ctrl-Z
    assert still.look(6, BEAT_S) == 3 * BEAT_S + 1
    assert still.look(7, BEAT_S) == 0


def test_waits_of_the_main_thread_count_and_those_of_others_do_not():
    before = main_loop.count()
    check_interrupt()
    SeenTime().look()
    assert main_loop.count() == before + 2
    other = threading.Thread(target=check_interrupt)
    other.start()
    other.join()
    assert main_loop.count() == before + 2
