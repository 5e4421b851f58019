"""Weights that lie in the object store already are not put there again."""

import pytest
import torch
from training import tiny
from weight_buckets import tensors_of

from latent_grpo.common.models import make_model, save_model
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.learner.learner import LearnerGroup

pytestmark = pytest.mark.integration


def test_a_version_without_an_update_is_the_same_buckets_under_another_number(ray_session, tmp_path):
    config, tokenizer = tiny(), make_arithmetic_tokenizer()
    model = make_model(config.model.new, tokenizer, seed=0)
    save_model(tmp_path / "model", model, tokenizer)
    learner = LearnerGroup(config, tmp_path / "model")
    try:
        first, second = learner.publish(0), learner.publish(1)
        learner.save(tmp_path / "state")
        learner.load(tmp_path / "state")
        loaded = learner.publish(2)
        held = dict(model.named_parameters())
        for publication in (first, second, loaded):
            found = tensors_of(publication)
            assert found.keys() == held.keys()
            assert all(torch.equal(found[name], held[name]) for name in held)
    finally:
        learner.close()
    assert second.buckets == first.buckets
    assert loaded.buckets != first.buckets, "what was loaded may be other weights"
    assert [p.manifest.version.version for p in (first, second, loaded)] == [0, 1, 2]
    assert len({p.manifest.version.checksum for p in (first, second, loaded)}) == 1
