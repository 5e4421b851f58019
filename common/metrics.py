"""The metrics of a run: always one JSON line per step, and the sinks that the user chose.

Reports are made from `metrics.jsonl`, which is flushed line by line and survives a kill. The other sinks only display:
one that fails during a run is switched off with a warning, because a dashboard must not end hours of training.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_grpo.common.errors import MetricsError
from latent_grpo.common.files import opened
from latent_grpo.common.sinks import MetricSink, make_sink

FILE = "metrics.jsonl"

log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes the metrics of one run. A context manager; `close` closes every sink.

    Example::

        with MetricsWriter(run_folder, ["console"]) as metrics:
            metrics.write(step, {"rollout/reward": 0.4}, lineage=0)
    """

    def __init__(self, run_folder: str | Path, sinks: Sequence[str] = ()):
        folder = Path(run_folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._record = JSONLSink(folder / FILE)
        self._sinks: dict[str, MetricSink] = {}
        try:
            for name in sinks:
                self._sinks[name] = make_sink(name, folder)
        except BaseException:
            self.close()
            raise

    def write(self, step: int, values: Mapping[str, Any], *, kind: str = "train", lineage: int = 0) -> None:
        """Writes one line of the record, then to every sink. Numbers only; a non-finite one is recorded as null."""
        numeric = {name: _as_number(name, value) for name, value in values.items()}
        self._record.write(step, numeric, kind=kind, lineage=lineage)
        finite = {name: value for name, value in numeric.items() if math.isfinite(value)}
        shown = finite if kind == "train" else {f"{kind}/{name}": value for name, value in finite.items()}
        for name in list(self._sinks):
            self._guarded(name, lambda sink: sink.write(step, shown))

    def close(self) -> None:
        """Closes the record and every sink; what a sink raises is only logged."""
        self._record.close()
        for name in list(self._sinks):
            self._guarded(name, lambda sink: sink.close())
        self._sinks.clear()

    def _guarded(self, name: str, action: Callable[[MetricSink], None]) -> None:
        try:
            action(self._sinks[name])
        except Exception as error:  # third-party code (network, file formats): any failure loses only a display
            log.warning("metric sink %s switched off: %s: %s", name, type(error).__name__, error)
            del self._sinks[name]

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_number(name: str, value: Any) -> float:
    if hasattr(value, "item"):  # NumPy and torch scalars
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise TypeError(f"metric {name}: expected a number, got {type(value).__name__} ({value!r})")
    return float(value)


def read_metrics(
    path: str | Path, *, kind: str | None = "train", lineage: int | None = None, left_out: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Reads the lines of a record, oldest first; `path` is a run folder or the file.

    Without a `lineage` it reads the live history. A torn last line (the run was killed while writing it) is left out. A
    step that a restart repeated counts once. A damaged line raises :class:`MetricsError`, or is left out where there is
    a list `left_out`, which gets a sentence for each.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    rows = [row for row in _rows(path, left_out) if kind is None or row["kind"] == kind]
    if lineage is not None:
        yield from (row for row in rows if row["lineage"] == lineage)
        return
    newest: dict[tuple[str, int], int] = {}  # (kind, lineage) -> first step of that lineage
    for row in rows:
        newest.setdefault((row["kind"], row["lineage"]), row["step"])
    for row in rows:
        overtaken = (k == row["kind"] and a > row["lineage"] and s <= row["step"] for (k, a), s in newest.items())
        if not any(overtaken):
            yield row


LARGEST = sys.float_info.max
LATEST = 253402300800.0  # seconds since 1970 at the end of the year 9999


def is_count(value: Any) -> bool:
    """Whether a value of JSON is a whole number from 0 up, as a step, that a column of 64 bits holds."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number that a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


FITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (lambda value: isinstance(value, str), "a text"),
    "step": (is_count, "a whole number from 0 up"),
    "lineage": (is_count, "a whole number from 0 up"),
    "time": (lambda value: is_number(value) and 0 <= value < LATEST, "seconds since 1970"),
    "metrics": (lambda value: isinstance(value, dict), "a mapping of numbers"),
}


def _fault(row: Any) -> str | None:
    """Says what is wrong with a line of metrics; None: nothing."""
    if not isinstance(row, dict):
        return f"expected a mapping, got {row!r:.60}"
    for name, (fits, what) in FITS.items():
        if not fits(row.get(name)):
            return f"{name}: expected {what}, got {repr(row[name])[:60] if name in row else 'nothing'}"
    wrong = (name for name, value in row["metrics"].items() if not (value is None or is_number(value)))
    if (first := next(wrong, None)) is not None:
        return f"metrics.{first}: expected a finite number or null, got {row['metrics'][first]!r:.60}"
    return None


def _rows(path: Path, left_out: list[str] | None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a record; a torn last line is left out. Raises :class:`MetricsError`."""
    for number, line in whole_lines(path):
        try:
            row = parsed_line(path, number, line)
            if (fault := _fault(row)) is not None:
                raise MetricsError(f"{path}, line {number}: not a line of metrics: {fault}; remove that line")
        except MetricsError as error:
            if left_out is None:
                raise
            left_out.append(str(error))
        else:
            yield row


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line) of a :class:`LineFile`; a torn last line is left out. Raises MetricsError."""
    try:
        with opened(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    log.warning("%s: line %d is torn and left out", path, number)
                    return
                yield number, line
    except FileNotFoundError as error:
        raise MetricsError(f"{path}: no such file; is {path.parent} the folder of a run that has begun?") from error
    except OSError as error:
        raise MetricsError(
            f"{path} cannot be read: {error.strerror or error}; move away what is there, or bring it back from a copy"
        ) from error


def parsed_line(path: Path, number: int, line: bytes) -> Any:
    """Parses a line of :func:`whole_lines`. Raises :class:`MetricsError`, which names the line."""
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise MetricsError(f"{path}, line {number}: not JSON: {error}; remove that line") from error


class LineFile:
    """Appends JSON objects to a file, one per line, flushed at once. Raises :class:`MetricsError`."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._file = path.open("ab+")
            self._cut_torn_line()
        except OSError as error:
            raise MetricsError(f"{path}: cannot be recorded: {error.strerror or error}") from error

    def _cut_torn_line(self) -> None:
        """Cuts a line that a killed run left unfinished, since it would corrupt the next one."""
        end = self._file.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 65536)
            self._file.seek(start)
            newline = self._file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            self._file.truncate(position)

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a row as one line of JSON. Raises MetricsError where the file takes no more, ValueError for NaN."""
        try:
            self._file.write((json.dumps(row, allow_nan=False) + "\n").encode())
            self._file.flush()
        except OSError as error:
            raise MetricsError(f"{self._path}: not recorded: {error.strerror or error}") from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


# --- sinks ---------------------------------------------------------------------------------------------------------


class JSONLSink:
    """`{"step": 3, "kind": "train", "lineage": 0, "time": ..., "metrics": {...}}` per line, flushed at once."""

    def __init__(self, path: Path):
        self._lines = LineFile(path)

    def write(self, step: int, values: Mapping[str, float], *, kind: str = "train", lineage: int = 0) -> None:
        """Appends a line with the metrics; those that are not finite are null, and listed."""
        row: dict[str, Any] = {"step": step, "kind": kind, "lineage": lineage, "time": round(time.time(), 3)}
        row["metrics"] = {name: value if math.isfinite(value) else None for name, value in values.items()}
        if bad := [name for name, value in values.items() if not math.isfinite(value)]:
            row["non_finite"] = bad
        self._lines.append(row)

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()
