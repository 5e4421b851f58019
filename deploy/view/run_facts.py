"""The facts of a run in words: the panel above `inspect` and at the end of `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latent_grpo.common.figure_names import by_label, titled
from latent_grpo.deploy.run.manifest_schema import DataFacts, FileFacts, HardwareFacts
from latent_grpo.deploy.view.other_kinds import label_of
from latent_grpo.deploy.view.run_view import RunView


def facts(run: RunView) -> list[tuple[str, str]]:
    """Returns what the run is and what it was made with, in words for people: (name, value)."""
    settings, noise = run.settings, run.settings.get("noise", {})
    minutes = f", {run.summary['minutes']:g} minutes" if "minutes" in run.summary else ""
    found = [("state", run.state + minutes)]
    for tag in ("before", "after"):
        labels = by_label(run.summary.get(tag) or {})
        scores = [titled(of, f"{values['pass_at_1']:.3f}") for of, values in labels.items() if "pass_at_1" in values]
        if scores:
            found.append((f"pass@1 {tag}", ", ".join(scores)))
    tasks = run.evaluation.get("tasks", [])
    if tasks:
        found.append(("pass@1", ", ".join(titled(label_of(task), f"{task['pass_at_1']:.3f}") for task in tasks)))
    held_out = run.metric_rows("sft_evaluation")
    if run.kind == "sft" and held_out:
        found.append(("held-out pass@1", f"{held_out[-1]['metrics']['pass_at_1']:.3f} at step {held_out[-1]['step']}"))
    found += [
        ("algorithm", f"{settings.get('algorithm')}, {settings.get('component_weighting')} weighting"),
        ("tasks", ", ".join(task["name"] for task in settings.get("tasks", []))),
        ("batch", f"{settings.get('prompts_per_step')} prompts x {settings.get('group_size')} samples"),
        (
            "mixtures",
            f"K {settings.get('k')}, tau {settings.get('tau')}, noise {noise.get('mode')} x {noise.get('scale')}",
        ),
    ]
    return found + _made_with(run)


def _made_with(run: RunView) -> list[tuple[str, str]]:
    if run.manifest is None:
        return [
            ("started", str(run.identity.get("started", "unknown"))),
            ("versions", _versions(run.identity.get("versions", {}))),
            ("manifest", run.manifest_missing),
        ]
    manifest = run.manifest
    newest = manifest.lineages[-1]
    program = newest.program
    commit = program.commit or "unknown commit"
    models = (f"{name}: {_short(run, m.source)} ({_digest(m.files)})" for name, m in manifest.model.items())
    data = (f"{d.task} ({d.use}, {d.source}{_fingerprint(d)})" for d in manifest.data)
    return [
        ("seeds", ", ".join(f"{name} {seed}" for name, seed in manifest.seeds if seed is not None)),
        ("data", "; ".join(data)),
        ("models", "; ".join(models)),
        (
            "program",
            f"{program.version}, {commit}" + (", with changes" if program.changed_since_commit else ""),
        ),
        ("sources", f"{program.sources}; grader {manifest.grader.sources}"),
        ("command", newest.command),
        ("started", "; ".join(f"lineage {e.lineage} {e.started}" for e in manifest.lineages)),
        ("hardware", _hardware(newest.hardware)),
        ("versions", _versions(newest.versions)),
    ]


def _short(run: RunView, source: str) -> str:
    """Shortens a model's folder below the run's to its relative name."""
    path = Path(source)
    return path.name if path.parent.name == run.folder.name else source


def _versions(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _digest(files: dict[str, FileFacts]) -> str:
    """Returns the hashes of the weights, which tell two models apart."""
    weights = {name: facts for name, facts in files.items() if name.endswith((".safetensors", ".bin"))}
    return ", ".join(f"{name} {facts.xxh3_128}" for name, facts in weights.items()) or f"{len(files)} files"


def _fingerprint(data: DataFacts) -> str:
    found = data.xxh3_128 or data.problems_xxh3_128
    return f", {found}" if found else ""


def _hardware(machine: HardwareFacts) -> str:
    gpus = ", ".join(machine.gpus) or "no GPU"
    memory = f"{machine.memory_bytes / 2**30:.0f} GiB"
    return f"{machine.host}: {machine.cpus} x {machine.cpu}, {memory}, {gpus}; {machine.system}"
