"""Ray's spilling is seen, and said once."""

import subprocess
import sys
import time

import full_store
import numpy as np
import pytest

from latent_grpo.deploy.run.object_store import spill_watch, spilled_bytes

pytestmark = pytest.mark.integration
MIB = 2**20


def test_spilling_is_said_once_with_what_to_set(ray_session):
    said = []
    with spill_watch(said.append, "raise the key", every_s=0.2):
        few = [ray_session.put(np.zeros(32 * MIB, np.uint8)) for _ in range(3)]
        time.sleep(1)
        assert said == [], "all of it fits"
        before = spilled_bytes()
        many = [ray_session.put(np.zeros(32 * MIB, np.uint8)) for _ in range(12)]  # the store has 256 MiB
        end = time.monotonic() + 120
        while not said and time.monotonic() < end:
            time.sleep(0.2)
        many += [ray_session.put(np.zeros(32 * MIB, np.uint8)) for _ in range(4)]
        time.sleep(1)
    del few, many
    assert len(said) == 1
    assert "raise the key" in said[0]
    assert spilled_bytes() > before


@pytest.mark.slow  # with a Ray of its own, which takes its disk for full
def test_a_full_object_store_on_a_full_disk_is_one_sentence_that_says_what_to_do(environment):
    program = [sys.executable, full_store.__file__]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
    fits, full = ended.stdout.strip().splitlines()
    assert fits == "2 fit", ended.stderr
    assert full.startswith("RunError: Ray's object store on this node is full, and so is the disk that it spills to")
    assert "ray.object_store_bytes" in full
