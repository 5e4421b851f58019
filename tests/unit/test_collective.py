"""The collective: whoever dies, stands still or comes late breaks its own group alone, and damage is seen."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latent_grpo.common.collective import Asking, CollectiveTransport, LinkLost, finish_within
from latent_grpo.common.config import ConfigError, WeightsConfig
from latent_grpo.common.fingerprint import fingerprint
from latent_grpo.common.shared_memory import BucketGone
from latent_grpo.common.weights import checksum, describe, unpack

BUCKET = [("w", torch.arange(3_000_000.0)), ("b", torch.ones(3, dtype=torch.bfloat16))]  # more than sockets buffer
LIMIT_S = 60.0  # an upper bound for a slow machine
SETTINGS = WeightsConfig(transport="collective", timeout_s=LIMIT_S)


def fetched(transport, handle, found, bucket=BUCKET):
    """The fingerprints of what a worker gets."""
    manifest = describe(bucket, found)
    return [fingerprint(name, tensor) for name, tensor in unpack(manifest, transport.receive(handle, manifest))]


def stands_still(pipe):
    """A worker that asks, stops itself before the bytes have come, and fetches once it goes on."""
    found, handle = pipe.recv()
    broken = Asking(handle).begin(handle.number)
    broken.word()
    os.kill(os.getpid(), signal.SIGSTOP)
    with contextlib.suppress(RuntimeError):
        broken.receive(2**30)
    pipe.send(fetched(CollectiveTransport(), handle, found))


def sends_and_waits(pipe):
    """A learner."""
    transport = CollectiveTransport(SETTINGS)
    pipe.send(transport.send(BUCKET))
    pipe.recv()


@pytest.fixture
def elsewhere():
    """`elsewhere(work)`: a process that does `work(pipe)`, and this end of its pipe."""
    processes = multiprocessing.get_context("forkserver")  # a fork of this process would have threads' locks, held
    processes.set_forkserver_preload(["latent_grpo.common.collective"])
    started = []

    def start(work):
        here, there = multiprocessing.Pipe()
        started.append(processes.Process(target=work, args=(there,), daemon=True))
        started[-1].start()
        return started[-1], here

    yield start
    for process in started:
        process.kill()
        process.join()


def serving(process):
    """Whether this process, as rank 0, has a group with another one."""
    return any(f"-{process.pid}-" in thread.name for thread in threading.enumerate())


def wait_until(condition):
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def stopped(process):
    return Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "T"


def test_a_worker_that_stands_still_in_mid_bucket_holds_up_nobody_and_asks_again_when_it_goes_on(elsewhere):
    process, pipe = elsewhere(stands_still)
    sender = CollectiveTransport(WeightsConfig(timeout_s=2))
    found, handle = sender.send(BUCKET)
    pipe.send((found, handle))
    wait_until(lambda: stopped(process))
    assert fetched(CollectiveTransport(), handle, found) == found  # another worker
    wait_until(lambda: not serving(process))  # its deadline is over: rank 0 has given its group up
    sender.keep([handle])
    sender.send([("w", torch.zeros(7))])  # the learner goes on
    os.kill(process.pid, signal.SIGCONT)
    assert pipe.poll(LIMIT_S)
    assert pipe.recv() == found


def test_a_worker_that_is_killed_in_mid_bucket_breaks_its_own_group_alone(elsewhere, caplog):
    process, pipe = elsewhere(stands_still)
    sender, well = CollectiveTransport(SETTINGS), CollectiveTransport()
    found, handle = sender.send(BUCKET)
    assert fetched(well, handle, found) == found
    pipe.send((found, handle))
    wait_until(lambda: stopped(process))
    process.kill()
    wait_until(lambda: not serving(process))  # long before the deadline
    assert f"-{process.pid}-" in caplog.text
    assert len(sender.sender.serving) == 1, "nothing of it is kept"
    assert fetched(well, handle, found) == found


def test_a_learner_that_is_dead_is_said_with_what_to_do(elsewhere):
    process, pipe = elsewhere(sends_and_waits)
    assert pipe.poll(LIMIT_S)
    found, handle = pipe.recv()
    worker = CollectiveTransport(pauses_s=(0.1, 0.1, 0.1))
    assert fetched(worker, handle, found) == found
    process.kill()
    process.join()
    with pytest.raises(LinkLost, match=r"did not send .* bytes in 4 attempts.*weights.interface"):
        fetched(worker, replace(handle, timeout_s=0.5), found)


def test_a_sender_that_nobody_holds_ends_its_threads_though_one_is_in_mid_bucket_and_frees_its_memory():
    others = set(threading.enumerate())
    transport = CollectiveTransport(WeightsConfig(timeout_s=1))
    found, handle = transport.send(BUCKET)
    well, still = CollectiveTransport(), Asking(handle)
    assert fetched(well, handle, found) == found
    still.begin(handle.number).word()  # the bytes are on their way
    threads = set(threading.enumerate()) - others
    buffer = weakref.ref(transport.sender.offered[handle.number])
    assert len(threads) == 3
    del transport
    assert not threads & set(threading.enumerate())
    assert buffer() is None


def test_a_bucket_that_was_damaged_on_its_way_has_another_checksum():
    sender = CollectiveTransport(SETTINGS)
    found, handle = sender.send(BUCKET)
    sender.sender.offered[handle.number][12_345] ^= 1
    manifest = describe(BUCKET, found)
    arrived = unpack(manifest, CollectiveTransport().receive(handle, manifest))
    assert checksum(arrived) != checksum(BUCKET)
    assert [name for (name, tensor), mark in zip(arrived, found, strict=True) if fingerprint(name, tensor) != mark] == [
        "w"
    ]


def test_a_bucket_that_nobody_may_ask_for_is_gone_and_its_memory_is_written_again():
    sender, worker = CollectiveTransport(SETTINGS), CollectiveTransport()
    found, first = sender.send(BUCKET)
    place = sender.sender.offered[first.number].data_ptr()
    sender.keep([])
    with pytest.raises(BucketGone, match="bucket 0 is not kept any more"):
        fetched(worker, first, found)
    found, second = sender.send(BUCKET)
    assert sender.sender.offered[second.number].data_ptr() == place
    assert fetched(worker, second, found) == found, "the group lives on"


def test_a_bucket_of_another_size_than_its_manifest_says_is_refused_and_the_next_one_is_whole():
    sender, worker = CollectiveTransport(SETTINGS), CollectiveTransport(pauses_s=(0.0,))
    found, handle = sender.send(BUCKET)
    wrong = [("w", torch.zeros(7))]
    with pytest.raises(LinkLost, match="bucket 0 has 12000064 bytes, expected 64"):
        worker.receive(handle, describe(wrong, ["?"]))
    assert fetched(worker, handle, found) == found


def test_a_call_that_never_returns_has_a_deadline_and_errors_are_those_of_the_call():
    over = threading.Event()
    with pytest.raises(TimeoutError):
        finish_within(0.01, over.wait)
    over.set()
    with pytest.raises(ZeroDivisionError):
        finish_within(LIMIT_S, lambda: 1 / 0)
    finish_within(LIMIT_S, lambda: None)


def test_several_threads_of_a_worker_fetch_several_publications():
    sender, worker = CollectiveTransport(SETTINGS), CollectiveTransport()
    sent = [([("w", torch.full((300_000,), float(i)))]) for i in range(6)]
    handles = [sender.send(bucket) for bucket in sent]
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: fetched(worker, handles[i][1], handles[i][0], sent[i])}))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert results == {i: handles[i][0] for i in range(6)}


def test_an_interface_that_the_node_does_not_have_is_refused_at_either_end():
    with pytest.raises(ConfigError, match=r"weights\.interface eth77"):
        CollectiveTransport(WeightsConfig(interface="eth77")).send(BUCKET)
    sender = CollectiveTransport(WeightsConfig(interface="lo"))
    found, handle = sender.send(BUCKET)
    assert handle.address == "127.0.0.1"
    assert fetched(CollectiveTransport(), handle, found) == found
