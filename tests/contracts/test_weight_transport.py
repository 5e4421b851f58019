"""What every transport of weights promises: the same bytes arrive, later changes do not, and damage is seen."""

import pickle

import pytest
import torch

from latent_grpo.common.config import WeightsConfig
from latent_grpo.common.fingerprint import fingerprint
from latent_grpo.common.transport import TRANSPORTS, WeightReceiver
from latent_grpo.common.weights import describe, unpack
from latent_grpo.learner.publication import Publisher

pytestmark = pytest.mark.integration
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64, torch.bool]


def made(name):
    return TRANSPORTS[name](WeightsConfig())


@pytest.fixture(params=sorted(TRANSPORTS))
def transport(request):
    if request.param == "object_store":
        request.getfixturevalue("ray_session")
    return made(request.param)


def tensors():
    torch.manual_seed(0)
    typed = [(str(dtype), torch.randint(0, 2, (3, 5)).to(dtype)) for dtype in DTYPES]
    return [
        *typed, ("large", torch.randn(300_000)), ("empty", torch.empty(0, 4)), ("scalar", torch.tensor(2.5)),
        ("transposed", torch.randn(4, 6).T),
    ]  # fmt: skip


def test_what_is_received_is_what_was_sent_when_it_was_sent(transport):
    bucket = tensors()
    found, handle = transport.send(bucket)
    assert found == [fingerprint(name, tensor) for name, tensor in bucket]
    manifest = describe(bucket, found)
    for _, tensor in bucket:
        tensor.zero_()  # the next step goes on
    received = made(transport.name).receive(pickle.loads(pickle.dumps(handle)), manifest)
    assert not any(data.flags.writeable for data in received if len(data))
    assert [fingerprint(name, tensor) for name, tensor in unpack(manifest, received)] == found
    for (name, before), (_, after) in zip(tensors(), unpack(manifest, received), strict=True):
        assert after.dtype == before.dtype, name
        assert torch.equal(after, before), name


def test_a_bucket_that_may_be_asked_for_keeps_its_bytes_while_others_are_sent(transport):
    kept, handle = transport.send([("w", torch.ones(5000))])
    for value in range(4):
        transport.keep([handle])
        transport.send([("w", torch.full((5000,), float(value)))])
    manifest = describe([("w", torch.ones(5000))], kept)
    assert torch.equal(unpack(manifest, transport.receive(handle, manifest))[0][1], torch.ones(5000))


def test_what_a_worker_has_taken_keeps_its_bytes_though_nobody_may_ask_for_it_any_more(transport):
    bucket = [("w", torch.ones(5000))]
    found, handle = transport.send(bucket)
    manifest = describe(bucket, found)
    ((_, taken),) = unpack(manifest, made(transport.name).receive(handle, manifest))
    del handle
    for value in range(4):
        transport.keep([])
        transport.send([("w", torch.full((5000,), float(value)))])
    assert torch.equal(taken, torch.ones(5000))


def test_frozen_weights_travel_once_and_a_worker_that_joins_later_gets_all(transport):
    publisher = Publisher(transport, 4096, frozen={"embed", "norm"})
    weights = {"embed": torch.randn(5000), "w": torch.zeros(7), "norm": torch.ones(3)}
    first = publisher.publish(weights.items(), 1)
    early = WeightReceiver()
    before = early.receive(first.manifest, first.buckets)
    second = publisher.publish([("w", torch.ones(7))], 2, kept=first.buckets)
    frozen = {bucket.fingerprint for bucket in second.manifest.buckets if bucket.frozen}
    assert frozen == {bucket.fingerprint for bucket in first.manifest.buckets if bucket.frozen}
    assert {slot.name for bucket in second.manifest.buckets if bucket.frozen for slot in bucket.tensors} == {
        "embed", "norm"
    }  # fmt: skip
    expected = {"embed": weights["embed"], "norm": weights["norm"], "w": torch.ones(7)}
    for receiver in (early, WeightReceiver()):
        data = receiver.receive(second.manifest, second.buckets)
        pairs = zip(second.manifest.buckets, data, strict=True)
        found = {name: tensor for bucket, part in pairs for name, tensor in unpack(bucket, part)}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = early.receive(second.manifest, second.buckets)
    held = [data for bucket, data in zip(first.manifest.buckets, before, strict=True) if bucket.frozen]
    assert all(any(data is one for one in again) for data in held), "what the worker holds was fetched again"
    assert first.manifest.version.checksum != second.manifest.version.checksum
