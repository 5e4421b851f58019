"""The learner on a real Ray and a real DeepSpeed: ranks, stages and packing change nothing but the time."""

import contextlib
import dataclasses
import os
import signal

import numpy as np
import pytest
import ray
import torch

from latent_grpo.common.config import parse_config
from latent_grpo.common.density import surrogate_log_prob
from latent_grpo.common.latent import sample_mixture
from latent_grpo.common.learner_record import decode_records
from latent_grpo.common.noise import gumbel_noise, trajectory_key
from latent_grpo.common.schema import decode, encode
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.common.types import SamplingSettings, Trajectory
from latent_grpo.common.weights import checksum, unpack
from latent_grpo.learner.advantages import first_token_mask, group_advantages
from latent_grpo.learner.learner import LearnerError, LearnerGroup
from latent_grpo.learner.objective import k3_kl, policy_loss

pytestmark = pytest.mark.integration
K, VOCABULARY, GROUPS, SAMPLES = 3, 48, 4, 4
SAMPLING = SamplingSettings(mode="latent", max_tokens=12, k=K, temperature=0.7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.08, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    make_arithmetic_tokenizer().save_pretrained(path)
    return str(path)


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def settings(**changes):
    learner = {"ranks": 1, "zero_stage": 2, "resources": {"num_cpus": 0.5}} | changes.pop("learner", {})
    optimizer = {"lr": 1e-2, "eps": 1e-3, "grad_clip": 0.05} | changes.pop("optimizer", {})
    return parse_config(
        {
            "k": K, "group_size": SAMPLES, "prompts_per_step": GROUPS, "minibatch_prompts": 2,
            "kl_coefficient": 0.05, "max_staleness": 1, "model": {"path": "unused", "dtype": "float32"},
            "tasks": [{"name": "t", "path": "builtin:arithmetic"}], "learner": learner, "optimizer": optimizer,
            "deadlines": {"start_s": 300, "learner_s": 300, "weights_s": 300},
        } | changes
    )  # fmt: skip


def components(model, row, wanted=None):
    """Plain replay of one trajectory: component log-probs of latent steps [L, K] and log-probs of hard ones [H].

    `wanted` [L, M]: other ids than the recorded ones.
    """
    ids = torch.from_numpy(row.latent_ids).long()
    embed = model.get_input_embeddings()
    weights = torch.softmax(torch.from_numpy(row.latent_scores), -1)
    hard = torch.from_numpy(row.hard_ids).long()
    mixed = (embed(ids).detach() * weights.unsqueeze(-1)).sum(-2)
    fed = torch.cat([embed(torch.from_numpy(row.prompt_ids).long()), mixed, embed(hard)])[:-1]
    logits = model(inputs_embeds=fed.unsqueeze(0)).logits[0, len(row.prompt_ids) - 1 :]
    latents = len(ids)
    log_p = torch.log_softmax(logits[:latents], -1).gather(-1, ids if wanted is None else wanted)
    hard_log_p = torch.log_softmax(logits[latents:] / SAMPLING.temperature, -1).gather(-1, hard.unsqueeze(-1))
    return log_p, hard_log_p.squeeze(-1)


@torch.no_grad()
def other_draws(model, row, draws):
    """[L] lists of (ids, scores) [K] that the latent steps could have been (METHOD §2.1); empty without centering."""
    tokenizer = make_arithmetic_tokenizer()
    end = tokenizer.convert_tokens_to_ids("</think>")
    allowed = torch.zeros(VOCABULARY, dtype=torch.bool)
    allowed[list(tokenizer.get_vocab().values())] = True
    every_id = torch.arange(VOCABULARY).unsqueeze(0)
    log_p = components(model, row, every_id.expand(len(row.latent_ids), -1))[0]
    found = [[] for _ in log_p]
    for step, logits in enumerate(log_p if draws else ()):
        for draw in range(draws):
            key = trajectory_key(
                run_seed=row.run_seed, purpose=f"other draw {draw}", problem_uid=row.problem_uid, epoch=row.epoch,
                sample_index=row.sample_index, policy_version=row.policy_version_min,
            )  # fmt: skip
            noise = gumbel_noise(torch.tensor([key]), torch.tensor([step]), every_id)
            ids, scores, _ = sample_mixture(
                logits.unsqueeze(0), noise, k=K, top_p=SAMPLING.top_p, noise_scale=SAMPLING.noise_scale, tau=1.0,
                allowed=allowed,
            )  # fmt: skip
            if ids[0, 0] != end and logits.masked_fill(~allowed, -torch.inf).argmax() != end:
                found[step].append((ids[0], scores[0]))
    return found


def log_pi(model, row, advantages=None, flip="off", recorded=False, others=()):
    scores = torch.tensor(row.latent_scores)
    if recorded:
        log_p, hard = torch.from_numpy(row.latent_log_probs), torch.from_numpy(row.hard_log_probs)
    else:
        log_p, hard = components(model, row)
    latent = surrogate_log_prob(
        log_p,
        scores,
        advantages=None if advantages is None else advantages[: len(log_p)],
        component_weights=torch.softmax(scores, -1),
        flip=flip,
    )
    for step, found in enumerate(others):
        for ids, drawn in found:
            all_steps = ids.expand(len(log_p), -1)
            density = surrogate_log_prob(
                components(model, row, all_steps)[0][step : step + 1],
                drawn.unsqueeze(0),
                component_weights=torch.softmax(drawn, -1).unsqueeze(0),
            )
            latent = latent - torch.nn.functional.one_hot(torch.tensor(step), len(log_p)) * density / len(found)
    return torch.cat([latent, hard])


@pytest.fixture(scope="module")
def batch(folder):
    """Trajectories with the log-probs that the model has: lengths of 1 to 9 steps, one cut off in latent mode."""
    model, draw, rows = load(folder), np.random.default_rng(1), []
    for group in range(GROUPS):
        prompt = draw.integers(0, VOCABULARY, draw.integers(2, 7)).astype(np.int32)
        for sample in range(SAMPLES):
            cut = (group, sample) == (1, 2)
            latents, hard = int(draw.integers(1, 6)), 0 if cut else int(draw.integers(1, 5))
            shape = (latents, K)
            row = Trajectory(
                purpose="training", task="t", problem_uid=f"t{group}", group_uid=f"g{group}", sample_index=sample,
                epoch=0, run_seed=0, policy_version_min=0, policy_version_max=0, engine="test", sampling=SAMPLING,
                prompt_ids=prompt, latent_ids=draw.integers(0, VOCABULARY, shape).astype(np.int32),
                latent_scores=-np.sort(-draw.uniform(-4, 0, shape).astype(np.float32), axis=-1),
                latent_log_probs=np.zeros(shape, np.float32),
                hard_ids=draw.integers(0, VOCABULARY, hard).astype(np.int32),
                hard_log_probs=np.zeros(hard, np.float32), finish_reason="length" if cut else "stop",
                reward=None if (group, sample) == (2, 3) else float(sample % 2 == group % 2), grade_reason="x",
            )  # fmt: skip
            with torch.no_grad():
                log_p, hard_log_p = components(model, row)
            rows.append(dataclasses.replace(row, latent_log_probs=log_p.numpy(), hard_log_probs=hard_log_p.numpy()))
    return encode(rows, K)


def plain_step(folder, config, batch):
    """The step in plain torch, one row at a time: parameters by name, and mean old log-probs."""
    model, rows = load(folder), decode(batch)
    model.get_input_embeddings().weight.requires_grad_(not config.freeze_embeddings)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.optimizer.lr, eps=config.optimizer.eps, weight_decay=config.optimizer.weight_decay,
    )  # fmt: skip
    with torch.no_grad():
        old = [log_pi(model, r) for r in rows]
        others = [other_draws(model, r, config.centering_draws) for r in rows]
        centered = [log_pi(model, r, others=o) for r, o in zip(rows, others, strict=True)]
    behaviour = [log_pi(model, r, recorded=True) for r in rows]
    rewards = np.array([np.nan if r.reward is None else r.reward for r in rows], dtype=np.float32)
    valid = np.array([r.finish_reason == "stop" for r in rows])
    groups = np.repeat(np.arange(GROUPS), SAMPLES)
    graded = ~np.isnan(rewards)
    mean_old = np.array([float(o.double().mean()) for o in old])
    advantages = group_advantages(rewards, groups, valid, graded=graded)
    keep = first_token_mask(advantages, groups, valid & graded, mean_old)
    per_update = config.minibatch_prompts * SAMPLES
    for start in range(0, len(rows), per_update):
        members = range(start, start + per_update)
        denominator = sum(rows[i].num_steps for i in members if graded[i])
        for i in members:
            step_advantages = torch.full((rows[i].num_steps,), float(advantages[i]))
            step_advantages[0] *= float(keep[i])
            mask = torch.full((rows[i].num_steps,), bool(graded[i]))
            loss, _ = policy_loss(
                log_pi(model, rows[i], step_advantages, config.flip, others=others[i]),
                centered[i], step_advantages, mask,
                weights=(old[i] - behaviour[i]).exp().clamp(max=config.importance_cap), denominator=denominator,
            )  # fmt: skip
            kl = torch.where(mask, k3_kl(log_pi(model, rows[i]), old[i]), 0.0).sum() / denominator
            (loss + config.kl_coefficient * kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in model.named_parameters()}, mean_old


