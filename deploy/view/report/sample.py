"""The trajectories of a report: whole groups, spread evenly over the dumped steps.

The index (one small entry per trajectory, for lists and filters) is separate from the groups (everything else), which
the page unpacks one by one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latent_grpo.common.golds import spelled
from latent_grpo.common.store import DumpError
from latent_grpo.common.tasks.arithmetic import MODULUS, solve
from latent_grpo.deploy.view.run_view import RunView
from latent_grpo.deploy.view.selection import Row
from latent_grpo.deploy.view.thoughts import Thoughts, TokenTexts, behaviour_log_probs, load

MAX_COMPONENTS = 4_000_000  # tokens of all steps in one report: about 80 MB of HTML
LEADING = 64  # thoughts shown in a list's preview
SENTENCE_ENDS = ".?!\u2026)]}\"'\u201d\u2019"


@dataclass(slots=True)
class Sample:
    """The data of the page; `notes` are sentences about what is missing from it."""

    trajectories: list[dict[str, Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    vocabulary: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def sampled_groups(rows: Sequence[Row], limit: int) -> list[list[Row]]:
    """Returns whole groups with at most `limit` trajectories together, in the order of the run.

    Every (purpose, step) contributes the same number of trajectories as far as it has them; within one, groups are
    evenly spaced, so that evaluations of the same problems keep the same problems at every step.
    """
    places: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in rows:
        places.setdefault((row.purpose, row.step), {}).setdefault(row.group_uid, []).append(row)
    left, chosen = limit, []
    waiting = sorted(
        places, key=lambda place: sum(map(len, places[place].values()))
    )  # small ones leave more for others
    taken: dict[tuple[str, int], list[list[Row]]] = {}
    for done, place in enumerate(waiting):
        groups = list(places[place].values())
        size = max(len(group) for group in groups)
        count = min(len(groups), max(left // (len(waiting) - done) // size, 0))
        spaced = [groups[i * len(groups) // count] for i in range(count)]
        taken[place] = spaced
        left -= sum(len(group) for group in spaced)
    for place in places:
        chosen += taken[place]
    return chosen or [list(next(reversed(places.values())).values())[-1]]  # a group may be larger than the limit


def sample(
    run: RunView,
    rows: Sequence[Row],
    limit: int,
    tokens: TokenTexts,
    weighting: str,
    *,
    max_components: int = MAX_COMPONENTS,
) -> Sample:
    """Returns the report's part of `rows`; groups of a damaged dump are left out and named by the run."""
    found, made = sampled_groups(rows, limit), Sample()
    size = int(run.settings.get("k") or 1)
    total = sum(_components(group, size) for group in found)
    if total > max_components:
        found = sampled_groups(rows, max(limit * max_components // total, 1))
        made.notes.append(f"It is limited to about {max_components:,} tokens of steps, so that a browser can open it.")
    numbers: dict[int, int] = {}  # token id -> place in the vocabulary
    held = sum(map(len, found))
    kept = [sorted(group, key=lambda row: row.sample_index) for group in found]
    for _, of_step in itertools.groupby(kept, key=lambda group: group[0].file.path):
        groups = list(of_step)
        try:
            thoughts = iter(load(run, [row for group in groups for row in group]))
        except DumpError as error:  # named under what the report leaves out
            run.leave_out(error)
            continue
        for group in groups:
            _add(made, list(itertools.islice(thoughts, len(group))), tokens, numbers, weighting)
    made.vocabulary = [tokens[token] for token in numbers]
    shorten_prompts(made)
    write_out(made, run.settings)
    if held < len(rows):
        made.notes.append(
            f"This report holds {held:,} of {len(rows):,} dumped trajectories: whole groups, evenly spread over the "
            "steps. --sample N includes more, and the filters of latent-grpo inspect choose others."
        )
    if tokens.missing:
        made.notes.append(tokens.missing)
    if made.trajectories and not any(entry["outcome"] for entry in made.trajectories):
        made.notes.append(
            "These trajectories have no learner records (the run was made before they existed, or only evaluations are "
            "shown), so ratios, advantages and the learner's log-probabilities are missing."
        )
    return made


def _components(group: Sequence[Row], k: int) -> int:
    """Returns the number of tokens of a group's steps: K for a latent step, one for a hard step."""
    return sum(row.latent * k + row.length - row.latent for row in group)


def _add(made: Sample, group: list[Thoughts], tokens: TokenTexts, numbers: dict[int, int], weighting: str) -> None:
    def number(token: int) -> int:
        return numbers.setdefault(int(token), len(numbers))

    entries: list[dict[str, Any]] = []
    for thoughts in group:
        t, row = thoughts.trajectory, thoughts.row
        made.trajectories.append(
            {
                "group": len(made.groups),
                "place": len(entries),
                "purpose": row.purpose,
                "step": row.step,
                "task": row.task,
                "problem": row.problem_uid,
                "uid": row.group_uid,
                "sample": row.sample_index,
                "version": row.version,
                "reward": row.reward,
                "correct": row.correct,
                "other": row.other_reward,
                "grade": row.grade_reason,
                "finish": row.finish_reason,
                "gold": spelled(row.gold_answer),
                "parsed": row.parsed_answer,
                "text": t.response_text,
                "length": row.length,
                "latent": row.latent,
                "advantage": _round(row.advantage),
                "outcome": row.outcome,
                "why": row.why,
                "width": _round(float(thoughts.width.mean())) if len(thoughts.width) else None,
                "lead": [number(ids[0]) for ids in t.latent_ids[:LEADING]],
                "share": [round(100 * float(w[0])) for w in thoughts.weights[:LEADING]],
            }
        )
        entries.append(_in_full(thoughts, number, weighting))
    made.groups.append({"prompt": tokens.decode(group[0].trajectory.prompt_ids), "samples": entries})


def _in_full(thoughts: Thoughts, number: Any, weighting: str) -> dict[str, Any]:
    t, record = thoughts.trajectory, thoughts.record
    entry: dict[str, Any] = {
        "ids": [[number(token) for token in step] for step in t.latent_ids],
        "logp": _lists(t.latent_log_probs),
        "noise": _lists(thoughts.noise),
        "tau": t.sampling.tau,
        "noisy": t.sampling.noise_mode != "off",
        "hard": [number(token) for token in t.hard_ids],
        "hard_logp": _lists(t.hard_log_probs),
        "rollout": _lists(behaviour_log_probs(thoughts, weighting)),
        "worker": t.worker,
        "engine": t.engine,
        "seconds": _round(t.generation_seconds),
    }
    if record is not None:
        entry["update"] = {
            "outcome": record.outcome,
            "reason": record.reason,
            "winner": bool(record.winner),
            "index": record.update_index,
            "applied": record.update_applied,
            "grad_norm": _round(record.update_grad_norm),
        }
    if record is not None and thoughts.taught:
        entry |= {
            "old": _lists(record.old_log_probs),
            "new": _lists(record.new_log_probs),
            "ratio": _lists(record.ratios),
            "advantage": _lists(record.step_advantages),
            "clip": [thoughts.clip(step) for step in range(t.num_steps)],
            "flip": _lists(record.flip_shares),
        }
    return entry


def _lists(values: np.ndarray) -> list[Any]:
    """Returns nested lists of numbers with five significant digits; NaN and infinity become null."""
    if values.ndim > 1:
        return [_lists(row) for row in values]
    return [_round(value) for value in values.tolist()]


def _round(value: float | None) -> float | None:
    return float(f"{value:.5g}") if value is not None and np.isfinite(value) else None


def shorten_prompts(made: Sample) -> None:
    """Sets `question`: the prompt without what all prompts begin and end with (instruction, chat template)."""
    prompts = sorted({group["prompt"] for group in made.groups})
    start = _common_start(prompts)
    end = _common_start(sorted(prompt[start:][::-1] for prompt in prompts))
    if end:  # the mark that ends every question belongs to the questions
        ending = prompts[0][-end:]
        end -= len(ending) - len(ending.lstrip(SENTENCE_ENDS))
    for group in made.groups:
        whole = group["prompt"]
        group["question"] = whole[start : len(whole) - end].strip() or whole
    for entry in made.trajectories:
        entry["question"] = made.groups[entry["group"]]["question"]


def write_out(made: Sample, settings: dict[str, Any]) -> None:
    """Sets `written`: the chain of thought in words, where the task can compute it (chain arithmetic can)."""
    tasks = [*settings.get("tasks", []), *(settings.get("evaluation") or {}).get("tasks", [])]
    modulus = {
        task["name"]: task.get("options", {}).get("modulus", MODULUS)
        for task in tasks
        if task.get("path") == "builtin:chain_arithmetic"
    }
    modulus = {name: size for name, size in modulus.items() if isinstance(size, int) and size > 0}
    task_of = {entry["group"]: entry["task"] for entry in made.trajectories}
    for number, group in enumerate(made.groups):
        parts = re.findall(r"\d+|[-+*]", group["question"])
        numbers, operators = parts[0::2], parts[1::2]
        asked = "".join(parts) == group["question"] and len(numbers) == len(operators) + 1
        if task_of[number] in modulus and asked and all(n.isdigit() for n in numbers):
            group["written"] = solve([int(n) for n in numbers], operators, modulus[task_of[number]])[0]


def _common_start(ordered: Sequence[str]) -> int:
    """Returns how many characters all texts begin with; never a part of a word or a number."""
    if len(ordered) < 2:
        return 0
    first, last = ordered[0], ordered[-1]
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    while common and first[common - 1].isalnum():
        common -= 1
    return common
