"""Shared memory for weights: whoever is killed, what is mapped stays, what is gone is said, and nothing is left."""

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from latent_grpo.common.errors import ConfigError
from latent_grpo.common.shared_memory import BucketGone, SharedMemoryTransport
from latent_grpo.common.weights import describe

BUCKET = [("a", torch.arange(3000.0)), ("b", torch.ones(3, dtype=torch.bfloat16))]


def bytes_of(transport, handle, found):
    return transport.receive(handle, describe(BUCKET, found))


def learner(pipe):
    transport = SharedMemoryTransport()
    pipe.send(transport.send(BUCKET))
    pipe.recv()  # until it is killed


@pytest.fixture
def elsewhere():
    """A process that has sent the bucket: its process and what it has sent."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=learner, args=(there,), daemon=True)
    process.start()
    assert here.poll(60)
    yield process, here.recv()
    process.kill()
    process.join()


def test_a_worker_keeps_what_it_has_mapped_when_the_learner_is_killed_and_nothing_is_left(elsewhere):
    before = set(os.listdir("/dev/shm"))
    process, (found, handle) = elsewhere
    data = bytes_of(SharedMemoryTransport(), handle, found)
    process.kill()
    process.join()
    assert np.array_equal(data[0].view(np.float32), np.arange(3000.0, dtype=np.float32))
    with pytest.raises(BucketGone, match="the learner that held them has ended"):
        bytes_of(SharedMemoryTransport(), handle, found)
    assert set(os.listdir("/dev/shm")) <= before


def test_a_descriptor_with_the_same_number_is_not_taken_for_the_bucket(elsewhere):
    _, (found, handle) = elsewhere
    with pytest.raises(BucketGone):
        bytes_of(SharedMemoryTransport(), replace(handle, token="0" * 16), found)


def test_a_worker_on_another_machine_is_told_what_to_set(elsewhere):
    _, (found, handle) = elsewhere
    with pytest.raises(ConfigError, match=r"another machine.*object_store"):
        bytes_of(SharedMemoryTransport(), replace(handle, machine="other"), found)


def test_memory_is_written_again_once_nobody_has_it_or_may_ask_for_it():
    transport, worker = SharedMemoryTransport(), SharedMemoryTransport()
    found, first = transport.send(BUCKET)
    data = bytes_of(worker, first, found)
    transport.keep([])
    assert transport.send(BUCKET)[1] != first, "it is mapped"
    del data
    transport.keep([first])  # what is not asked for, and was free before, goes to the system
    _, second = transport.send(BUCKET)
    transport.keep([])
    assert transport.send(BUCKET)[1] == second


def test_memory_that_nobody_takes_again_is_given_back():
    transport = SharedMemoryTransport()
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    for _ in range(5):
        transport.send(BUCKET)
        transport.keep([])
    transport.keep([])
    transport.keep([])
    assert len(list(descriptors.iterdir())) == before
