"""Weights from one GPU to another by NCCL, which needs two; a CPU tries the same with gloo."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest
import torch

from latent_grpo.common.collective import CollectiveTransport
from latent_grpo.common.config import WeightsConfig
from latent_grpo.common.fingerprint import fingerprint
from latent_grpo.common.transport import WeightReceiver
from latent_grpo.common.types import PolicyVersion
from latent_grpo.common.weights import WeightManifest, describe, unpack

pytestmark = [pytest.mark.gpu, pytest.mark.integration]
VERSIONS = 3
LIMIT_S = 120.0


def work(pipe, device):
    """A worker: answers each bucket with the devices and fingerprints of what has reached it."""
    if device == "cuda":
        torch.cuda.set_device(1)
    transport = CollectiveTransport()
    for _ in range(VERSIONS):
        handle, manifest = pipe.recv()
        tensors = unpack(manifest, transport.receive(handle, manifest))
        pipe.send([(tensor.device.type, fingerprint(name, tensor)) for name, tensor in tensors])
    frozen = replace(manifest, frozen=True)
    policy = PolicyVersion(version=0, checksum="")
    publication = WeightManifest(version=policy, buckets=(frozen,), transport="collective")
    (kept,) = WeightReceiver().receive(publication, [handle])
    pipe.send([(tensor.device.type, fingerprint(name, tensor)) for name, tensor in unpack(frozen, kept)])


def test_what_reaches_a_worker_is_what_was_sent_and_stays_on_the_device():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL refuses two processes on one GPU; this machine has one")
    here, there = multiprocessing.Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=work, args=(there, device), daemon=True)
    worker.start()
    try:
        sender = CollectiveTransport(WeightsConfig(backend="nccl" if device == "cuda" else "gloo"))
        for version in range(VERSIONS):
            bucket = [
                ("w", torch.full((3_000_000,), float(version), dtype=torch.bfloat16, device=device)),
                ("norm", torch.randn(7, device=device)),
            ]
            found, handle = sender.send(bucket)
            here.send((handle, describe(bucket, found)))
            assert here.poll(LIMIT_S)
            assert here.recv() == [(device, mark) for mark in found]
            sender.keep([handle])
        assert here.poll(LIMIT_S)
        assert here.recv() == [("cpu", mark) for mark in found], "frozen weights are kept on the host"
    finally:
        worker.kill()
        worker.join()
