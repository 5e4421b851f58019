"""The contents of a trajectory for people: thoughts, tokens, weights, noise, and what the learner did with it.

A *thought* is one latent step: K tokens with the weights at which their embeddings were mixed and fed back. Effective
width is exp(entropy of the weights): 1 if one token has all the weight, K if all have the same share.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from latent_grpo.common.learner_record import CLIPS, LearnerRecord, decode_records, join
from latent_grpo.common.schema import decode, take_rows
from latent_grpo.common.store import DumpError, DumpStore, LearnerStore, TrajectoryStore, read_dump
from latent_grpo.common.types import Trajectory
from latent_grpo.deploy.view.run_view import RunView
from latent_grpo.deploy.view.selection import Row

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TokenTexts:
    """The texts of token ids, by the run's own tokenizer; `missing` says why where they are not available."""

    def __init__(self, tokenizer: Tokenizer | None, missing: str = "") -> None:
        self._tokenizer, self.missing = tokenizer, missing
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        """Returns a token's text, spaces included; `#id` without a tokenizer."""
        if token not in self._known:
            self._known[token] = self._text(int(token))
        return self._known[token]

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return f"#{token}"
        text: str | None = self._tokenizer.decode([token], skip_special_tokens=False)
        if not text or "\ufffd" in text:  # a part of a character, or nothing by itself: the vocabulary's own spelling
            text = self._tokenizer.id_to_token(token)
        return f"#{token}" if text is None else text

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, special tokens included; `#ID` each without a tokenizer."""
        if self._tokenizer is None:
            return " ".join(f"#{token}" for token in ids)
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def run_tokens(run: RunView) -> TokenTexts:
    """Loads the token texts from the run's folder, or from the model that its settings name."""
    from tokenizers import Tokenizer

    named = run.settings.get("model", {}).get("path")
    folders = [run.folder.model, run.folder.path / "initial", run.folder.base_model, *([Path(named)] if named else [])]
    damaged = ""
    for file in (folder / "tokenizer.json" for folder in folders):
        if file.is_file():
            try:
                return TokenTexts(Tokenizer.from_file(str(file)))
            except Exception as error:  # tokenizers raises bare Exception
                damaged = damaged or f"{file} cannot be read ({error})"
    if damaged:
        return TokenTexts(None, f"tokens are shown as ids: {damaged}")
    if named:
        from latent_grpo.common.models import load_tokenizer

        try:
            fast = load_tokenizer(named).backend_tokenizer
        except Exception as error:  # the hub's client, a foreign tokenizer class: any failure loses only the texts
            return TokenTexts(
                None, f"tokens are shown as ids: the tokenizer of {named} cannot be loaded here ({error})"
            )
        return TokenTexts(fast)
    return TokenTexts(None, f"tokens are shown as ids: no tokenizer.json below {run.folder.path}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thoughts:
    """One trajectory with everything that is recorded about it: L latent steps, T response steps."""

    row: Row
    trajectory: Trajectory
    record: LearnerRecord | None  # None: the learner left none
    weights: np.ndarray  # [L, K] float32: softmax(scores / tau), what was mixed
    noise: np.ndarray  # [L, K] float32: score - log p, the noise as it was added
    entropy: np.ndarray  # [L] of the weights, in nats

    @property
    def width(self) -> np.ndarray:
        """The effective number of tokens in each mixture, [L]."""
        return np.exp(self.entropy)

    @property
    def taught(self) -> bool:
        """Whether the record has the learner's step columns."""
        return self.record is not None and len(self.record.old_log_probs) > 0

    def learner(self, name: str) -> np.ndarray | None:
        """Returns a step column [T] of the learner's record; None if the trajectory was not trained on."""
        return getattr(self.record, name) if self.taught else None

    def clip(self, step: int) -> str:
        """Returns which bound stopped the step's gradient (METHOD §5); empty if none did."""
        clipped = self.learner("clipped")
        return "" if clipped is None else CLIPS[int(clipped[step])]


def load(run: RunView, rows: Sequence[Row]) -> list[Thoughts]:
    """Loads the rows' trajectories with the learner's records, in their order. Raises DumpError.

    Rows of one file that follow each other cost one pass over it.
    """
    found: list[Thoughts] = []
    for _, same_file in itertools.groupby(rows, key=lambda row: row.file.path):
        chosen = list(same_file)
        trajectories, records = _read(chosen[0].file.path, TrajectoryStore), _learner_records(run, chosen[0])
        chosen_batch = take_rows(trajectories, [row.index for row in chosen])
        made = {} if records is None else _records_of(chosen_batch, records)
        found += [
            _thoughts(row, trajectory, made.get(place))
            for place, (row, trajectory) in enumerate(zip(chosen, decode(chosen_batch), strict=True))
        ]
    return found


def _learner_records(run: RunView, row: Row) -> pa.RecordBatch | None:
    """Loads the learner records of the row's file; None if they cannot be read (then named in `unreadable`)."""
    path = run.records_path(row.file)
    if not path.exists():
        return None
    try:
        return _read(path, LearnerStore)
    except DumpError as error:
        run.leave_out(error)
        return None


@lru_cache(maxsize=4)
def _read(path: Path, kind: type[DumpStore]) -> pa.RecordBatch:
    return read_dump(path, kind)


def _records_of(trajectories: pa.RecordBatch, records: pa.RecordBatch) -> dict[int, LearnerRecord]:
    """Returns row of `trajectories` -> its learner record."""
    places = join(trajectories, records)
    with_record = np.flatnonzero(places >= 0)
    return dict(zip(with_record.tolist(), decode_records(take_rows(records, places[with_record])), strict=True))


def _thoughts(row: Row, trajectory: Trajectory, record: LearnerRecord | None) -> Thoughts:
    scores, log_probs = trajectory.latent_scores, trajectory.latent_log_probs
    scaled = scores / np.float32(trajectory.sampling.tau)
    weights = np.exp(scaled - scaled.max(-1, keepdims=True)) if len(scaled) else scaled
    weights = weights / weights.sum(-1, keepdims=True) if len(scaled) else weights
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(weights > 0, weights * np.log(weights), 0.0)
    return Thoughts(
        row=row,
        trajectory=trajectory,
        record=record,
        weights=weights,
        noise=scores - log_probs,
        entropy=-terms.sum(-1),
    )


def behaviour_log_probs(thoughts: Thoughts, component_weighting: str) -> np.ndarray:
    """Returns log pi of each response step at the recorded log-probs, [T] float32 (METHOD §3.1, §3.3, §6)."""
    recorded = thoughts.learner("behaviour_log_probs")
    if recorded is not None:
        return recorded
    import torch

    from latent_grpo.common.density import surrogate_log_prob

    trajectory = thoughts.trajectory
    latent = np.empty(0, np.float32)
    if len(trajectory.latent_ids):
        weights = torch.from_numpy(thoughts.weights.copy()) if component_weighting == "mixture" else None
        log_probs, scores = (
            torch.from_numpy(a.copy()) for a in (trajectory.latent_log_probs, trajectory.latent_scores)
        )
        latent = surrogate_log_prob(log_probs, scores, component_weights=weights).numpy()
    return np.concatenate([latent, trajectory.hard_log_probs])


def drawn_noise(thoughts: Thoughts) -> np.ndarray | None:
    """Computes again the noise that the trajectory's key gives for its tokens, [L, K] float32 (METHOD §2.1, §2.5).

    Returns None where no noise was drawn. It equals `thoughts.noise` up to the rounding of a difference of float32
    numbers.
    """
    import torch

    from latent_grpo.common.noise import GUMBEL_HIGH, GUMBEL_LOW, gumbel_noise, noise_version, trajectory_key

    t = thoughts.trajectory
    if t.sampling.noise_mode == "off" or not len(t.latent_ids):
        return None
    key = trajectory_key(
        run_seed=t.run_seed,
        purpose=t.purpose,
        problem_uid=t.problem_uid,
        epoch=t.epoch,
        sample_index=t.sample_index,
        policy_version=noise_version(t.purpose, t.policy_version_min),
    )
    steps = torch.arange(len(t.latent_ids))
    draws = gumbel_noise(torch.full_like(steps, key), steps, torch.from_numpy(t.latent_ids.astype(np.int64)))
    draws = draws.clamp(GUMBEL_LOW, GUMBEL_HIGH) - (GUMBEL_LOW if t.sampling.noise_mode == "one_sided" else 0.0)
    return (draws * t.sampling.noise_scale).numpy()


def as_json(thoughts: Thoughts, tokens: TokenTexts, component_weighting: str) -> dict[str, Any]:
    """Returns everything about a trajectory as JSON: numbers are those of the record, texts those of the model."""
    t, record = thoughts.trajectory, thoughts.record
    behaviour = behaviour_log_probs(thoughts, component_weighting)
    latent = len(t.latent_ids)
    steps = []
    for i in range(t.num_steps):
        step: dict[str, Any] = {"kind": "latent" if i < latent else "hard", "rollout_log_prob": _number(behaviour[i])}
        if i < latent:
            step |= {
                "tokens": [tokens[j] for j in t.latent_ids[i]],
                "ids": t.latent_ids[i].tolist(),
                "weights": thoughts.weights[i].tolist(),
                "log_probs": t.latent_log_probs[i].tolist(),
                "noise": thoughts.noise[i].tolist(),
                "entropy": float(thoughts.entropy[i]),
                "effective_width": float(thoughts.width[i]),
            }
        else:
            step |= {"token": tokens[t.hard_ids[i - latent]], "id": int(t.hard_ids[i - latent])}
        if record is not None and thoughts.taught:
            step |= {
                "old_log_prob": _number(record.old_log_probs[i]),
                "new_log_prob": _number(record.new_log_probs[i]),
                "ratio": _number(record.ratios[i]),
                "advantage": _number(record.step_advantages[i]),
                "clipped": thoughts.clip(i),
                "flip_share": _number(record.flip_shares[i]),
            }
        steps.append(step)
    drawn = drawn_noise(thoughts)
    return {
        **row_json(thoughts.row),
        "prompt": tokens.decode(t.prompt_ids),
        "response_text": t.response_text,
        "worker": t.worker,
        "engine": t.engine,
        "sampling": {name: getattr(t.sampling, name) for name in t.sampling.__dataclass_fields__},
        "noise_from_keys_max_difference": None if drawn is None else float(np.abs(drawn - thoughts.noise).max()),
        "learner": None if record is None else _record_json(record),
        "steps": steps,
    }


def row_json(row: Row) -> dict[str, Any]:
    """Returns a row of the list as JSON."""
    names = [name for name in row.__dataclass_fields__ if name not in ("file", "index")]
    return {"step": row.step, "purpose": row.purpose, "lineage": row.file.lineage} | {
        name: _number(getattr(row, name)) for name in names
    }


def _record_json(record: LearnerRecord) -> dict[str, Any]:
    names = ("outcome", "reason", "advantage", "winner", "mean_old_log_prob", "update_index", "update_applied",
             "update_loss", "update_grad_norm")  # fmt: skip
    return {name: _number(getattr(record, name)) for name in names}


def _number(value: Any) -> Any:
    """Turns NaN and infinity, which JSON does not have, into null."""
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
