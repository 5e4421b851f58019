"""The manifest of a run (`manifest.json`): what it was made with, so that its numbers can be traced and repeated.

It holds the resolved settings, the seeds, and the hashes of data, model and grader. For every lineage (the start and
each resume) it says when it began, by which command, with which program (commit, hash of its sources, versions of what
it uses) and on which hardware. Hashes are xxh3-128 of bytes: they show whether two things are the same, and are no
signature.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import xxhash
from pydantic import ValidationError

from latent_grpo.common import __version__
from latent_grpo.common.config import ConfigError, RunConfig, TaskConfig
from latent_grpo.common.files import file_hash, read_text
from latent_grpo.common.secrets import redacted
from latent_grpo.common.tasks.generator import PREFIX
from latent_grpo.common.tasks.sources import GeneratedTask
from latent_grpo.common.tasks.tables import source_files
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.run.manifest_schema import (
    FORMAT,
    DataFacts,
    EngineFacts,
    FileFacts,
    GraderFacts,
    HardwareFacts,
    LineageFacts,
    ModelFacts,
    ProgramFacts,
    RunManifest,
    SeedFacts,
)
from latent_grpo.deploy.run.program import OUR_PACKAGES, source_hash
from latent_grpo.deploy.run.versions import versions
from latent_grpo.rollout_workers.engine_choice import choose_engine

if TYPE_CHECKING:
    from latent_grpo.common.tasks.sources import TaskSource
    from latent_grpo.deploy.run.problems import PreparedTask, Problems

FILE = "manifest.json"
COMMIT_VARIABLE = "LATENT_GRPO_COMMIT"
"""Environment variable with the commit of a submitted job, whose upload is no git checkout."""
GRADING_PACKAGES = ("math-verify", "latex2sympy2-extended", "sympy")
OTHER_PACKAGES = ("safetensors", "tokenizers", "datasets", *GRADING_PACKAGES, "vllm")
THIS_FILE = Path(__file__).resolve()
HASHED_PROBLEMS = 256  # problems of a user's generated task that are hashed


class ManifestError(ConfigError):
    """A run folder without a manifest that this program can read; the message says why."""


def write_manifest(
    folder: RunFolder, config: RunConfig, lineage: int, model: str | Path, data: list[DataFacts]
) -> None:
    """Writes the manifest once the model and the problems are known; a resume adds a lineage.

    `data` comes from :func:`data_facts`.
    """
    earlier = read_manifest(folder.path).lineages if (folder.path / FILE).exists() else []
    manifest = RunManifest(
        format=FORMAT,
        run=folder.name,
        config=config.model_dump(mode="json"),
        data=data,
        model={"initial": model_facts(model)},
        grader=GraderFacts(sources=source_hash(["reward"]), **grading_versions()),
        seeds=SeedFacts(run=config.seed, model=config.seed if config.model.new else None, data=config.seed),
        engine=EngineFacts.model_validate(asdict(choose_engine(config))),
        lineages=[*(entry for entry in earlier if entry.lineage < lineage), lineage_facts(lineage)],
    )
    _write(folder, manifest)


def record_model(folder: RunFolder, name: str, model: str | Path) -> None:
    """Adds a model to the manifest under `name`: `base`, which RL starts from, or `trained`, which it made."""
    manifest = read_manifest(folder.path)
    _write(folder, manifest.model_copy(update={"model": {**manifest.model, name: model_facts(model)}}))


def _write(folder: RunFolder, manifest: RunManifest) -> None:
    folder.write_json(FILE, manifest.model_dump(mode="json", exclude_unset=True))


def read_manifest(run_folder: str | Path) -> RunManifest:
    """Reads a run's manifest. Raises :class:`ManifestError`, with one sentence, where that is not possible."""
    path = Path(run_folder) / FILE
    try:
        content = json.loads(read_text(path))
        version = content["format"]
    except FileNotFoundError as error:
        raise ManifestError(
            f"{path.parent}: no {FILE}; the run ended before it had its model and data, or an older program made it"
        ) from error
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror or error}; move away what is there") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ManifestError(f"{path}: not a manifest of this program ({error})") from error
    if version != FORMAT:
        raise ManifestError(f"{path}: the manifest has format {version}, this program reads format {FORMAT}")
    try:
        return RunManifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ManifestError(f"{path}: not a manifest of this program ({place}: {first['msg']})") from error


# --- program and hardware ----------------------------------------------------------------------------------------


def lineage_facts(lineage: int) -> LineageFacts:
    """Returns the entry of a lineage that starts now."""
    commit, changed = program_commit()
    return LineageFacts(
        lineage=lineage,
        started=time.strftime("%FT%T%z"),
        command=redacted(shlex.join(sys.argv)),
        program=ProgramFacts(
            version=__version__, commit=commit, changed_since_commit=changed, sources=source_hash(OUR_PACKAGES)
        ),
        versions={**versions(), **{package: _version(package) for package in OTHER_PACKAGES}},
        hardware=hardware(),
    )


