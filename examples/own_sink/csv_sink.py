"""A metric sink of your own: the figures of every step as a CSV file in the run's folder.

`RUN/metrics.jsonl` has everything and is always written. A sink is a further view: a dashboard, a chat room, a
spreadsheet. One that raises while a run goes on is switched off with a warning; the run goes on.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

COLUMNS = ("rollout/reward", "rollout/latent_steps", "learner/loss", "time/step_s")


class CsvSink:
    """Named in the settings by its import path: `metrics.sinks: [csv_sink:CsvSink]`."""

    def __init__(self, run_folder: Path) -> None:
        # Made once when a run starts, and again when it is resumed: what is there already must stay.
        path = run_folder / "curve.csv"
        is_new = not path.exists()
        self._file = path.open("a", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        if is_new:
            self._rows.writerow(["step", *COLUMNS])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """After every step. Values are finite; which names there are depends on the step.

        An evaluation's and the self-test's figures come too, as `evaluation/...` and `self_test/...`.
        """
        if not any(name in values for name in COLUMNS):
            return
        self._rows.writerow([step, *(values.get(name, "") for name in COLUMNS)])
        self._file.flush()  # a run may be killed

    def close(self) -> None:
        """At the end of the run."""
        self._file.close()
