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
from latent_grpo.common.transport import choose_transport
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


@pytest.mark.parametrize(
    ("wanted", "nodes", "may_grow", "chosen", "reason"),
    [
        ("auto", 1, False, "shared_memory", "share this machine"),
        ("auto", 2, True, "object_store", "Ray has 2 nodes"),
        ("auto", 1, True, "object_store", "nodes may join"),
        ("object_store", 1, False, "object_store", "weights.transport"),
        ("shared_memory", 1, True, "shared_memory", "weights.transport"),
    ],
)
def test_the_choice_says_its_reason(wanted, nodes, may_grow, chosen, reason):
    choice = choose_transport(wanted, nodes, may_grow=may_grow)
    assert choice.name == chosen
    assert reason in choice.sentence


def test_shared_memory_on_several_nodes_is_refused_where_it_is_named():
    with pytest.raises(ConfigError, match=r"Ray has 3 nodes.*auto or object_store"):
        choose_transport("shared_memory", 3, may_grow=True)
