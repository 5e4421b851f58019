"""Generators of problems: their Protocol, and the wrapper that checks a user's own generator while it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from latent_grpo.common.config import ConfigError, TaskConfig
from latent_grpo.common.plugins import PluginError, load_plugin
from latent_grpo.common.types import Problem

PREFIX = "python:"
CHECKED_PROBLEMS = 8  # problems that are checked at the start


class GeneratorError(ConfigError):
    """A user's generator that cannot be made, or that makes unusable problems. The message says what to change."""


class Generator(Protocol):
    """The plug point: a program that makes problems, named as `path: builtin:NAME` or `python:package.module:Name`.

    It is made with `name` (the task's), `seed` (the run's), `split` and the task's `options`, which may also give
    another seed or split. It makes the problem of any index, always and everywhere the same one. A problem's uid is
    `NAME/` and a part that no other problem of the task has. `split` is `training` or `evaluation`: no problem is in
    both, whatever the seed, since Latent-SFT is evaluated on the second. An attribute `size` says how many problems
    there are; without it the task is endless. `latent_grpo.common.testing.check_task` is the contract.
    """

    def problem(self, index: int) -> Problem:
        """Returns the problem of an index, from 0. The same index is the same problem, in any order and any process."""


class UsersGenerator:
    """The generator of a task whose path is `python:package.module:Name`. Raises :class:`GeneratorError`.

    `options` are its constructor's arguments besides the task's name.
    """

    def __init__(self, config: TaskConfig, options: dict[str, Any]) -> None:
        self._task, self._path = config, str(config.path).removeprefix(PREFIX)
        try:
            factory = load_plugin(self._path)
        except PluginError as error:
            raise self._error(str(error)) from error
        arguments = {"name": config.name, **options}
        try:
            self._generator = factory(**arguments)
        except Exception as error:  # a user's constructor may raise anything
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            raise self._error(f"cannot be made with {given}: {type(error).__name__}: {error}") from error
        if not callable(getattr(self._generator, "problem", None)):
            raise self._error(f"made a {type(self._generator).__name__}, which has no method problem(index)")
        self.size: int | None = getattr(self._generator, "size", None)
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise self._error(f"its size must be a positive whole number, or None, got {self.size!r}")

    def problem(self, index: int) -> Problem:
        """Returns the generator's problem. Raises :class:`GeneratorError` if it is unusable."""
        try:
            problem = self._generator.problem(index)
        except Exception as error:  # a user's method may raise anything
            raise self._error(f"problem({index}) failed: {type(error).__name__}: {error}") from error
        if not isinstance(problem, Problem):
            raise self._error(
                f"problem({index}) is a {type(problem).__name__}; expected a latent_grpo.common.types.Problem"
            )
        name, messages = self._task.name, problem.messages
        for key, good, wanted in (
            ("task", problem.task == name, f"the task's name {name!r}"),
            ("uid", _is_text(problem.uid) and problem.uid.startswith(f"{name}/"), f"'{name}/' and a part of its own"),
            ("answer", _is_text(problem.answer), "a text that is not empty"),
            ("cot", isinstance(problem.cot, str), "a text, empty where there is no chain of thought"),
            ("messages", _are_messages(messages), "a tuple of (role, text) pairs, one of them a user's with text"),
        ):
            if not good:
                raise self._error(f"problem({index}): {key} is {getattr(problem, key)!r:.200}; expected {wanted}")
        return problem

    def check_first(self, size: int | None, gradable: Callable[[str], bool] | None) -> None:
        """Checks that none of the first problems changes, repeats a uid or has an answer that is not `gradable`."""
        problems = [self.problem(index) for index in range(min(CHECKED_PROBLEMS, size or CHECKED_PROBLEMS))]
        for index, problem in enumerate(problems):
            if (again := self.problem(index)) != problem:
                raise self._error(
                    f"problem({index}) was {problem!r:.300}, then {again!r:.300}; the same index must give the same one"
                )
            if gradable is not None and not gradable(problem.answer):
                raise self._error(
                    f"verifier {self._task.verifier!r} cannot grade against the answer {problem.answer!r:.200} of "
                    f"problem({index}); correct the answers, or set the task's verifier"
                )
        uids = [problem.uid for problem in problems]
        if len(set(uids)) < len(uids):
            raise self._error(f"some of its first {len(uids)} problems have the same uid: {', '.join(uids)}")

    def _error(self, message: str) -> GeneratorError:
        return GeneratorError(f"task {self._task.name}: {self._path}: {message}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_messages(value: object) -> bool:
    """Whether it is a chat with text from the user."""
    if not isinstance(value, tuple):
        return False
    pairs = [m for m in value if isinstance(m, tuple) and len(m) == 2 and all(isinstance(part, str) for part in m)]
    return len(pairs) == len(value) and any(role == "user" and text.strip() for role, text in pairs)
