"""A step of the learner in plain torch, one row at a time, that tests compare the distributed learner with."""

from __future__ import annotations

import dataclasses
import operator

import numpy as np
import torch
from torch.nn.utils import parametrize
from weight_buckets import tensors_of

from latent_grpo.common.config import parse_config
from latent_grpo.common.density import surrogate_log_prob
from latent_grpo.common.latent import sample_mixture
from latent_grpo.common.noise import gumbel_noise, trajectory_key
from latent_grpo.common.schema import decode, encode
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.common.types import SamplingSettings, Trajectory
from latent_grpo.common.weights import checksum
from latent_grpo.learner.advantages import first_token_mask, group_advantages
from latent_grpo.learner.lora import add_lora
from latent_grpo.learner.objective import k3_kl, policy_loss

K, VOCABULARY, GROUPS, SAMPLES = 3, 48, 4, 4
SAMPLING = SamplingSettings(mode="latent", max_tokens=12, k=K, temperature=0.7)


def save_small_model(path):
    """Writes a random model of two layers with its tokenizer into the folder and returns it."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.08, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    make_arithmetic_tokenizer().save_pretrained(path)
    return str(path)


def load(folder, dtype="float32"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


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
    ids = torch.tensor(row.latent_ids).long()  # records are not writable, which from_numpy warns of
    embed = model.get_input_embeddings()
    weights = torch.softmax(torch.tensor(row.latent_scores), -1)
    hard = torch.tensor(row.hard_ids).long()
    mixed = (embed(ids).detach().float() * weights.unsqueeze(-1)).sum(-2)
    prompt = embed(torch.tensor(row.prompt_ids).long())
    fed = torch.cat([prompt, mixed.to(prompt.dtype), embed(hard)])[:-1]
    hidden = model.base_model(inputs_embeds=fed.unsqueeze(0)).last_hidden_state[0, len(row.prompt_ids) - 1 :]
    logits = torch.nn.functional.linear(hidden.float(), model.get_output_embeddings().weight.float())
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
        log_p, hard = torch.tensor(row.latent_log_probs), torch.tensor(row.hard_log_probs)
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


def make_batch(folder):
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


class Added(torch.nn.Module):
    """W + scale up down."""

    def __init__(self, down, scale, rows):
        super().__init__()
        self.down, self.scale = torch.nn.Parameter(down), scale
        self.up = torch.nn.Parameter(torch.zeros(rows, len(down)))

    def forward(self, weight):
        return weight + self.scale * self.up @ self.down


def factors(model, folder, config):
    """The down and up factors of each layer that LoRA gives some; `model` computes with them, by torch's own means."""
    drawn = load(folder)
    scale = config.lora.alpha / config.lora.rank
    model.requires_grad_(False)
    for layer in add_lora(drawn, config.lora, seed=config.seed):
        linear = model.get_submodule(layer)
        down = drawn.get_parameter(f"{layer}.lora_A.default.weight").detach().clone()
        parametrize.register_parametrization(linear, "weight", Added(down, scale, linear.out_features))
    return [p for p in model.parameters() if p.requires_grad]


def plain_step(folder, config, batch):
    """The step in plain torch, one row at a time: parameters by name, and mean old log-probs.

    Master weights and summed gradients are float32 whatever the model's dtype (METHOD §5).
    """
    model, rows = load(folder, config.model.dtype), decode(batch)
    model.get_input_embeddings().weight.requires_grad_(not config.freeze_embeddings)
    trainable = [p for p in model.parameters() if p.requires_grad]
    whole = dict(load(folder).named_parameters())  # not rounded to the model's dtype
    masters = [whole[name].detach().clone() for name, p in model.named_parameters() if p.requires_grad]
    if config.lora is not None:
        trainable = factors(model, folder, config)
        masters = [p.detach().clone() for p in trainable]
    optimizer = torch.optim.AdamW(
        masters,
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
            if not config.learn_exit:
                step_advantages[len(rows[i].latent_ids) : len(rows[i].latent_ids) + 1] = 0.0
            mask = torch.full((rows[i].num_steps,), bool(graded[i]))
            loss, _ = policy_loss(
                log_pi(model, rows[i], step_advantages, config.flip, others=others[i]),
                centered[i], step_advantages, mask,
                weights=(old[i] - behaviour[i]).exp().clamp(max=config.importance_cap), denominator=denominator,
            )  # fmt: skip
            kl = torch.where(mask, k3_kl(log_pi(model, rows[i]), old[i]), 0.0).sum() / denominator
            (loss + config.kl_coefficient * kl).backward()
            for master, parameter in zip(masters, trainable, strict=True):
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, parameter in zip(masters, trainable, strict=True):
                parameter.copy_(master)
    return {n: operator.attrgetter(n)(model).detach() for n in whole}, mean_old


def published(group, version=1):
    publication = group.publish(version)
    tensors = tensors_of(publication)
    assert publication.manifest.version.checksum == checksum(tensors.items())
    assert publication.manifest.version.version == version
    return tensors


def moved(after, before):
    return torch.cat([(after[n].double() - p.detach().double()).reshape(-1) for n, p in before.named_parameters()])