def program_commit(
    source: Path = THIS_FILE, environment: Mapping[str, str] = os.environ
) -> tuple[str | None, bool | None]:
    """Returns (commit, whether sources differ from it), or (None, None) outside a checkout and a job sent from one.

    `source` is a file of this program; git must track it, or the checkout around it is another project's.
    """
    try:
        git = functools.partial(_git, source.parents[2])
        git("ls-files", "--error-unmatch", str(source))
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", *OUR_PACKAGES))
    except (OSError, subprocess.SubprocessError):
        commit, _, changed = environment.get(COMMIT_VARIABLE, "").partition("+")
        return (commit, bool(changed)) if commit else (None, None)


def commit_for_job() -> dict[str, str]:
    """Returns the variable that tells a submitted job its commit, with `+changed` if the checkout differs from it."""
    commit, changed = program_commit()
    return {COMMIT_VARIABLE: commit + ("+changed" if changed else "")} if commit else {}


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
    ).stdout.strip()


def hardware() -> HardwareFacts:
    """Describes this machine, and the nodes of the cluster if Ray is connected."""
    import ray

    facts = HardwareFacts(
        host=platform.node(),
        system=platform.platform(),
        cpu=_cpu_model(),
        cpus=os.cpu_count(),
        memory_bytes=psutil.virtual_memory().total,
        gpus=_gpus(),
    )
    if not ray.is_initialized():
        return facts
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    named = [{name: amount for name, amount in sorted(n.items()) if not name.startswith("node:")} for n in nodes]
    return facts.model_copy(update={"nodes": named})


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Names of this machine's GPUs, from nvidia-smi, since torch would allocate memory on each of them."""
    try:
        names = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return [name.strip() for name in names.splitlines() if name.strip()]


def grading_versions() -> dict[str, str | None]:
    """The versions of the packages that, together with the sources of `reward`, decide a reward."""
    return {name: _version(name) for name in GRADING_PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- hashes ------------------------------------------------------------------------------------------------------


def file_facts(path: Path) -> FileFacts:
    """The size and the hash of a file."""
    return FileFacts(bytes=path.stat().st_size, xxh3_128=file_hash(path))


def source_facts(path: str) -> FileFacts:
    """The size and the hash of a task's files: of one its own, of several that of their names and hashes."""
    files = source_files(path)
    if len(files) == 1:
        return file_facts(files[0])
    facts = [(file.name, file_facts(file)) for file in files]
    digest = xxhash.xxh3_128(json.dumps([[name, of.xxh3_128] for name, of in facts]).encode())
    return FileFacts(bytes=sum(of.bytes for _, of in facts), xxh3_128=digest.hexdigest())


def problems_hash(source: TaskSource, count: int) -> str:
    """The hash of the source's first `count` problems."""
    digest = xxhash.xxh3_128()
    for index in range(count):
        problem = source.problem(index)
        digest.update(json.dumps([problem.uid, problem.messages, problem.answer, problem.cot]).encode())
    return digest.hexdigest()


def model_facts(model: str | Path) -> ModelFacts:
    """Describes every file of a model's folder, or of a hub id's snapshot, whose name is the revision."""
    folder, revision = Path(model), {}
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        folder = Path(str(cached_file(str(model), "config.json"))).parent  # raises if the hub has no such model
        revision = {"revision": folder.name}
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    hashes = {p.relative_to(folder).as_posix(): file_facts(p) for p in files}
    return ModelFacts(source=str(model), files=hashes, **revision)


def data_facts(problems: Problems) -> list[DataFacts]:
    """Describes every task's source and contents."""
    uses = [("training", problems.training), ("evaluation", problems.evaluation)]
    if problems.training is problems.evaluation:
        del uses[0]  # a run that only evaluates
    return [_data(task, use) for use, tasks in uses for task in tasks]


def _data(task: PreparedTask, use: str) -> DataFacts:
    source = task.source.config
    facts = {"task": task.name, "use": use, "source": source.path, "problems": task.source.size}
    dropped = {reason: len(rows) for reason, rows in task.source.dropped.items()}
    return DataFacts.model_validate({**facts, "dropped": dropped, **_content(task, source)})


def _content(task: PreparedTask, source: TaskConfig) -> dict[str, Any]:
    if source.path is None or isinstance(task.source, GeneratedTask):
        facts: dict[str, Any] = {"options": source.options}
        if source.path is not None and source.path.startswith(PREFIX):  # made by the user's program
            count = min(task.source.size or HASHED_PROBLEMS, HASHED_PROBLEMS)
            facts["problems_xxh3_128"] = problems_hash(task.source, count)
        return facts  # its problems follow from the options, the seed and the program
    if source.path.startswith("hf:"):
        return {"problems_xxh3_128": problems_hash(task.source, task.source.size or 0)}
    return source_facts(source.path).model_dump()
