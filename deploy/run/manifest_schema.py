"""The types of a run's `manifest.json`, version 1. What a writer leaves out is absent from the file.

Hashes are xxh3-128 of bytes: they show whether two things are the same, and are no signature.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

FORMAT: Final = 1


class Facts(BaseModel):
    """Unknown entries are kept: a file of a later version 1 program stays readable."""

    model_config = ConfigDict(extra="allow", frozen=True)


class FileFacts(Facts):
    bytes: int
    xxh3_128: str


class ModelFacts(Facts):
    source: str  # a folder or hub id
    revision: str | None = None  # of a hub id
    files: dict[str, FileFacts]


class DataFacts(Facts):
    """A task and what is in it: a file has `bytes` and `xxh3_128`, a hub dataset `problems_xxh3_128`."""

    task: str
    use: Literal["training", "evaluation"]
    source: str | None
    problems: int | None = None  # None: generated without end
    dropped: dict[str, int] = {}  # reason -> rows that are not used
    options: dict[str, Any] | None = None  # of a generated task, whose problems follow from these and the seed
    bytes: int | None = None
    xxh3_128: str | None = None
    problems_xxh3_128: str | None = None
    steps: str | None = None  # of a learner that reads another run's dumps


class GraderFacts(Facts):
    """`sources`: the hash of `reward/`. The versions of the packages that grade stand beside it by their names."""

    sources: str


class SeedFacts(Facts):
    run: int
    model: int | None  # None: the model was not made here
    data: int


class ProgramFacts(Facts):
    version: str
    commit: str | None  # None: neither a checkout nor a job sent from one
    changed_since_commit: bool | None
    sources: str  # hash of the program's Python files


class HardwareFacts(Facts):
    host: str
    system: str
    cpu: str
    cpus: int | None
    memory_bytes: int
    gpus: list[str]
    nodes: list[dict[str, float]] | None = None  # resources of the cluster's nodes, where Ray was connected


class LineageFacts(Facts):
    """A start of the run: the first one, or a resume."""

    lineage: int
    started: str
    command: str
    program: ProgramFacts
    versions: dict[str, str | None]
    hardware: HardwareFacts


class RunManifest(Facts):
    """What a run was made with."""

    format: Literal[1] = FORMAT
    run: str
    config: dict[str, Any]
    data: list[DataFacts]
    model: dict[str, ModelFacts]  # initial; base: what RL starts from; trained: what it made
    grader: GraderFacts
    seeds: SeedFacts
    lineages: list[LineageFacts]
