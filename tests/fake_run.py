"""A run folder with made-up contents, for tests of what reads one: settings, metrics, trajectories, learner records.

Tokens are ids of the quickstart's arithmetic vocabulary. Every outcome and reason of a learner record occurs.
"""

from __future__ import annotations

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latent_grpo.common.config import config_as_json, load_config
from latent_grpo.common.learner_record import STEP_COLUMNS, encode_records, filtered_records
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.schema import Ragged, TrajectoryBatch, concat, encode
from latent_grpo.common.store import LearnerStore, TrajectoryStore
from latent_grpo.common.types import SamplingSettings, Trajectory
from latent_grpo.deploy.run.folder import RunFolder

FINISHED_BY = "summary.json"


def fake_config(**changes):
    return load_config(
        {
            "steps": 3, "k": 3, "group_size": 4, "prompts_per_step": 4, "minibatch_prompts": 2,
            "model": {"new": {}}, "tasks": [
                {
                    "name": "chains", "path": "builtin:chain_arithmetic", "max_prompt_tokens": 10,
                    "max_response_tokens": 16,
                }
            ],
            **changes,
        }
    )  # fmt: skip


def fake_trajectory(rng, *, step, group, index, k=3, reward=0.0, finish="stop", reason=None, vocab=24, run="fake"):
    """One row: 2 to 4 latent steps, then 3 hard ones; `reward` None: ungraded."""
    latent = int(rng.integers(2, 5)) if k else 0
    log_probs = -np.sort(rng.exponential(1.0, (latent, max(k, 1))).astype(np.float32), axis=1)[:, : k or 1]
    noise = rng.uniform(0.0, 1.0, log_probs.shape).astype(np.float32)
    order = np.argsort(-(log_probs + noise), axis=1)
    return Trajectory(
        run_id=run,
        purpose="training",
        task="chains",
        problem_uid=f"chains/{group}",
        group_uid=f"training/{group}/chains/{group}",
        sample_index=index,
        epoch=0,
        run_seed=0,
        policy_version_min=step - 1,
        policy_version_max=step - 1,
        worker="worker-0",
        engine="transformers",
        sampling=SamplingSettings(mode="latent" if k else "visible", max_tokens=16, k=max(k, 1), temperature=1.0),
        prompt_ids=np.arange(1, 7, dtype=np.int32),
        latent_ids=rng.integers(0, vocab, (latent, k)).astype(np.int32),
        latent_scores=np.take_along_axis(log_probs + noise, order, 1)[:, :k],
        latent_log_probs=np.take_along_axis(log_probs, order, 1)[:, :k],
        hard_ids=rng.integers(0, vocab, 3).astype(np.int32),
        hard_log_probs=-rng.exponential(0.5, 3).astype(np.float32),
        finish_reason=finish,
        response_text=f"\\boxed{{{index}}}",
        gold_answer="3",
        parsed_answer=None if reward is None else str(index),
        reward=reward,
        grade_reason=reason or ("ungraded" if reward is None else "correct" if reward else "wrong"),
        generation_seconds=0.1,
        grading_seconds=0.01,
    )


def fake_group(rng, step, group, size, k, *, equal=False):
    """Rewards alternate; the last sample is cut off, the one before ungraded (in groups of four and more)."""
    rows = []
    for index in range(size):
        cut, ungraded = size >= 4 and index == size - 1, size >= 4 and index == size - 2
        reward = None if ungraded else 0.0 if equal or cut else float(index % 2 == 0)
        finish = "length" if cut else "stop"
        rows.append(fake_trajectory(rng, step=step, group=group, index=index, k=k, reward=reward, finish=finish))
    return encode(rows, k)


