"""Which of a run's checkpoints is best by validation: their scores, in a file beside them.

    checkpoints/scores.json    {"metric": "evaluation/pass_at_1", "scores": {"00003-step-000020": 0.53, ...}}

A score belongs to a folder's name and not to its step, since a run that was rewound passes the same steps again. Scores
of checkpoints that are gone are dropped; of equal scores the earlier checkpoint is the better one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from latent_grpo.common.files import read_text, write_atomically
from latent_grpo.learner.checkpoint import (
    Checkpoint,
    CheckpointError,
    Skipped,
    list_checkpoints,
    verify_checkpoint,
)

FILE = "scores.json"


class Scores:
    """The scores of the checkpoints below `root` by `metric`, of which more is better. Scores by another are dropped.

    Raises :class:`CheckpointError` for a damaged file.
    """

    def __init__(self, root: str | Path, metric: str) -> None:
        self._root, self.metric = Path(root), metric
        stored = read_scores(self._root)
        self.other_metric = stored[0] if stored and stored[0] != metric else None
        """The metric of the scores that were dropped, if any were."""
        self._scores = stored[1] if stored and stored[0] == metric else {}

    @property
    def best(self) -> str | None:
        """The name of the best checkpoint that is there; None without a score."""
        return next((path.name for _, path, _ in _ranked(self._root, self._scores)), None)

    def improves(self, value: float) -> bool:
        """Whether a checkpoint with this score would be the best one."""
        best = self.best
        return not math.isnan(value) and (best is None or value > self._scores[best])

    def record(self, name: str, value: float) -> None:
        """Stores the score of a checkpoint, by the name of its folder."""
        present = {path.name for _, path in list_checkpoints(self._root)}
        self._scores = {key: score for key, score in self._scores.items() if key in present} | {name: value}
        self._write()

    def drop_damaged(self) -> list[Skipped]:
        """Forgets the best checkpoint while it is damaged, so that another may be best; returns what was skipped."""
        skipped = []
        while (best := self.best) is not None:
            try:
                verify_checkpoint(self._root / best)
            except CheckpointError as error:
                skipped.append(Skipped(path=self._root / best, reason=str(error)))
                del self._scores[best]
            else:
                break
        if skipped:
            self._write()
        return skipped

    def _write(self) -> None:
        content = {"metric": self.metric, "scores": self._scores}
        write_atomically(self._root / FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")


def best_checkpoint(root: str | Path) -> tuple[Checkpoint, str, float] | None:
    """Returns the best complete checkpoint, its metric and its score; None if none has a score.

    Better ones that are damaged are in its `skipped`. Raises :class:`CheckpointError` where all are.
    """
    stored = read_scores(Path(root))
    if stored is None:
        return None
    skipped: list[Skipped] = []
    for step, path, score in _ranked(Path(root), stored[1]):
        try:
            state = verify_checkpoint(path)
        except CheckpointError as error:
            skipped.append(Skipped(path=path, reason=str(error)))
            continue
        return Checkpoint(path=path, step=step, state=state, skipped=tuple(skipped)), stored[0], score
    if skipped:
        reasons = "; ".join(f"{s.path.name}: {s.reason}" for s in skipped)
        raise CheckpointError(f"{root}: all checkpoints with a score are damaged ({reasons}); take another by its step")
    return None


def read_scores(root: Path) -> tuple[str, dict[str, float]] | None:
    """Returns (metric, scores by folder name), or None without a file. Raises :class:`CheckpointError`."""
    path = root / FILE
    if not path.exists():
        return None
    try:
        content = json.loads(read_text(path))
        return str(content["metric"]), {str(name): float(score) for name, score in content["scores"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); remove it, and the next evaluation begins the scores anew"
        ) from error


def _ranked(root: Path, scores: dict[str, float]) -> list[tuple[int, Path, float]]:
    """Returns (step, folder, score) of the checkpoints with a score, the best first, of equals the earlier."""
    scored = [(step, path, scores[path.name]) for step, path in list_checkpoints(root) if path.name in scores]
    return sorted(scored, key=lambda found: -found[2])
