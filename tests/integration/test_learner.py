"""The learner on a real Ray and a real DeepSpeed: ranks, stages and packing change nothing but the time."""

import contextlib
import dataclasses
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_state import foreign_state
from plain_learner import GROUPS, SAMPLES, K, load, make_batch, moved, plain_step, published, save_small_model, settings
from remade_learner import RemadeGroup

from latent_grpo.common.learner_record import decode_records
from latent_grpo.common.schema import decode, encode
from latent_grpo.common.weights import checksum
from latent_grpo.learner.export import model_parameters
from latent_grpo.learner.learner import LearnerError, LearnerGroup
from latent_grpo.learner.state import FACTS, read_facts, read_tensors

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def batch(folder):
    return make_batch(folder)


QUICK = [(1, 0, 24, 5), (2, 2, 40, 4)]  # ranks, stage, tokens, chunk; stage 3: the centered step below
OFFLOADED = {(1, 3): "parameters"}
MORE = [(2, 3, 24, 3), (1, 2, 10_000, 2048), (1, 3, 40, 7), (2, 0, 40, 7), (2, 1, 24, 3)]


def in_short(quick, more):
    """Cases of a test of which `make test` takes the quick ones only."""
    return quick + [pytest.param(*case, marks=pytest.mark.slow) for case in more]


@pytest.mark.parametrize(("ranks", "stage", "tokens", "chunk"), in_short(QUICK, MORE))
def test_a_step_is_that_of_plain_torch_for_any_ranks_stage_and_packing(
    ray_session, folder, batch, ranks, stage, tokens, chunk
):
    config = settings(
        learner={
            "ranks": ranks, "zero_stage": stage, "tokens_per_microbatch": tokens, "logprob_chunk_tokens": chunk,
            "gradient_checkpointing": 1 if stage == 2 else ranks == 2, "weight_bucket_bytes": 8192,
            "offload": OFFLOADED.get((ranks, stage), "none"),
        },
        freeze_embeddings=stage != 1,
        learn_exit=stage != 2,
        **({"old_log_probs": "behaviour", "max_staleness": 0} if stage == 0 else {}),
    )  # fmt: skip
    expected, mean_old = plain_step(folder, config, batch)
    group = LearnerGroup(config, folder)
    try:
        gaps = group.replay(batch)
        assert max(gaps.latent.max, gaps.hard.max) < 1e-5
        report = group.train(batch, 0)
        after = published(group)
    finally:
        group.close()
    np.testing.assert_allclose(report.mean_old_log_probs, mean_old, atol=1e-5)
    check_records(report, batch, mean_old)
    assert report.metrics["learner/updates"] == GROUPS / config.minibatch_prompts
    assert report.metrics["learner/skipped_updates"] == 0
    assert 0 < report.metrics["learner/real_token_share"] <= 1
    parts = [report.metrics[f"learner/{part}_s"] for part in ("replay", "forward", "backward", "optimizer")]
    assert min(parts) > 0
    assert sum(parts) < ranks * report.metrics["learner/seconds"] + 1e-6
    before = load(folder)
    assert after.keys() == expected.keys()
    want, got = moved(expected, before), moved(after, before)
    error = float((want - got).norm() / want.norm())
    print(f"ranks {ranks} stage {stage}: relative error of the update {error:.2e}")
    assert error < 1e-5


def test_a_centered_step_is_that_of_plain_torch(ray_session, folder, batch):
    learner = {"ranks": 2, "zero_stage": 3, "tokens_per_microbatch": 24, "logprob_chunk_tokens": 3}
    config = settings(learner=learner, centering_draws=3)
    expected, mean_old = plain_step(folder, config, batch)
    plain, _ = plain_step(folder, settings(), batch)
    group = LearnerGroup(config, folder)
    try:
        report = group.train(batch, 0)
        after = published(group)
    finally:
        group.close()
    check_records(report, batch, mean_old)  # plain, as is what first-token selection ranks by
    assert 0 <= report.metrics["learner/uncentered_share"] < 1
    ratios = [r.ratios for r in decode_records(report.records)]
    np.testing.assert_allclose(np.concatenate(ratios[: len(ratios) // 2]), 1, atol=1e-5)  # of the first update
    before = load(folder)
    want, got = moved(expected, before), moved(after, before)
    assert float((want - got).norm() / want.norm()) < 1e-5
    assert float((want - moved(plain, before)).norm() / want.norm()) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 3)])
