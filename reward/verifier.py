"""What a verifier is, what it answers with, and how one is found by name.

A verifier decides whether a response text answers a problem. It is named in a configuration by its *kind*: a registered
name (`math`, `number`, `choice`, ...), the import path of a class (`my_package.my_module:MyVerifier`), or a name that
the configuration itself defines as a kind with options (`Definitions`). A registered name is only a short form of an
import path, because grader processes share no memory with the process that registers.

    >>> load_verifier("number").grade(r"So the answer is \\boxed{18 dollars}.", "18")
    Grade(reward=1.0, reason='correct', parsed='18')
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, get_args, runtime_checkable

Reason = Literal["correct", "wrong", "no_answer", "timeout", "out_of_memory", "ungraded"]
REASONS: tuple[str, ...] = get_args(Reason)

ANY_OF = "\x1e"
"""Stands between golds of which any is right, in the one text that a gold is (ASCII's record separator)."""

_MAX_PARSED_CHARS = 500


@dataclass(frozen=True, slots=True)
class Grade:
    """The verdict on one response.

    `reward` is None exactly when `reason` is `ungraded`: the verifier itself failed, and the sample must stay out of
    group statistics. `timeout` and `out_of_memory` are the response's own fault and carry reward 0. `parsed` is what
    was taken to be the answer, for people to look at; None when nothing was.
    """

    reward: float | None
    reason: Reason
    parsed: str | None = None

    def __post_init__(self) -> None:
        if self.reason not in REASONS:
            raise ValueError(f"Grade.reason is {self.reason!r}; it must be one of {', '.join(REASONS)}.")
        if (self.reward is None) != (self.reason == "ungraded"):
            raise ValueError(
                f"Grade has reward {self.reward!r} with reason {self.reason!r}; it is None for `ungraded` only."
            )
        if self.reward is not None and not abs(self.reward) < float("inf"):
            raise ValueError(f"Grade.reward is {self.reward!r}; it must be a finite number.")
        if self.parsed is not None and len(self.parsed) > _MAX_PARSED_CHARS:
            object.__setattr__(self, "parsed", self.parsed[:_MAX_PARSED_CHARS] + "…")


Verdict = TypeVar("Verdict", bound=Grade | None)


@runtime_checkable
class Verifier(Protocol):
    """Grades responses of one kind. Built once in each grader process, then called for one response after another.

    `grade` may be an ordinary or an `async` method; all `async` calls of a process run in one event loop, so that a
    client or session made in one call serves in the next. It may raise: the pool tries once more and then reports
    `ungraded`. It needs no time or memory limit of its own: the pool ends the process that exceeds them.
    A verifier may also have `parses_gold(gold) -> bool`, which the task loader asks before a run starts, and
    `warm_up()`, which a grader process calls once before time limits count.
    """

    def grade(self, response_text: str, gold: str) -> Grade | Awaitable[Grade]:
        """The verdict on `response_text`, the decoded visible tokens, given the reference answer `gold`.

        Of a problem with several golds it is asked about one after another, until one of them makes it `correct`.
        """
        ...


class UnknownVerifierError(ValueError):
    """The kind in a configuration names no verifier that can be imported and built; the message says what to write."""


class UnreadableGoldError(ValueError):
    """A gold answer that its verifier cannot grade against: the data is at fault, not the response."""


_REGISTERED: dict[str, str] = {
    "choice": "latent_grpo.reward.answers:ChoiceVerifier",
    "format": "latent_grpo.reward.composition:Format",
    "gate": "latent_grpo.reward.composition:Gate",
    "length_penalty": "latent_grpo.reward.composition:LengthPenalty",
    "math": "latent_grpo.reward.answers:MathVerifier",
    "number": "latent_grpo.reward.answers:NumberVerifier",
    "reference_choice": "latent_grpo.reward.reference:ReferenceChoice",
    "reference_math": "latent_grpo.reward.reference:ReferenceMath",
    "reference_number": "latent_grpo.reward.reference:ReferenceNumber",
    "weighted_sum": "latent_grpo.reward.composition:WeightedSum",
}
_MAX_NESTING = 20


def register(name: str, import_path: str) -> None:
    """Make `name` a short form of `import_path` (`package.module:Class`) in this process and in pools it starts.

    Raises ValueError when the name is taken by another path or either argument has the wrong form.
    """
    if not name.isidentifier():
        raise ValueError(f"A verifier's registered name is {name!r}; it must be an identifier such as 'my_verifier'.")
    if not _is_import_path(import_path):
        raise ValueError(f"Verifier {name!r} is registered with {import_path!r}; expected 'package.module:Class'.")
    taken = _REGISTERED.setdefault(name, import_path)
    if taken != import_path:
        raise ValueError(
            f"Verifier {name!r} is already registered as {taken!r}; choose another name for {import_path!r}."
        )


def registered_kinds() -> tuple[str, ...]:
    """The names that may be written instead of an import path, sorted."""
    return tuple(sorted(_REGISTERED))


def import_path_of(kind: str, defined: Iterable[str] = ()) -> str:
    """The import path behind `kind`, without importing it. Raises UnknownVerifierError for an unregistered name.

    `defined`: further names that the message lists.
    """
    if kind in _REGISTERED:
        return _REGISTERED[kind]
    if _is_import_path(kind):
        return kind
    raise UnknownVerifierError(
        f"Unknown verifier {kind!r}. Allowed: {', '.join([*registered_kinds(), *defined])}, "
        "or the import path of a class such as 'my_package.my_module:MyVerifier'."
    )


def load_verifier(kind: str, /, **options: Any) -> Verifier:
    """Import and build the verifier of a kind; `options` go to its constructor.

    Raises UnknownVerifierError when the name is not registered, the import fails, the attribute is missing or cannot be
    built with these options, or the result has no `grade` method.
    """
    path = import_path_of(kind)
    module_name, _, attribute = path.partition(":")
    if _is_this_package(module_name):
        raise UnknownVerifierError(
            f"Verifier {kind!r}: 'reward' is in a checkout of this program, which is imported as 'latent_grpo'."
            f"{_new_path_of(path)}"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UnknownVerifierError(
            f"Verifier {kind!r}: module {module_name!r} cannot be imported ({error}). "
            f"Install its package, or put its folder on PYTHONPATH of every rollout worker.{_new_path_of(path)}"
        ) from error
    factory = getattr(module, attribute, None)
    if factory is None:
        raise UnknownVerifierError(
            f"Verifier {kind!r}: module {module_name!r} has no attribute {attribute!r}.{_new_path_of(path)}"
        )
    if inspect.isclass(factory) or options:
        try:
            verifier = factory(**options)
        except UnknownVerifierError:
            raise
        except (TypeError, ValueError) as error:
            raise UnknownVerifierError(
                f"Verifier {kind!r} cannot be built with options {options!r}: {error}."
            ) from error
    else:
        verifier = factory
    if not isinstance(verifier, Verifier):
        raise UnknownVerifierError(
            f"Verifier {kind!r} is a {type(verifier).__name__} without a `grade(response_text, gold)` method."
        )
    return verifier


class Definitions:
    """Verifiers that a configuration defines: name -> {"kind": ..., "options": {...}}.

    The options of a composition hold verifiers again, each a mapping with `kind` (and `options`); their kinds may be
    names defined here too. `defaults`: options of a kind wherever it occurs and does not give them itself.

    >>> Definitions({"mine": {"kind": "number", "options": {"fallback": "last_number"}}}).resolve("mine")
    ('latent_grpo.reward.answers:NumberVerifier', {'fallback': 'last_number'})
    """

    def __init__(
        self,
        definitions: Mapping[str, Mapping[str, Any]] | None = None,
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._definitions = dict(definitions or {})
        self._defaults = {kind: dict(options) for kind, options in (defaults or {}).items()}
        for name, definition in self._definitions.items():
            if name in _REGISTERED or not name.replace("-", "_").isidentifier():
                raise UnknownVerifierError(
                    f"A verifier is defined with the name {name!r}; it must be an identifier other than "
                    f"{', '.join(registered_kinds())}."
                )
            _check_definition(definition, f"Verifier {name!r}")

    def resolve(self, kind: str) -> tuple[str, dict[str, Any]]:
        """(import path, options) of a kind, with every name inside the options replaced by what it stands for.

        Raises UnknownVerifierError for a name that is neither defined nor registered, or defined by itself.
        """
        resolved = self._resolved({"kind": kind}, 0)
        return resolved["kind"], resolved.get("options", {})

    def build(self, kind: str) -> Verifier:
        """The verifier of a kind, imported and built. Raises UnknownVerifierError."""
        path, options = self.resolve(kind)
        return load_verifier(path, **options)

    def _resolved(self, definition: Mapping[str, Any], depth: int) -> dict[str, Any]:
        """The definition with an import path as its kind; other keys (such as a weight) stay."""
        _check_definition(definition, "A verifier")
        kind, options = definition["kind"], dict(definition.get("options") or {})
        if depth > _MAX_NESTING:
            raise UnknownVerifierError(f"Verifier {kind!r} is defined by itself, or more than {_MAX_NESTING} deep.")
        if kind in self._definitions:
            own = self._definitions[kind]
            merged = {**(own.get("options") or {}), **options}
            return self._resolved({**definition, "kind": own["kind"], "options": merged}, depth + 1)
        path = import_path_of(kind, self._definitions)
        options = {**self._defaults.get(kind, {}), **options}
        inside = {key: self._resolved_inside(value, depth + 1) for key, value in options.items()}
        return {**definition, "kind": path, "options": inside}

    def _resolved_inside(self, value: Any, depth: int) -> Any:
        if isinstance(value, Mapping):
            return self._resolved(value, depth) if "kind" in value else dict(value)
        return [self._resolved_inside(item, depth) for item in value] if isinstance(value, list | tuple) else value


def judged(grade_against: Callable[[str], Verdict], gold: str) -> Verdict:
    """The verdict on a response whose `gold` may be several golds of which any is right (:data:`ANY_OF`).

    grade_against: the verdict against one of them; None where it is not known yet.
    It is the first `correct` verdict, else one that is not known or `ungraded`, else that of the highest reward. Golds
    that cannot be read are passed over; raises UnreadableGoldError when none can.
    """
    golds = gold.split(ANY_OF)
    if len(golds) == 1:
        return grade_against(gold)
    found: list[Verdict] = []
    unreadable: UnreadableGoldError | None = None
    for one in golds:
        try:
            verdict = grade_against(one)
        except UnreadableGoldError as error:
            unreadable = error
            continue
        if verdict is not None and verdict.reason == "correct":
            return verdict
        found.append(verdict)
    if not found and unreadable is not None:
        raise unreadable
    return max(found, key=lambda verdict: math.inf if verdict is None or verdict.reward is None else verdict.reward)


def settled(verdict: Grade | Awaitable[Grade]) -> Grade:
    """The verdict that a verifier's `grade` gave, waited for if it is `async`. Raises TypeError for anything else."""
    if inspect.isawaitable(verdict):
        runner = getattr(_loops, "runner", None)
        if runner is None:
            runner = _loops.runner = asyncio.Runner()
        verdict = runner.run(_awaited(verdict))
    if not isinstance(verdict, Grade):
        raise TypeError(f"the verifier answered with {type(verdict).__name__}; expected a Grade")
    return verdict


_loops = threading.local()


async def _awaited(verdict: Awaitable[Grade]) -> Grade:
    return await verdict


def _check_definition(definition: Any, what: str) -> None:
    known = isinstance(definition, Mapping) and isinstance(definition.get("kind"), str)
    options = definition.get("options") if known else None
    if not known or not isinstance(options or {}, Mapping):
        raise UnknownVerifierError(
            f"{what} is defined as {definition!r:.200}; expected a mapping with `kind` (a name or import path) and, "
            "if it needs any, `options` (a mapping)."
        )


def _is_this_package(module_name: str) -> bool:
    """Whether the top-level name `reward` leads here: modules would be loaded a second time, under another name."""
    if module_name.partition(".")[0] != "reward":
        return False
    spec = importlib.util.find_spec("reward")
    here = os.path.join(os.path.dirname(__file__), "__init__.py")
    return spec is not None and spec.origin is not None and os.path.samefile(spec.origin, here)


def _new_path_of(path: str) -> str:
    """The end of an error's message where this package was imported as `reward`, as it was up to version 0.1.0."""
    module_name, _, attribute = path.partition(":")
    if module_name.partition(".")[0] != "reward":
        return ""
    try:
        here = hasattr(importlib.import_module(f"latent_grpo.{module_name}"), attribute)
    except ImportError:
        return ""
    return f" Since version 0.2.0 it is 'latent_grpo.{path}'." if here else ""


def _is_import_path(text: str) -> bool:
    module, colon, attribute = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), attribute])
