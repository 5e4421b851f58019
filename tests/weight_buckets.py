"""Publications for tests, and the tensors of one."""

from latent_grpo.common.fingerprint import fingerprint
from latent_grpo.common.transport import receive
from latent_grpo.common.weights import describe, in_buckets, tensor_bytes, unpack


def pack(tensors, bucket_bytes):
    """Yields the manifest and the bytes of each bucket, as a transport delivers them."""
    for bucket in in_buckets(tensors, bucket_bytes):
        found = [fingerprint(name, tensor) for name, tensor in bucket]
        yield describe(bucket, found), [tensor_bytes(tensor) for _, tensor in bucket]


def tensors_of(publication):
    """Returns copies of a publication's tensors, by their names."""
    pairs = zip(publication.manifest.buckets, receive(publication), strict=True)
    return {name: tensor.clone() for manifest, data in pairs for name, tensor in unpack(manifest, data)}
