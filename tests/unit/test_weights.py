"""Published weights: bytes survive packing, damage is noticed before use, equal weights have equal checksums."""

import pytest
import torch
from weight_buckets import pack

from latent_grpo.common.weights import WeightsCorrupt, checksum, unpack


def tensors():
    torch.manual_seed(0)
    return [
        ("embed", torch.randn(7, 5)),
        ("half", torch.randn(3, 3).to(torch.bfloat16)),
        ("scalar", torch.tensor(2.5)),
        ("ids", torch.arange(9)),
        ("transposed", torch.randn(4, 6).T),
    ]


def through(named, bucket_bytes):
    return [pair for manifest, data in pack(named, bucket_bytes) for pair in unpack(manifest, data)]


@pytest.mark.parametrize("bucket_bytes", [1, 128, 10**6])
def test_weights_come_out_as_they_went_in(bucket_bytes):
    out = through(tensors(), bucket_bytes)
    assert [name for name, _ in out] == [name for name, _ in tensors()]
    for (name, before), (_, after) in zip(tensors(), out, strict=True):
        assert after.dtype == before.dtype, name
        assert after.shape == before.shape, name
        assert torch.equal(after, before), name


def test_the_checksum_depends_on_contents_only():
    expected = checksum(tensors())
    assert checksum(reversed(tensors())) == expected
    assert checksum(through(tensors(), 128)) == expected


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype"])
def test_any_difference_changes_the_checksum(change):
    changed = tensors()
    name, tensor = changed[0]
    changed[0] = {
        "value": (name, torch.nextafter(tensor, torch.tensor(9.0))),
        "name": ("embeds", tensor),
        "shape": (name, tensor.reshape(5, 7)),
        "dtype": (name, tensor.view(torch.int32)),
    }[change]
    assert checksum(changed) != checksum(tensors())


def test_a_transfer_that_was_cut_short_is_refused():
    ((manifest, data),) = pack(tensors(), 10**6)
    with pytest.raises(WeightsCorrupt, match=r"'embed'.*got \d+ of 5 tensors; .*publish again"):
        unpack(manifest, [*data[:-1], data[-1][:-1]])
    with pytest.raises(WeightsCorrupt, match="of 4 tensors"):
        unpack(manifest, data[:-1])


def test_read_only_buffers_of_the_object_store_are_accepted():
    ((manifest, data),) = pack(tensors(), 10**6)
    for part in data:
        part.setflags(write=False)
    assert torch.equal(unpack(manifest, data)[0][1], tensors()[0][1])


def test_buckets_hold_the_limit():
    named = [(str(i), torch.randn(50)) for i in range(20)]  # 200 bytes each
    manifests = [manifest for manifest, _ in pack(named, 1024)]
    assert [len(m.tensors) for m in manifests] == [5] * 4
    assert all(m.nbytes <= 1024 for m in manifests)


def test_a_tensor_larger_than_a_bucket_gets_one_of_its_own():
    named = [("small", torch.zeros(4)), ("large", torch.zeros(1000)), ("last", torch.zeros(4))]
    assert [[s.name for s in m.tensors] for m, _ in pack(named, 1024)] == [["small"], ["large"], ["last"]]


def test_an_empty_tensor_survives():
    ((_, tensor),) = through([("empty", torch.empty(0, 4))], 128)
    assert tensor.shape == (0, 4)