def test_a_step_with_lora_is_that_of_plain_torch(ray_session, folder, batch, ranks, stage):
    learner = {"ranks": ranks, "zero_stage": stage, "tokens_per_microbatch": 24, "gradient_checkpointing": ranks == 2}
    config = settings(learner=learner, lora={"rank": 4, "alpha": 8.0}, kl_coefficient=0.5)
    expected, _ = plain_step(folder, config, batch)
    group = LearnerGroup(config, folder)
    try:
        published(group, 0)
        group.train(batch, 0)
        after = published(group)
        group.train(batch, 1)
        again = published(group, 2)
    finally:
        group.close()
    before = load(folder)
    want, got = moved(expected, before), moved(after, before)
    assert float((want - got).norm() / want.norm()) < 1e-5
    changed = {name for name in after if not torch.equal(after[name], again[name])}
    assert {name.split(".")[-2] for name in changed} == {
        f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")
    }


def check_records(report, batch, mean_old):
    """Every row of the batch has its record, in the batch's order, whatever rank had it."""
    rows, records = decode(batch), decode_records(report.records)
    assert [(r.group_uid, r.sample_index) for r in records] == [(t.group_uid, t.sample_index) for t in rows]
    assert [len(r.ratios) for r in records] == [t.num_steps for t in rows]
    np.testing.assert_allclose([r.old_log_probs.mean() for r in records], mean_old, atol=1e-5)
    np.testing.assert_allclose([r.behaviour_log_probs.mean() for r in records], mean_old, atol=1e-4)
    assert [r.update_index for r in records] == [row // (2 * SAMPLES) for row in range(len(rows))]
    assert (records[6].outcome, records[6].reason) == ("masked", "invalid")
    assert (records[11].outcome, records[11].reason) == ("masked", "ungraded")


PROBE = 1e3  # an AdamW whose eps dwarfs every gradient moves a parameter by -lr / eps times its gradient


@pytest.mark.parametrize(
    ("ranks", "stage", "tokens"),
    [(1, 0, 40), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in [(2, 3, 24), (2, 0, 24), (2, 2, 10_000)])],
)
def test_the_gradient_of_each_tensor_is_that_of_plain_torch(ray_session, folder, batch, ranks, stage, tokens):
    config = settings(
        learner={"ranks": ranks, "zero_stage": stage, "tokens_per_microbatch": tokens, "logprob_chunk_tokens": 5},
        optimizer={"lr": 1e6 * PROBE, "eps": 1e6, "grad_clip": 1e9, "weight_decay": 0.0},
        minibatch_prompts=GROUPS,
    )
    expected, _ = plain_step(folder, config, batch)
    group = LearnerGroup(config, folder)
    try:
        group.train(batch, 0)
        after = published(group)
    finally:
        group.close()
    errors = {}
    for name, parameter in load(folder).named_parameters():
        want, got = ((weights[name].double() - parameter.detach().double()) / PROBE for weights in (expected, after))
        if name == "model.embed_tokens.weight":
            assert not got.any(), "embeddings are frozen"
        else:
            errors[name] = float((want - got).norm() / want.norm())
    print(f"ranks {ranks} stage {stage}: largest relative error {max(errors.values()):.1e}")
    assert max(errors.values()) < 1e-5, errors


@contextlib.contextmanager
def learner(folder, ranks, stage, dtype, offload="none"):
    config = settings(
        learner={"ranks": ranks, "zero_stage": stage, "tokens_per_microbatch": 40, "offload": offload},
        model={"path": "unused", "dtype": dtype},
        optimizer={"max_bad_updates": 2},
    )
    group = RemadeGroup(config, folder)
    try:
        yield group
    finally:
        group.close()


@pytest.fixture(scope="module")
def pair(ray_session, folder):
    """Two ranks that several tests share; the last one ends them."""
    with learner(folder, 2, 3, "float32") as group:
        yield group


@pytest.fixture(scope="module")
def single(ray_session, folder):
    with learner(folder, 1, 2, "bfloat16") as group:
        yield group


