"""Copies in pieces bring every byte to its place, whatever the sizes; tests/gpu has the copies to and from a GPU."""

import pytest
import torch

from latent_grpo.common import pinned_copy

CPU = torch.device("cpu")


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 128, 640, 1000])
def test_pieces_bring_every_byte_to_its_place(nbytes):
    copies = pinned_copy.PinnedCopies(CPU, piece_bytes=64)
    for seed in range(2):  # the pieces still hold what the copy before has left
        source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        target = torch.zeros_like(source)
        copies.copy(source, target)
        assert torch.equal(source, target)


def test_any_dtype_and_shape_is_copied_as_its_bytes():
    for source in (torch.randn(5, 7), torch.randn(3).to(torch.bfloat16), torch.tensor(2.5), torch.arange(9).view(3, 3)):
        target = torch.zeros_like(source)
        pinned_copy.PinnedCopies(CPU, piece_bytes=24).copy(source, target)
        assert torch.equal(source, target)


def test_tensors_of_one_device_and_those_with_gaps_are_copied_plainly():
    source, target = torch.randn(4, 6), torch.zeros(6, 4).t()
    pinned_copy.copy_between(source, target, proven=True)
    assert torch.equal(source, target)
