"""The types of a run's `manifest.json`, version 1. A field that the writer does not set is absent from the file.

Hashes are xxh3-128 of bytes: they show whether two things are the same, and are no signature.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT: Final = 1


class Facts(BaseModel):
    """Base of all entries. It keeps unknown fields, so that files of later programs with format 1 stay readable."""

    model_config = ConfigDict(extra="allow", frozen=True)


class FileFacts(Facts):
    """The size and the hash of one file."""

    bytes: int
    xxh3_128: str


class ModelFacts(Facts):
    """A model and its files, by path."""

    source: str  # a folder or hub id
    revision: str | None = None  # of a hub id
    files: dict[str, FileFacts]


class DataFacts(Facts):
    """A task and its contents: a file has `bytes` and `xxh3_128`, a hub dataset has `problems_xxh3_128`."""

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
    """The grader: `sources` is the hash of `reward/`; the versions of the grading packages are extra fields."""

    sources: str


class SeedFacts(Facts):
    """The seeds of a run."""

    run: int
    model: int | None  # None: the model was not made here
    data: int


class EngineFacts(Facts):
    """The rollout engine: what the settings ask for, what was taken and why."""

    asked: str
    name: str
    why: str


class ProgramFacts(Facts):
    """The program that ran."""

    version: str
    commit: str | None  # None: neither a checkout nor a job sent from one
    changed_since_commit: bool | None
    sources: str  # hash of the program's Python files


class HardwareFacts(Facts):
    """The driver's machine, and the cluster's nodes."""

    host: str
    system: str
    cpu: str
    cpus: int | None
    memory_bytes: int
    gpus: list[str]
    nodes: list[dict[str, float]] | None = None  # resources of the cluster's nodes, where Ray was connected


class LineageFacts(Facts):
    """One start of the run: the first one, or a resume."""

    lineage: int
    started: str
    command: str
    program: ProgramFacts
    versions: dict[str, str | None]
    hardware: HardwareFacts


class RunManifest(Facts):
    """The whole manifest."""

    format: Literal[1] = FORMAT
    run: str
    config: dict[str, Any]
    data: list[DataFacts]
    model: dict[str, ModelFacts]  # initial; base: what RL starts from; trained: what it made
    grader: GraderFacts
    seeds: SeedFacts
    engine: EngineFacts | None = None  # None: a program before 0.3 wrote it
    lineages: Annotated[list[LineageFacts], Field(min_length=1)]
