"""The object store of a local Ray holds what a run publishes, and what is too small is said."""

from __future__ import annotations

import pytest
from fake_run import fake_config

from latent_grpo.common.config import NewModelConfig
from latent_grpo.common.models import DTYPES, make_model, save_model
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.deploy.run.object_store import LEAST_BYTES, local_store, needed_bytes, running_store
from latent_grpo.learner.publication import published_bytes

GIB = 2**30


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_size_of_a_publication_is_that_of_its_buckets(tmp_path, dtype, tied):
    tokenizer = make_arithmetic_tokenizer()
    shape = NewModelConfig(hidden_size=32, intermediate_size=64, num_heads=4, tie_embeddings=tied)
    model = make_model(shape, tokenizer, seed=0)
    save_model(tmp_path, model, tokenizer)
    model = model.to(DTYPES[dtype])
    assert published_bytes(tmp_path, dtype) == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(("staleness", "versions"), [(0, 2), (3, 5)])
def test_a_store_holds_every_version_that_may_be_held_and_the_trajectories(staleness, versions):
    config = fake_config(max_staleness=staleness)
    assert versions * GIB < needed_bytes(config, GIB) < versions * GIB + LEAST_BYTES
    store = local_store(config, GIB, free_bytes=100 * GIB)
    assert (store.size, store.warning) == (versions * GIB + LEAST_BYTES, None)
    assert f"{versions} versions of the weights of 1,024 MiB each" in store.sentence


def test_long_responses_in_large_batches_take_more_than_the_least():
    task = {"name": "a", "path": "builtin:chain_arithmetic", "max_response_tokens": 4096}
    sizes = {"prompts_per_step": 256, "minibatch_prompts": 64, "group_size": 16, "k": 10}
    config = fake_config(tasks=[task], model={"path": "policy"}, **sizes)
    rows = 256 * 16
    least = rows * 4096 * 10 * (4 + 4 + 4)  # ids, scores and log-probs of one step's latent steps
    assert needed_bytes(config, 0) > least > LEAST_BYTES


def test_a_given_size_is_taken_and_one_that_is_too_small_is_said():
    config = fake_config(ray={"object_store_bytes": GIB})
    store = local_store(config, GIB, free_bytes=100 * GIB)
    assert store.size == GIB
    assert "raise the key" in store.warning
    assert local_store(config, 2**20, free_bytes=100 * GIB).warning is None


def test_a_running_rays_store_is_said_and_where_it_is_too_small_what_to_do():
    enough = running_store(fake_config(), GIB, [GIB, 8 * GIB])
    assert (enough.size, enough.warning) == (8 * GIB, None)
    assert "needs up to 2,048 MiB" in enough.sentence
    assert "--object-store-memory" in running_store(fake_config(), GIB, [GIB, 2 * GIB]).warning
    given = running_store(fake_config(ray={"object_store_bytes": GIB}), GIB, [8 * GIB])
    assert "no effect" in given.warning


def test_shared_memory_that_is_too_small_bounds_the_store_and_is_said():
    store = local_store(fake_config(), GIB, free_bytes=GIB)
    assert store.size == GIB
    assert "--shm-size" in store.warning
    assert local_store(fake_config(), GIB, free_bytes=2**20).size == LEAST_BYTES, "Ray itself then uses the disk"


def test_no_weights_are_spoken_of_where_none_are_published():
    """A replay, or a learner alone."""
    store = local_store(fake_config(), 0, free_bytes=100 * GIB)
    assert (store.size, store.sentence) == (LEAST_BYTES, "object store: 512 MiB (trajectories)")
    small = local_store(fake_config(), 0, free_bytes=2**20)
    assert "weights" not in f"{small.sentence} {small.warning}"