def published(group, version=1):
    publication = group.publish(version)
    pairs = zip(publication.manifest.buckets, ray.get(list(publication.buckets), timeout=300), strict=True)
    tensors = {name: tensor.clone() for manifest, data in pairs for name, tensor in unpack(manifest, data)}
    assert publication.manifest.version.checksum == checksum(tensors.items())
    assert publication.manifest.version.version == version
    return tensors


def moved(after, before):
    return torch.cat([(after[n].double() - p.detach().double()).reshape(-1) for n, p in before.named_parameters()])


QUICK = [(1, 0, 24, 5), (2, 2, 40, 4)]  # ranks, stage, tokens, chunk; stage 3: the centered step below
MORE = [(2, 3, 24, 3), (1, 2, 10_000, 2048), (1, 3, 40, 7), (2, 0, 40, 7), (2, 1, 24, 3)]
SHAPES = QUICK + [pytest.param(*shape, marks=pytest.mark.slow) for shape in MORE]


@pytest.mark.parametrize(("ranks", "stage", "tokens", "chunk"), SHAPES)
def test_a_step_is_that_of_plain_torch_for_any_ranks_stage_and_packing(
    ray_session, folder, batch, ranks, stage, tokens, chunk
):
    config = settings(
        learner={
            "ranks": ranks, "zero_stage": stage, "tokens_per_microbatch": tokens, "logprob_chunk_tokens": chunk,
            "gradient_checkpointing": ranks == 2, "weight_bucket_bytes": 8192,
        },
        freeze_embeddings=stage != 1,
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
    [(2, 3, 24), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in [(1, 0, 40), (2, 0, 24), (2, 2, 10_000)])],
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
def learner(folder, ranks, stage, dtype):
    config = settings(
        learner={"ranks": ranks, "zero_stage": stage, "tokens_per_microbatch": 40},
        model={"path": "unused", "dtype": dtype},
        optimizer={"max_bad_updates": 2},
    )
    group = LearnerGroup(config, folder)
    try:
        yield group
    finally:
        group.close()


@pytest.fixture(scope="module")
def pair(ray_session, folder):
    """Two ranks that two tests share; the second one ends them."""
    with learner(folder, 2, 3, "float32") as group:
        yield group


def test_state_survives_saving_and_non_finite_updates(pair, batch, tmp_path):
    check_state(pair, batch, tmp_path)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_state_in_bfloat16_survives_saving_and_non_finite_updates(ray_session, folder, batch, tmp_path, ranks):
    with learner(folder, ranks, 2, "bfloat16") as group:
        check_state(group, batch, tmp_path)


def check_state(group, batch, tmp_path):
    start = published(group, 0)
    group.train(batch, 0)
    group.save(tmp_path / "state")
    one = published(group)
    group.train(batch, 1)
    two = published(group)
    group.load(tmp_path / "state")
    assert checksum(published(group).items()) == checksum(one.items())
    group.train(batch, 1)
    assert checksum(published(group).items()) == checksum(two.items()), "the resumed step differs"
    assert checksum(one.items()) not in (checksum(start.items()), checksum(two.items()))

    group.export(tmp_path / "model")
    exported = load(tmp_path / "model")
    assert all(torch.equal(p.detach(), two[n].float()) for n, p in exported.named_parameters())

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