def fake_records(group: pa.RecordBatch, update: int, rng) -> pa.RecordBatch:
    """What a learner could have made of a group that it was trained on."""
    view = TrajectoryBatch(group)
    rows, total = len(view), int(view.num_steps.sum())
    graded = ~np.isnan(view.rewards)
    advantage = np.where(graded & view.valid, np.where(view.rewards > 0, 1.0, -1.0), 0.0).astype(np.float32)
    winner = np.arange(rows) == int(np.argmax(advantage))
    reason = np.where(~graded, "ungraded", np.where(~view.valid, "invalid", np.where(winner, "", "first_step")))
    offsets = np.concatenate([[0], np.cumsum(view.num_steps)])
    step_advantages = np.repeat(advantage, view.num_steps)
    step_advantages[offsets[:-1][~winner]] = 0.0
    old = -rng.exponential(1.0, total).astype(np.float32)
    new = old + rng.normal(0.0, 0.1, total).astype(np.float32)
    steps = {
        "behaviour_log_probs": old,
        "old_log_probs": old,
        "new_log_probs": new,
        "step_advantages": step_advantages,
        "ratios": np.exp(new - old),
        "clipped": np.where((step_advantages > 0) & (np.exp(new - old) > 1.2), 2, 0),
        "flip_shares": np.where(step_advantages < 0, 1 / 3, 0.0),
    }
    assert steps.keys() == STEP_COLUMNS.keys()
    return encode_records(
        {
            "group_uid": group.column("group_uid"),
            "sample_index": group.column("sample_index"),
            "outcome": np.where(reason == "", "trained", "masked").tolist(),
            "reason": reason.tolist(),
            "advantage": advantage,
            "winner": winner,
            "mean_old_log_prob": np.array([old[a:b].mean() for a, b in itertools.pairwise(offsets)]),
            "update_index": np.full(rows, update),
            "update_applied": np.ones(rows, dtype=bool),
            "update_loss": np.full(rows, 0.01),
            "update_grad_norm": np.full(rows, 0.5),
        },
        {name: Ragged(values, offsets.astype(np.int32)) for name, values in steps.items()},
    )


def fake_run(path, *, steps=3, groups=4, group_size=4, k=3, learner=True, finished=True, seed=0) -> RunFolder:
    """Writes the folder. In every step the last group is filtered (`all_equal`), the others are trained on, two an
    update. `learner` False: no learner records; `finished` False: no summary, as a run that goes on or was killed."""
    folder, rng = RunFolder(path), np.random.default_rng(seed)
    path.mkdir(parents=True)
    config = fake_config(steps=steps, k=max(k, 1), group_size=group_size)
    (path / "config.json").write_text(config_as_json(config))
    folder.write_json("run.json", {"lineage": 0, "started": "2026-01-02T03:04:05+0000", "versions": {"python": "3"}})
    trajectories, records = TrajectoryStore(folder.trajectories), LearnerStore(folder.learner_records)
    with MetricsWriter(path) as metrics:
        for step in range(1, steps + 1):
            made = [
                fake_group(rng, step, (step - 1) * groups + g, group_size, k, equal=g == groups - 1)
                for g in range(groups)
            ]
            batch = concat(made)
            trajectories.write(step, batch)
            taught = [fake_records(group, i // 2, rng) for i, group in enumerate(made[:-1])]
            if learner:
                records.write(step, concat([*taught, filtered_records(made[-1], "all_equal")]))
            view = TrajectoryBatch(batch)
            metrics.write(
                step,
                {
                    "rollout/reward": float(np.nanmean(view.rewards)),
                    "rollout/steps": float(view.num_steps.mean()),
                    "rollout/latent_steps": float(view.num_latent_steps.mean()),
                    "rollout/invalid_share": float((~view.valid).mean()),
                    "learner/loss": 0.01,
                    "learner/grad_norm": 0.5,
                    "time/rollout_wait_s": 1.0,
                    "time/learner_s": 2.0,
                    "time/step_s": 3.1,
                },
            )
    if finished:
        (path / FINISHED_BY).write_text(json.dumps({"minutes": 0.2, "before": {}, "after": {}}))
    return folder


def damage_page(path, column) -> None:
    """Flips one bit at the end of a Parquet column's values; the file's size and footer stay."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunks = map(group.column, range(group.num_columns))
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
    start = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
    content = bytearray(path.read_bytes())
    content[start + chunk.total_compressed_size - 1] ^= 0x10
    path.write_bytes(content)
