"""Cells of a table as text, where a missing cell is empty, whatever its source writes for it."""

from __future__ import annotations

from typing import Any

_MISSING = frozenset({"nan", "NaN", "NaT", "<NA>"})  # of float and NumPy, of Decimal, of pandas


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, pandas' NA. A text is never missing, not even "nan"."""
    return value is None or (not isinstance(value, str) and str(value) in _MISSING)


def cell_text(value: Any) -> str:
    """Returns a cell's text, which is empty for a missing value."""
    return "" if is_missing(value) else str(value)
