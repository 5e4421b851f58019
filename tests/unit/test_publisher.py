"""What rank 0 holds while it publishes: a few buckets, however the frozen tensors lie among the others."""

import weakref

import pytest
import torch

from latent_grpo.common.fingerprint import fingerprint
from latent_grpo.learner.publication import IN_FLIGHT, Publisher

BUCKET, TENSOR, COUNT = 4000, 400, 400


class Nowhere:
    """A transport that reads what it is given and carries nothing."""

    name = "nowhere"

    def send(self, bucket):
        return [fingerprint(name, tensor) for name, tensor in bucket], None

    def keep(self, handles):
        pass


@pytest.mark.parametrize("frozen", [range(COUNT), range(10, COUNT), range(0, COUNT, 2), ()])
def test_a_publication_holds_a_few_buckets_of_tensors_that_are_made_as_it_goes(frozen):
    alive, most = weakref.WeakSet(), 0

    def made():
        nonlocal most
        for i in range(COUNT):
            tensor = torch.full((TENSOR // 4,), float(i))
            alive.add(storage := tensor.untyped_storage())
            most = max(most, sum(one.nbytes() for one in alive))
            yield str(i), tensor
            del tensor, storage

    publication = Publisher(Nowhere(), BUCKET, {str(i) for i in frozen}).publish(made(), 1)
    buckets = publication.manifest.buckets
    assert most <= (2 * IN_FLIGHT + 4) * BUCKET  # on their way, just sent and still held, open
    assert all(bucket.nbytes <= BUCKET for bucket in buckets)
    assert {slot.name for bucket in buckets if bucket.frozen for slot in bucket.tensors} == set(map(str, frozen))
    assert sorted(int(slot.name) for bucket in buckets for slot in bucket.tensors) == list(range(COUNT))
