"""JSON files of a run's folder: one that is damaged, or has another form than a run writes, is one sentence.

The forms below are what programs read without :class:`RunConfig`, which only the version that wrote it need accept: a
run of any version can be shown. A key with a default may be absent, and others may be there.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, ValidationError

from latent_grpo.common.config import ConfigError
from latent_grpo.common.files import read_text

IDENTITY = "run.json"
EVALUATION_FILE = "evaluation.json"  # the results of an evaluation run
RESTORE = "bring it back from a copy of the run"
Count = Annotated[NonNegativeInt, Field(lt=2**63)]


class StoredError(ConfigError):
    """A file of a run's folder that is missing, unreadable or damaged."""


class _Form(BaseModel):
    """What is read of a file: its defaults stand for keys that are absent, and nobody reads them."""

    model_config = ConfigDict(strict=True)


class _Noise(_Form):
    mode: str | None = None
    scale: FiniteFloat | None = None


class _Task(_Form):
    name: str
    path: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class _Evaluation(_Form):
    tasks: list[_Task] = Field(default_factory=list)
    interim_problems: Count | None = None


class _Dump(_Form):
    every: Count = 0


class _WarmStart(_Form):
    max_steps: Count = 0


class _Model(_Form):
    path: str | None = None


class Settings(_Form):
    """What is read of `config.json`."""

    algorithm: str | None = None
    component_weighting: str | None = None
    steps: Count = 0
    k: Count | None = None
    tau: FiniteFloat | None = None
    prompts_per_step: Count = 0
    group_size: Count = 0
    max_recoveries: Count = 0
    noise: _Noise = _Noise()
    tasks: list[_Task] = Field(default_factory=list)
    evaluation: _Evaluation | None = None
    dump: _Dump = _Dump()
    warm_start: _WarmStart | None = None
    model: _Model = _Model()
    checkpoint: dict[str, Any] | None = None


class Identity(_Form):
    """What is read of `run.json`. The lists have an entry a lineage."""

    kind: Literal["train", "sft", "evaluate"] = "train"
    lineage: Count
    started: str = ""
    started_in: str | None = None
    versions: dict[str, str | None] = Field(default_factory=dict)
    arithmetic: list[int] = Field(default_factory=list)
    dtypes: list[str | None] = Field(default_factory=list)


class Summary(_Form):
    """What is read of `summary.json`."""

    minutes: FiniteFloat = 0.0
    sessions: list[FiniteFloat] = Field(default_factory=list)
    before: dict[str, FiniteFloat] = Field(default_factory=dict)
    after: dict[str, FiniteFloat] = Field(default_factory=dict)


class _Result(_Form):
    task: str
    problems: Count
    samples: Count
    pass_at_1: FiniteFloat
    chain_length: FiniteFloat | None = None
    latent_length: FiniteFloat | None = None
    invalid_rate: FiniteFloat | None = None
    protocol: str = ""
    noise: str = ""


class Results(_Form):
    """What is read of an evaluation's results."""

    tasks: list[_Result] = Field(default_factory=list)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):  # Python's JSON takes NaN, and reads 1e999 as infinity
        raise ValueError(f"{text:.40} is no finite number")
    return value


FORMS: dict[str, type[_Form]] = {
    "config.json": Settings, IDENTITY: Identity, "summary.json": Summary, EVALUATION_FILE: Results,
}  # fmt: skip


def stored_object(path: Path, remedy: str = RESTORE) -> dict[str, Any]:
    """Reads a JSON object, of the form that its file's name asks for; `remedy` ends the message about a damaged one.

    Raises :class:`StoredError`.
    """
    try:
        text = read_text(path)
        found = json.loads(text, parse_float=_finite, parse_constant=_finite)
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
        if (form := FORMS.get(path.name)) is not None:
            form.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key, said = ".".join(map(str, first["loc"])), first["msg"][:1].lower() + first["msg"][1:]
        said = f"{key}: {said}" if key else said
        got = "" if first["type"] in ("missing", "json_invalid") else f", got {first['input']!r:.60}"
        raise StoredError(f"{path} is damaged ({said}{got}); {remedy}") from error
    return found
