"""Verifiers made of verifiers, by configuration: a weighted sum, a format reward, a length penalty, a gate.

    shaped:
      kind: weighted_sum
      options:
        parts:
          - {kind: math, weight: 1.0}
          - {kind: format, weight: 0.1, options: {pattern: '</think>.*\\\\boxed'}}

A verifier inside the options is a mapping with `kind` (a registered name, an import path, or a name that the
configuration defines) and `options`. Inner verifiers may be `async`. They run in the same grader process, one after
another, under one limit of time and memory. `ungraded` of any of them is `ungraded` of the whole: a part of a reward
is not the reward.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from latent_grpo.reward.extraction import extract
from latent_grpo.reward.verifier import Grade, Verifier, load_verifier, settled

Definition = Mapping[str, Any]
"""{"kind": ..., "options": {...}}"""

_UNGRADED = Grade(None, "ungraded")


class WeightedSum:
    """`weighted_sum`: the sum of weight x reward. `parts`: verifiers with a `weight` each, in the order they are run.

    Reason and parsed answer are the first part's: put the verifier that judges the answer first.
    """

    def __init__(self, parts: Sequence[Definition]) -> None:
        if not parts:
            raise ValueError("weighted_sum needs at least one part")
        self._weights = [_number("weight", part.get("weight")) for part in parts]
        self._parts = [_built(part, allowed={"weight"}) for part in parts]

    def grade(self, response_text: str, gold: str) -> Grade:
        """The sum; the parts' verdicts on the same response."""
        grades = [settled(part.grade(response_text, gold)) for part in self._parts]
        total = 0.0
        for weight, grade in zip(self._weights, grades, strict=True):
            if grade.reward is None:
                return _UNGRADED
            total += weight * grade.reward
        return Grade(total, grades[0].reason, grades[0].parsed)

    def parses_gold(self, gold: str) -> bool:
        """Whether every part can grade against `gold`."""
        return _all_parse(self._parts, gold)

    def warm_up(self) -> None:
        """Each part's own."""
        _warm_up(self._parts)


class Format:
    """`format`: 1 if the response has a form, whatever it answers; the gold is not looked at.

    pattern: a regular expression that is searched in the response (a dot matches line breaks too); without one the
        form is a last `\\boxed{}` that is well-formed and not empty.
    """

    def __init__(self, pattern: str | None = None) -> None:
        try:
            self._pattern = None if pattern is None else re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error

    def grade(self, response_text: str, gold: str) -> Grade:
        """`correct` where the form is kept, else `wrong`."""
        if self._pattern is None:
            kept = extract(response_text).source == "box"
        else:
            kept = self._pattern.search(response_text) is not None
        return Grade(1.0, "correct") if kept else Grade(0.0, "wrong")


class LengthPenalty:
    """`length_penalty`: a verifier's reward less a penalty for long responses.

    Up to `free_chars` characters nothing is taken off, from `max_chars` on the whole `penalty`, in between a share that
    rises linearly. Counted is the response text, which is the visible part: latent steps have no text.
    """

    def __init__(self, verifier: Definition, free_chars: int, max_chars: int, penalty: float) -> None:
        if not 0 <= free_chars < max_chars:
            raise ValueError(f"free_chars ({free_chars}) must be at least 0 and below max_chars ({max_chars})")
        self._verifier = _built(verifier)
        self._free, self._max, self._penalty = free_chars, max_chars, _number("penalty", penalty)

    def grade(self, response_text: str, gold: str) -> Grade:
        """The inner verdict with the penalty taken off its reward."""
        grade = settled(self._verifier.grade(response_text, gold))
        if grade.reward is None:
            return _UNGRADED
        share = min(max((len(response_text) - self._free) / (self._max - self._free), 0.0), 1.0)
        return Grade(grade.reward - self._penalty * share, grade.reason, grade.parsed)

    def parses_gold(self, gold: str) -> bool:
        """The inner verifier's."""
        return _all_parse([self._verifier], gold)

    def warm_up(self) -> None:
        """The inner verifier's."""
        _warm_up([self._verifier])


class Gate:
    """`gate`: a verifier that is asked only if a condition holds: a form before a judge, a cheap check before a dear.

    The gate opens when the condition's reward is above `threshold`; then the verdict is that of `then`. A closed gate
    gives the reward `closed_reward`, with the condition's reason.
    """

    def __init__(
        self, condition: Definition, then: Definition, threshold: float = 0.0, closed_reward: float = 0.0
    ) -> None:
        self._condition, self._then = _built(condition), _built(then)
        self._threshold, self._closed_reward = _number("threshold", threshold), _number("closed_reward", closed_reward)

    def grade(self, response_text: str, gold: str) -> Grade:
        """The verdict of `then`, or that of a closed gate."""
        grade = settled(self._condition.grade(response_text, gold))
        if grade.reward is None:
            return _UNGRADED
        if grade.reward > self._threshold:
            return settled(self._then.grade(response_text, gold))
        return Grade(self._closed_reward, "wrong" if grade.reason == "correct" else grade.reason, grade.parsed)

    def parses_gold(self, gold: str) -> bool:
        """Whether both can grade against `gold`."""
        return _all_parse([self._condition, self._then], gold)

    def warm_up(self) -> None:
        """Both verifiers' own."""
        _warm_up([self._condition, self._then])


def _built(definition: Definition, allowed: frozenset[str] | set[str] = frozenset()) -> Verifier:
    if not isinstance(definition, Mapping) or not isinstance(definition.get("kind"), str):
        raise ValueError(f"an inner verifier is {definition!r:.200}; expected a mapping with `kind` and `options`")
    unknown = set(definition) - {"kind", "options"} - allowed
    if unknown:
        raise ValueError(
            f"the inner verifier {definition['kind']!r} has the unknown key {sorted(unknown)[0]!r}; "
            f"allowed: {', '.join(['kind', 'options', *sorted(allowed)])}"
        )
    return load_verifier(definition["kind"], **(definition.get("options") or {}))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise ValueError(f"{name} is {value!r}; it must be a finite number")
    return float(value)


def _all_parse(verifiers: Sequence[Verifier], gold: str) -> bool:
    return all(verifier.parses_gold(gold) for verifier in verifiers if hasattr(verifier, "parses_gold"))


def _warm_up(verifiers: Sequence[Verifier]) -> None:
    for verifier in verifiers:
        if hasattr(verifier, "warm_up"):
            verifier.warm_up()
