"""A user is told where bfloat16 is slower than float32 on the machine, and only there."""

import pytest
import torch
from fake_run import fake_config

from latent_grpo.deploy.checks.bfloat16 import NOTICEABLE, bfloat16_slowdown, layer_seconds, slowdown_sentence
from latent_grpo.deploy.checks.doctor import bfloat16_checks
from latent_grpo.deploy.checks.validate import dtype_rows

BFLOAT16 = {"new": {}, "dtype": "bfloat16"}


def test_the_ratio_is_that_of_the_fastest_passes_without_the_first():
    """The same passes in both dtypes; the first, a warm-up, is the fastest here."""
    clock = {torch.float32: [1.0, 3.0, 2.0, 4.0], torch.bfloat16: [0.1, 9.0, 8.0, 7.0]}
    seen = []

    def seconds(*tensors):
        assert layer_seconds(*tensors) > 0, "the tensors of a pass that can be computed"
        seen.append(([tuple(t.shape) for t in tensors], *{t.dtype for t in tensors}))
        return clock[tensors[0].dtype].pop(0)

    assert bfloat16_slowdown(repeats=3, seconds=seconds) == 7.0 / 2.0
    assert [dtype for _, dtype in seen] == [torch.float32, torch.bfloat16] * 4, "in turn"
    assert all(shapes == seen[0][0] for shapes, _ in seen)


@pytest.mark.parametrize(("ratio", "told"), [(0.2, False), (1.0, False), (NOTICEABLE, True), (17.0, True)])
def test_only_a_slower_bfloat16_is_worth_a_sentence(ratio, told):
    sentence = slowdown_sentence(ratio, "cpu")
    assert (sentence is not None) == told
    assert not told or f"{ratio:.1f} times slower than float32 on this machine's cpu" in sentence


def slow(device):
    """Ten times as long, as processors without instructions for it take."""
    return 10.0


def test_doctor_and_validate_say_so():
    check = bfloat16_checks(slow)[0]
    assert (check.name, check.status, check.ok) == ("bfloat16", "warn", True)
    assert "10.0 times slower" in check.fix
    ((name, sentence),) = dtype_rows(fake_config(model=BFLOAT16), slow)
    assert name == "warning"
    assert "model.dtype to float32" in sentence


def test_nothing_is_said_of_a_float32_run():
    assert dtype_rows(fake_config(), slow) == []


def test_a_fast_bfloat16_is_no_warning():
    (check, *_) = bfloat16_checks(lambda device: 0.3)
    assert (check.status, check.fix) == ("ok", "")
    assert dtype_rows(fake_config(model=BFLOAT16), lambda device: 0.3) == []