def test_state_survives_saving_and_non_finite_updates(pair, batch, tmp_path):
    pair.remake(3)
    check_state(pair, batch, tmp_path)


def test_state_in_bfloat16_survives_saving_and_non_finite_updates(single, batch, tmp_path):
    single.remake(2, "bfloat16")
    check_state(single, batch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload"), [(2, "none"), (3, "optimizer"), (3, "parameters")])
def test_state_in_bfloat16_survives_on_two_ranks(ray_session, folder, batch, tmp_path, stage, offload):
    with learner(folder, 2, stage, "bfloat16", offload) as group:
        check_state(group, batch, tmp_path)


def check_state(group, batch, tmp_path):
    start = published(group, 0)
    group.train(batch, 0)
    group.save(tmp_path / "state")
    write_copy = group.copy_state()
    one = published(group)
    group.train(batch, 1)
    write_copy(tmp_path / "copy")
    files = [{path.name: path.read_bytes() for path in (tmp_path / of).iterdir()} for of in ("state", "copy")]
    assert files[0] == files[1], "a later step has changed the copy"
    two = published(group)
    group.load(tmp_path / "state")
    assert checksum(published(group).items()) == checksum(one.items())
    group.train(batch, 1)
    assert checksum(published(group).items()) == checksum(two.items()), "the resumed step differs"
    assert checksum(one.items()) not in (checksum(start.items()), checksum(two.items()))

    group.export(tmp_path / "model")
    exported = load(tmp_path / "model")
    assert all(torch.equal(p.detach(), two[n].float()) for n, p in exported.named_parameters())
    saved = model_parameters(tmp_path / "state")  # without the ranks, in this process
    assert one.keys() - saved.keys() == {"model.embed_tokens.weight"}, "it is frozen"
    assert all(torch.equal(tensor.to(one[name].dtype), one[name]) for name, tensor in saved.items())

    poisoned = poison(batch)
    report = group.train(poisoned, 2)
    assert report.metrics["learner/skipped_updates"] == 1
    assert {(r.outcome, r.reason) for r in decode_records(report.records)} == {("skipped", "non_finite")}
    assert checksum(published(group).items()) == checksum(two.items())
    group.load(tmp_path / "state")
    group.train(batch, 1)
    assert checksum(published(group).items()) == checksum(two.items()), "a skipped update left something behind"
    group.train(poisoned, 2)
    report = group.train(poisoned, 3)  # the caller keeps the batch and then stops: nothing is raised before
    assert report.metrics["learner/bad_updates_in_a_row"] == group.config.optimizer.max_bad_updates
    assert report.bad_rows


@dataclasses.dataclass(frozen=True)
class Written:
    """A state after step 0 that two ranks wrote at stage 3, and the weights before and after step 1 without a stop."""

    state: Path
    before: dict
    after: dict


@pytest.fixture(scope="module")
def written(pair, batch, tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "state"
    pair.remake(3)
    pair.train(batch, 0)
    pair.save(path)
    before = published(pair)
    pair.train(batch, 1)
    return Written(path, before, published(pair))


def apart(weights, written):
    """The relative difference of a step's update from that of the learner that went on."""
    steps = [[after[n].double() - before for n, before in written.before.items()] for after in (weights, written.after)]
    got, want = (torch.cat([tensor.reshape(-1) for tensor in step]) for step in steps)
    return float((want - got).norm() / want.norm())


def tensors_of(state):
    return {f"{kind}/{n}": t for n, kinds in read_tensors(state, read_facts(state)) for kind, t in kinds.items()}


def test_a_state_is_whole_float32_tensors_of_what_is_trained(written, folder):
    facts, found = read_facts(written.state), tensors_of(written.state)
    names = [f"model.{n}" for n, _ in load(folder).named_parameters() if n != "model.embed_tokens.weight"]
    assert list(facts.parameters) == names, "the embeddings are frozen"
    assert (facts.ranks, facts.zero_stage, facts.dtype, facts.steps) == (2, 3, "float32", 2)
    assert len({saved.file for saved in facts.parameters.values()}) > 1, "each rank writes a share"
    assert {path.suffix for path in written.state.iterdir()} == {".json", ".safetensors"}
    for name in names:
        assert torch.equal(found[f"weight/{name}"], written.before[name.removeprefix("model.")])
        assert found[f"exp_avg_sq/{name}"].any()


@pytest.mark.parametrize(
    ("which", "stage"),
    in_short(
        [("single", 3), ("single", 0), ("pair", 1)],
        [("single", 1), ("single", 2), ("pair", 0), ("pair", 2), ("pair", 3)],
    ),
)
def test_a_state_goes_on_with_other_ranks_and_stages(request, written, folder, batch, tmp_path, which, stage):
    group = request.getfixturevalue(which)
    group.remake(stage)
    group.train(batch, 0)  # nothing of it may stay
    group.load(written.state)
    assert checksum(published(group).items()) == checksum(written.before.items())
    group.save(tmp_path / "again")
    found, want = tensors_of(tmp_path / "again"), tensors_of(written.state)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())
    group.train(batch, 1)
    assert apart(published(group), written) < 1e-5


@pytest.mark.parametrize(
    ("which", "stage"), in_short([("single", 1), ("pair", 3)], [("single", 3), ("pair", 1), ("pair", 2)])
)
def test_masters_pass_through_bfloat16_bit_for_bit(request, written, batch, tmp_path, which, stage):
    group = request.getfixturevalue(which)
    group.remake(stage, "bfloat16")
    group.load(written.state)
    got = published(group)
    assert all(torch.equal(got[name], tensor.bfloat16()) for name, tensor in written.before.items())
    group.train(batch, 1)
    group.save(tmp_path / "bfloat16")
    group.remake(stage)
    group.load(tmp_path / "bfloat16")
    masters, got = model_parameters(tmp_path / "bfloat16"), published(group)
    assert all(torch.equal(got[name], tensor) for name, tensor in masters.items())
    assert apart(got, written) < 0.2, "a step in another precision is still that step"


def test_a_state_of_other_parameters_is_refused(single, written, tmp_path):
    single.remake(2)
    shutil.copytree(written.state, tmp_path / "other")
    text = (written.state / FACTS).read_text()
    (tmp_path / "other" / FACTS).write_text(text.replace("model.lm_head", "model.another"))
    with pytest.raises(LearnerError, match=r"parameter.* first model.lm_head.weight .saved None, now"):
        single.load(tmp_path / "other")
    (tmp_path / "other" / FACTS).write_text(text)
    for shard in (tmp_path / "other").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(LearnerError, match=r"is damaged .*resume from an earlier checkpoint"):
        single.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("which", "stage", "dtype"), in_short([("single", 1, "bfloat16")], [("pair", 2, "float32"), ("pair", 3, "float32")])
)
def test_a_state_from_before_is_read_where_it_fits(request, batch, tmp_path, which, stage, dtype):
    group = request.getfixturevalue(which)
    group.remake(stage, dtype)
    group.train(batch, 0)
    (tmp_path / "old").mkdir()
    group.save_as_before(tmp_path / "old")
    one = published(group)
    group.train(batch, 1)
    two = published(group)
    group.load(tmp_path / "old")
    assert checksum(published(group).items()) == checksum(one.items())
    group.train(batch, 1)
    assert checksum(published(group).items()) == checksum(two.items())
    saved = model_parameters(tmp_path / "old")
    assert all(torch.equal(saved[name].to(tensor.dtype), tensor) for name, tensor in one.items())
    group.remake(0)
    with pytest.raises(LearnerError, match=r"before version 0\.3 .* resume with the same learner.ranks"):
        group.load(tmp_path / "old")


def test_a_foreign_pickle_does_not_run(single, tmp_path):
    single.remake(2)
    state = foreign_state(tmp_path, stage=2)
    with pytest.raises(LearnerError, match="could run code; it was refused"):
        single.load(state)
    assert not (tmp_path / "touched").exists()


def poison(batch):
    """One group with a row, so one rank, whose surrogate is not a number: a score far below every log-prob."""
    first, *others = decode(batch)[:SAMPLES]
    scores = first.latent_scores.copy()
    scores[:, -1] = -1000.0
    return encode([dataclasses.replace(first, latent_scores=scores), *others], K)


def test_the_death_of_a_rank_is_named(pair, batch):
    os.kill(pair.process_ids()[1], signal.SIGKILL)
    with pytest.raises(LearnerError, match="learner rank 1 died"):
        pair.train(batch, 0)
