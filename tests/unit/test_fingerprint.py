"""The fingerprint of weights: the same integer wherever and however it is computed, another one after any damage."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_grpo.common.fingerprint import ROW_BYTES, WORDS, copy_with_fingerprint, fingerprint, lanes

DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64,
]  # fmt: skip
SIZES = [0, 1, 7, 8, 9, ROW_BYTES - 1, ROW_BYTES, ROW_BYTES + 1, 64 * ROW_BYTES + 24]  # bytes


def raw(nbytes, seed=0):
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def reference(data):
    """Both lanes by the definition, in unbounded integers."""
    bound = 2**64

    def mixed(word):
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % bound
        word = (word ^ word >> 27) * 0x94D049BB133111EB % bound
        return word ^ word >> 31

    def odd(position):
        return mixed((position + 1) * 0x9E3779B97F4A7C15 % bound) | 1

    data += bytes(-len(data) % ROW_BYTES)
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    count = len(words) // WORDS
    across, down = [odd(c) for c in range(WORDS)], [odd(WORDS + r) for r in range(count)]
    rows = [sum(words[r * WORDS + c] for c in range(WORDS)) % bound for r in range(count)]
    columns = [sum(words[r * WORDS + c] for r in range(count)) % bound for c in range(WORDS)]
    return (
        sum(mixed(row) * n for row, n in zip(rows, down, strict=True)) % bound,
        sum(mixed(column) * m for column, m in zip(columns, across, strict=True)) % bound,
    )


@pytest.mark.parametrize("nbytes", SIZES)
def test_both_lanes_are_what_their_definition_says(nbytes):
    data = raw(nbytes)
    assert lanes(data) == reference(bytes(data.tolist()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("nbytes", SIZES)
def test_a_gpu_finds_the_same_integers(nbytes):
    assert lanes(raw(nbytes).cuda()) == lanes(raw(nbytes))


def test_the_size_of_the_pieces_does_not_matter():
    data = raw(3 * 64 * ROW_BYTES + 100)
    assert len({lanes(data, piece_rows=rows) for rows in (1, 5, 64, 10_000)}) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_has_one_and_where_the_tensor_lies_does_not_matter(dtype):
    tensor = raw(16 * 300).view(torch.bool if dtype == torch.bool else torch.uint8)
    tensor = (tensor.view(torch.uint8) % 2).bool() if dtype == torch.bool else tensor.view(dtype)
    tensor = tensor.reshape(-1, 5)
    expected = fingerprint("w", tensor)
    for offset in (1, 3, 8):
        bucket = torch.zeros(tensor.numel() + 16, dtype=dtype)
        bucket[offset : offset + tensor.numel()] = tensor.reshape(-1)
        assert fingerprint("w", bucket[offset : offset + tensor.numel()].view(-1, 5)) == expected
    assert fingerprint("w", tensor.t().contiguous().t()) == expected, "the order in memory does not matter"


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_copy_is_a_copy_and_has_the_fingerprint_of_what_arrived(nbytes):
    source, target = raw(nbytes), torch.zeros(nbytes, dtype=torch.uint8)
    assert copy_with_fingerprint("w", source, target) == fingerprint("w", source)
    assert torch.equal(source, target)
    halves = torch.randn(6, 4).to(torch.bfloat16)
    columns = torch.zeros(4, 6, dtype=torch.bfloat16).t()
    assert copy_with_fingerprint("w", halves, columns) == fingerprint("w", halves)
    assert torch.equal(columns, halves)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3 * ROW_BYTES), st.integers(0, 2**32 - 1), st.integers(0, 7))
def test_one_flipped_bit_changes_both_lanes(nbytes, seed, bit):
    data = raw(nbytes, seed)
    before = lanes(data)
    data[seed % nbytes] ^= 1 << bit
    assert all(a != b for a, b in zip(before, lanes(data), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_exchanged_elements_are_seen_though_the_sum_of_their_row_or_column_stays(dtype):
    places, values = random.Random(0), [1.0, -1.0, 2.0, 0.0, 0.5, -(2.0**62)]
    per_row = ROW_BYTES // torch.empty(0, dtype=dtype).element_size()
    for _ in range(150):
        tensor = torch.zeros(3 * per_row, dtype=dtype)
        first, second = places.sample(range(3 * per_row), 2)
        if places.random() < 0.5:
            second = (first + places.choice([-2, -1, 1, 2]) * per_row) % len(tensor)  # the same column
        one, other = places.sample(values, 2)
        tensor[first], tensor[second] = one, other
        before = fingerprint("w", tensor)
        same = tensor[first].item() == tensor[second].item()
        tensor[first], tensor[second] = other, one
        assert same or fingerprint("w", tensor) != before, (first, second, one, other)


def test_a_wrong_sign_of_two_words_whose_changes_cancel_is_seen():
    tensor = torch.randn(4, ROW_BYTES // 4)
    seen = {fingerprint("w", tensor)}
    for row, other in ((0, 0), (0, 1), (2, 3)):
        changed = tensor.clone()
        changed[row, 1] *= -1  # the top bit of a word: 2^63 times any odd number is 2^63
        changed[other, 7] *= -1
        seen.add(fingerprint("w", changed))
    assert len(seen) == 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4 * WORDS - 1), min_size=1, max_size=3, unique=True), st.data())
def test_up_to_three_wrong_words_are_seen_whatever_they_are(places, data):
    words = raw(4 * ROW_BYTES).view(torch.int64)
    before = lanes(words)
    for place in places:
        words[place] ^= data.draw(st.sampled_from([1, -1, 1 << 31, -(1 << 63)]) | st.integers(1, 2**63 - 1))
    assert lanes(words) != before


def test_rows_pieces_and_shifts_are_seen():
    tensor = raw(130 * ROW_BYTES).view(torch.float32)
    size, half = ROW_BYTES // 4, 64 * ROW_BYTES // 4
    rows = tensor.clone()
    rows[:size], rows[size : 2 * size] = tensor[size : 2 * size], tensor[:size]
    pieces = tensor.clone()
    pieces[:half], pieces[half : 2 * half] = tensor[half : 2 * half], tensor[:half]
    pages = tensor.clone()  # of 4 KiB, in the same columns of other rows
    pages[:1024], pages[8 * size : 8 * size + 1024] = tensor[8 * size : 8 * size + 1024], tensor[:1024]
    old = tensor.clone()
    old[half : half + 16] = 0.0
    turned = tensor[: size * 128].view(128, size).t().reshape(-1)
    others = [
        rows,
        pieces,
        pages,
        old,
        turned,
        tensor[: size * 128],
        -tensor,
        tensor.roll(1),
        tensor.roll(size),
        tensor.flip(0),
        tensor[:-1],
        torch.zeros_like(tensor),
    ]
    found = {fingerprint("w", of) for of in (tensor, *others)}
    assert len(found) == 1 + len(others)


def test_zeros_are_not_nothing_and_name_shape_and_dtype_count():
    made = [
        ("w", torch.zeros(0)), ("w", torch.zeros(4)), ("w", torch.zeros(5)), ("w", torch.zeros(2, 2)),
        ("v", torch.zeros(4)), ("w", torch.zeros(4, dtype=torch.int32)), ("w", torch.zeros(8, dtype=torch.bfloat16)),
    ]  # fmt: skip
    assert len({fingerprint(name, tensor) for name, tensor in made}) == len(made)


def test_small_counters_and_sparse_tensors_do_not_collide():
    found = {lanes(torch.tensor([value, other])) for value in range(40) for other in range(40)}
    assert len(found) == 40 * 40
    one_hot = set()
    for place in range(0, 2 * WORDS, 16):
        tensor = torch.zeros(2 * WORDS, dtype=torch.int64)
        tensor[place] = -(2**63)
        one_hot.add(lanes(tensor))
    assert len(one_hot) == 2 * WORDS // 16
