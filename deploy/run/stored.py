"""JSON files of a run's folder: one that is damaged, or has another form than a run writes, is one sentence.

The forms below are what programs read without :class:`RunConfig`, which only the version that wrote it need accept: a
run of any version can be shown. Every key may be absent, and others may be there.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    Required,  # pydantic takes only these before Python 3.12
)

from pydantic import Field, FiniteFloat, NonNegativeInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from latent_grpo.common.config import ConfigError
from latent_grpo.common.files import read_text

IDENTITY = "run.json"
EVALUATION_FILE = "evaluation.json"  # the results of an evaluation run
RESTORE = "bring it back from a copy of the run"
Count = Annotated[NonNegativeInt, Field(lt=2**63)]


class StoredError(ConfigError):
    """A file of a run's folder that is missing, unreadable or damaged."""


class _Noise(TypedDict, total=False):
    mode: str | None
    scale: FiniteFloat | None


class _Task(TypedDict, total=False):
    name: Required[str]
    path: str | None
    options: dict[str, Any]


class _Evaluation(TypedDict, total=False):
    tasks: list[_Task]
    interim_problems: Count | None


class _Dump(TypedDict, total=False):
    every: Count


class _WarmStart(TypedDict, total=False):
    max_steps: Count


class _Model(TypedDict, total=False):
    path: str | None


class Settings(TypedDict, total=False):
    """What is read of `config.json`."""

    algorithm: str | None
    component_weighting: str | None
    steps: Count
    k: Count | None
    tau: FiniteFloat | None
    prompts_per_step: Count
    group_size: Count
    max_recoveries: Count
    noise: _Noise
    tasks: list[_Task]
    evaluation: _Evaluation | None
    dump: _Dump
    warm_start: _WarmStart | None
    model: _Model
    checkpoint: dict[str, Any] | None


class Identity(TypedDict, total=False):
    """What is read of `run.json`. The lists have an entry a lineage."""

    kind: Literal["train", "sft", "evaluate"]
    lineage: Required[Count]
    started: str
    started_in: str | None
    versions: dict[str, str | None]
    arithmetic: list[int]
    dtypes: list[str | None]


class Summary(TypedDict, total=False):
    """What is read of `summary.json`."""

    minutes: FiniteFloat
    sessions: list[FiniteFloat]
    before: dict[str, FiniteFloat]
    after: dict[str, FiniteFloat]


class _Result(TypedDict, total=False):
    task: Required[str]
    problems: Required[Count]
    samples: Required[Count]
    pass_at_1: Required[FiniteFloat]
    chain_length: FiniteFloat | None
    latent_length: FiniteFloat | None
    invalid_rate: FiniteFloat | None
    protocol: str
    noise: str


class Results(TypedDict, total=False):
    """What is read of an evaluation's results."""

    tasks: list[_Result]


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):  # Python's JSON takes NaN, and reads 1e999 as infinity
        raise ValueError(f"{text:.40} is no finite number")
    return value


@functools.cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)


FORMS: dict[str, Any] = {
    "config.json": Settings, IDENTITY: Identity, "summary.json": Summary, EVALUATION_FILE: Results,
}  # fmt: skip


def stored_object(path: Path, remedy: str = RESTORE) -> dict[str, Any]:
    """Reads a JSON object, of the form that its file's name asks for; `remedy` ends the message about a damaged one.

    Raises :class:`StoredError`.
    """
    try:
        found = json.loads(read_text(path), parse_float=_finite, parse_constant=_finite)
    except FileNotFoundError as error:
        raise StoredError(f"{path} is missing; {remedy}") from error
    except OSError as error:
        remedy = "ask its owner for the right to" if isinstance(error, PermissionError) else remedy
        raise StoredError(f"{path} cannot be read: {error.strerror or error}; {remedy}") from error
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise StoredError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise StoredError(f"{path} is damaged (it holds no mapping, but {found!r:.60}); {remedy}")
    try:
        _adapter(FORMS.get(path.name, dict[str, Any])).validate_python(found, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key, said = ".".join(map(str, first["loc"])), first["msg"][:1].lower() + first["msg"][1:]
        got = "" if first["type"] == "missing" else f", got {first['input']!r:.60}"
        raise StoredError(f"{path} is damaged ({key}: {said}{got}); {remedy}") from error
    return found
